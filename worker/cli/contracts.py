"""What a workflow takes: by the APP that defines it, by what workers have published, or unchecked.

The command line checks names and inputs before anything is enqueued. SQL and Python's client by name do not:
there an unknown name may be one that is deployed next.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import psycopg

from outbox.codec import decode, encode
from outbox.errors import PayloadError, UnknownWorkflow
from outbox.history import HistoryRecord
from outbox.invocations import parameters_of
from outbox.payloads import decoder_of, read
from outbox.rows import input_of_row
from worker.cli.mistakes import Mistake
from worker.cli.schema_types import struct_of
from worker.queries import load

_SUGGESTIONS = 3
_LISTED = 10


class Rules(Protocol):
    """What checks an input; `outbox.codec.Signature` is one."""

    @property
    def parameters(self) -> tuple[str, ...]: ...
    def check_input(self, given: Mapping[str, Any] | str | bytes, *, where: str) -> None: ...
    def decode_row(self, row: Mapping[str, str | None], *, where: str) -> dict[str, Any]: ...


class Published:
    """The rules of a workflow as its workers have published them: a JSON Schema."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._struct = struct_of(schema)
        self.parameters = parameters_of(schema)

    def check_input(self, given: Mapping[str, Any] | str | bytes, *, where: str) -> None:
        """Raise PayloadError if the input does not fit."""
        text = given if isinstance(given, str | bytes) else encode(given, where=where, max_bytes=sys.maxsize)
        read(decoder_of(self._struct), text, where)

    def decode_row(self, row: Mapping[str, str | None], *, where: str) -> dict[str, Any]:
        """Return the input for one CSV row; what is left out is left to the worker's defaults."""
        found = input_of_row(self._struct, row, where)
        plain = {name: value for name, value in found.items() if value is not msgspec.UNSET}
        return {name: msgspec.to_builtins(value) for name, value in plain.items()}


@dataclass(frozen=True, slots=True)
class Contract:
    """A workflow as far as the command line knows it. Without `rules` anything goes."""

    name: str
    queue: str | None = None
    rules: Rules | None = None
    version: str | None = None
    """None: the current one"""

    def checked(self, given: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Return an input object that fits. Raises PayloadError naming the field."""
        if self.rules is not None:
            self.rules.check_input(given, where=where)
        return given

    def of_cells(self, row: Mapping[str, str | None], where: str) -> dict[str, Any]:
        """Return the input for one CSV row, whose text is read by the types that are wanted."""
        return dict(row) if self.rules is None else self.rules.decode_row(row, where=where)

    def of_object(self, row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Return the input for one JSON row: the input object itself, or the one parameter of the workflow."""
        if self.rules is None or len(self.rules.parameters) != 1 or self.rules.parameters[0] in row:
            return self.checked(row, where)
        try:
            return self.checked({self.rules.parameters[0]: row}, where)
        except PayloadError as error:
            raise _without(self.rules.parameters[0], error, where) from None


def contract_for(
    workflow: str,
    connection: psycopg.Connection[Any],
    *,
    app: str | None,
    allow_unknown: bool,
    version: str | None = None,
) -> Contract:
    """Return what is known of `workflow`, of one version if it is given.

    Raises UnknownWorkflow, with close matches, for an unknown one; Mistake if APP has several versions of it.
    """
    known = _of_app(app) if app else _published(connection, allow_unknown)
    versions = {each.version or "": each for each in known if each.name == workflow}
    if version is not None and version in versions:
        return versions[version]
    if version is None and versions:
        if app and len(versions) > 1:
            listed = ", ".join(repr(each) for each in sorted(versions))
            raise Mistake(
                f"{app} defines several versions of {workflow!r}: give one of {listed} by --version"
            )
        return next(iter(versions.values()))
    if allow_unknown:
        return Contract(workflow, version=version)
    if versions:
        raise UnknownWorkflow(_unknown_version(workflow, version, sorted(versions), app))
    raise UnknownWorkflow(_unknown(workflow, sorted({each.name for each in known}), app))


def check_result(app: str, history: Sequence[HistoryRecord], path: Sequence[int], value: Any) -> None:
    """Check what is said of the step that a history has at a path by the step of APP. Raises PayloadError, Mistake."""
    from worker.apps import load_app

    name = next((each.name for each in history if each.kind == "step" and each.path == tuple(path)), None)
    steps = load_app(app).steps.values()
    known = {each.name: each for step in steps for each in (step, step.undo) if each is not None}
    if name is None:
        return  # the database says what is at that path
    if name not in known:
        raise Mistake(f"{app} defines no step called {name!r}, by which the value could be checked")
    where = f"the value of step {name!r}"
    known[name].signature.decode_result(encode(value, where=where, max_bytes=sys.maxsize), where=where)


def _of_app(app: str) -> list[Contract]:
    from worker.apps import load_app

    workflows = load_app(app).workflows.values()
    return [Contract(found.name, found.queue, found.signature, found.version) for found in workflows]


def _published(connection: psycopg.Connection[Any], allow_unknown: bool) -> list[Contract]:
    try:
        rows = connection.execute(load("cli_workflows")).fetchall()
    except psycopg.errors.InsufficientPrivilege:
        if allow_unknown:
            return []
        raise UnknownWorkflow(
            "this database role may not read what workflows there are: name the APP that defines it with --app, "
            "or pass --allow-unknown"
        ) from None
    return [
        Contract(name, queue, Published(decode(schema, dict[str, Any], where=f"schema of {name}")), version)
        for name, version, queue, schema in rows
    ]


def _unknown_version(workflow: str, version: str | None, known: list[str], app: str | None) -> str:
    source = f"{app} defines" if app else "workers have published"
    return f"there is no version {version!r} of workflow {workflow!r}; {source} {', '.join(map(repr, known))}"


def _unknown(workflow: str, known: list[str], app: str | None) -> str:
    close = difflib.get_close_matches(workflow, known, n=_SUGGESTIONS)
    source = f"{app} defines" if app else "workers have published"
    if close:
        hint = f"did you mean {' or '.join(close)}?"
    elif not known:
        hint = "start a worker that defines it, name its APP with --app, or pass --allow-unknown"
    else:
        listed = ", ".join(known[:_LISTED]) + (", …" if len(known) > _LISTED else "")
        hint = f"{source} {listed}"
    return f"no workflow is called {workflow!r}; {hint}"


def _without(parameter: str, error: PayloadError, where: str) -> PayloadError:
    """Return `error` of a row without the name of the parameter that the row was put under."""
    field = error.field.removeprefix(parameter).lstrip(".")
    reason = str(error).removeprefix(f"{where}, field {error.field}: ").removeprefix(f"{where}: ")
    return PayloadError(f"{where}, field {field}: {reason}" if field else f"{where}: {reason}", field=field)
