"""CSV rows as the input of a workflow: text that is read leniently, by the types that the workflow wants."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import msgspec
from msgspec import inspect as kinds

from outbox.errors import PayloadError
from outbox.payloads import fault, finding_of, from_json, is_pydantic_model

_OBJECTS = (kinds.DataclassType, kinds.StructType, kinds.TypedDictType)
_CONTAINERS = (*_OBJECTS, kinds.DictType, kinds.CollectionType)


def input_of_row(
    parameters: type[msgspec.Struct], row: Mapping[str, str | None], where: str
) -> dict[str, Any]:
    """Return parameter name → value for one row, as `csv.DictReader` gives it.

    One parameter that is an object takes the whole row; otherwise columns are parameters. Raises PayloadError.
    """
    if None in row:
        raise PayloadError(f"{where}: has more cells than there are columns")
    declared = _declared(parameters)
    whole = _without_none(declared.fields[0].type) if len(declared.fields) == 1 else None
    owner = ""
    if isinstance(whole, _OBJECTS):
        owner = declared.fields[0].name
        given: dict[str, Any] = {owner: _cells(whole.fields, row, where)}
    elif isinstance(whole, kinds.DictType | kinds.AnyType) and declared.fields[0].name not in row:
        owner = declared.fields[0].name
        given = {owner: dict(row)}
    elif isinstance(whole, kinds.CustomType) and is_pydantic_model(whole.cls):
        owner = declared.fields[0].name
        given = {owner: _cells_of_model(whole.cls, row)}
    else:
        given = _cells(declared.fields, row, where)
    try:
        bound = msgspec.convert(given, parameters, strict=False, dec_hook=from_json)
    except Exception as error:  # the caller's own classes run in here: __post_init__, validators
        field, reason = finding_of(error)
        # Every cell is a str; what matters is what it was to be read as.
        reason = re.sub(r"^expected (`[aeiou].*), got `str`$", r"not an \1", reason)
        reason = re.sub(r"^expected (`.*), got `str`$", r"not a \1", reason)
        raise fault(where, field.removeprefix(owner).lstrip("."), reason, "column") from error
    return {each.name: getattr(bound, each.name) for each in declared.fields}


@cache
def _declared(parameters: type[msgspec.Struct]) -> kinds.StructType:
    """Return what a struct declares; looking takes hundreds of times longer than converting a row."""
    declared = kinds.type_info(parameters)
    assert isinstance(declared, kinds.StructType)
    return declared


def _cells(fields: tuple[kinds.Field, ...], row: Mapping[str, str | None], where: str) -> dict[str, Any]:
    """Return the cells to convert: empty ones as None or left out, containers read as JSON."""
    cells: dict[str, Any] = dict(row)
    for each in fields:
        cell = row.get(each.encode_name)
        if cell is None or not cell.strip():
            _settle_empty(cells, each, where)
        elif not _accepts(each.type, kinds.StrType | kinds.AnyType):
            cells[each.encode_name] = _read(cell.strip(), each, where)
    return cells


def _settle_empty(cells: dict[str, Any], field: kinds.Field, where: str) -> None:
    """Replace an empty cell by None or nothing, or leave the empty text where text is wanted."""
    name = field.encode_name
    if not field.required or name not in cells:
        cells.pop(name, None)
    elif _accepts(field.type, kinds.NoneType):
        cells[name] = None
    elif cells[name] is None or not _accepts(field.type, kinds.StrType | kinds.AnyType):
        raise fault(where, name, "is empty", "column")


def _read(cell: str, field: kinds.Field, where: str) -> Any:
    """Return a cell's text, or what it holds as JSON if the field is a list or an object."""
    if not (cell.startswith(("[", "{")) and isinstance(_without_none(field.type), _CONTAINERS)):
        return cell
    try:
        return msgspec.json.decode(cell)
    except msgspec.DecodeError as error:
        raise fault(where, field.encode_name, finding_of(error)[1], "column") from error


def _cells_of_model(model: Any, row: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the cells for a pydantic model: what is empty and has a default is left out."""
    cells: dict[str, Any] = dict(row)
    for name, field in model.model_fields.items():
        column = field.alias or name
        if not (cells.get(column) or "").strip() and not field.is_required():
            cells.pop(column, None)
    return cells


def _accepts(info: kinds.Type, wanted: Any) -> bool:
    return any(
        isinstance(each, wanted) for each in (info.types if isinstance(info, kinds.UnionType) else (info,))
    )


def _without_none(info: kinds.Type) -> kinds.Type:
    """Return the one type of `T | None`, any other type as it is."""
    if not isinstance(info, kinds.UnionType):
        return info
    others = [each for each in info.types if not isinstance(each, kinds.NoneType)]
    return others[0] if len(others) == 1 else info
