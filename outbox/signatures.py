"""What a workflow or a step takes and gives, as JSON: `Signature`.

The input of a call is an object, parameter name → value. A msgspec Struct made from the parameters binds the
arguments, fills in defaults, encodes and decodes them, all in C; `inspect` and `typing` work only once, when the
function is decorated (or at the first call, if an annotation names a class that is defined further down).
"""

from __future__ import annotations

import copy
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import msgspec

from outbox.errors import ConfigError, PayloadError
from outbox.payloads import (
    DEFAULT_MAX_BYTES,
    decode,
    decoder_of,
    encode,
    fault,
    is_pydantic_model,
    read,
    require_decodable,
)
from outbox.rows import input_of_row

_NO_VALUE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_BOTTOM = (typing.NoReturn, typing.Never)


class Signature:
    """The parameters and the result of one function. Make it with `Signature.of`."""

    def __init__(
        self, function: Callable[..., Any], parameters: list[inspect.Parameter], returns: Any
    ) -> None:
        self._function = function
        self._declared = parameters
        self._returns = returns
        self.parameters = tuple(each.name for each in parameters)
        self._positional = tuple(each.name for each in parameters if each.kind is not each.KEYWORD_ONLY)
        self._keyword_only = self.parameters[len(self._positional) :]

    @classmethod
    def of(cls, function: Callable[..., Any], *, skip_first: int = 0) -> Signature:
        """Return the signature of `function` without its first `skip_first` parameters (self, a session).

        Raises ConfigError for a parameter or a result that JSON cannot carry, and for ``*args`` and ``**kwargs``,
        which have no place in an object of parameter name → value.
        """
        inspected = _inspect(function)
        parameters = list(inspected.parameters.values())[skip_first:]
        for each in parameters:
            if each.kind in _NO_VALUE:
                raise ConfigError(
                    f"{_name_of(function)} takes {each}; its arguments are recorded by name, so give each a "
                    "parameter, or take one list or dict"
                )
        made = cls(function, parameters, inspected.return_annotation)
        if all(_resolves(function, each) for each in (*(p.annotation for p in parameters), made._returns)):
            made.require_carriable()
        return made

    def require_carriable(self) -> None:
        """Raise ConfigError for a parameter, a default or a result that JSON cannot carry."""
        _ = self._arguments, self._result

    @property
    def returns(self) -> Any:
        """The annotated result; Any where there is none."""
        return self._result[0]

    def encode_arguments(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        where: str,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> str:
        """Return the arguments of one call as JSON text, defaults applied. Raises PayloadError."""
        struct, _ = self._arguments
        try:
            bound = struct(*args, **kwargs)
        except TypeError as error:
            raise self._misfit(args, kwargs, where, error) from None
        # Defaults were looked at when the function was decorated.
        return encode(
            bound, where=where, max_bytes=max_bytes, parts=(*args, *kwargs.values()) if kwargs else args
        )

    def decode_arguments(self, text: str | bytes, *, where: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return (args, kwargs) for one call. Raises PayloadError naming an unknown, missing or wrong field."""
        bound = read(self._arguments[1], text, where)
        values = msgspec.structs.astuple(bound)
        if not self._keyword_only:
            return values, {}
        count = len(self._positional)
        return values[:count], dict(zip(self._keyword_only, values[count:], strict=True))

    def check_input(self, given: Mapping[str, Any] | str | bytes, *, where: str = "input") -> None:
        """Raise PayloadError if `given` (an object, or its JSON text) cannot be decoded to a call."""
        text = given if isinstance(given, str | bytes) else encode(given, where=where, max_bytes=sys.maxsize)
        read(self._arguments[1], text, where)

    def encode_result(self, value: Any, *, where: str, max_bytes: int = DEFAULT_MAX_BYTES) -> str:
        """Return a result as JSON text. Raises PayloadError.

        Whether it fits the annotation is not asked: the effect has happened, so what it gave is recorded, and a
        wrong annotation shows when it is decoded, where it can be mended without repeating the effect.
        """
        return encode(value, where=where, max_bytes=max_bytes)

    def decode_result(self, text: str | bytes, *, where: str) -> Any:
        """Return the value of a recorded result. Raises PayloadError."""
        return read(self._result[1], text, where)

    def decode_row(self, row: Mapping[str, str | None], *, where: str = "row") -> dict[str, Any]:
        """Return the input object for one CSV row, to be encoded.

        A function with one object parameter takes the row as that object; otherwise columns are parameters. Text
        is read leniently ("17" is an int where one is wanted); an empty cell is missing where there is a default
        and None where the type allows it. Raises PayloadError naming the column.
        """
        return input_of_row(self._arguments[0], row, where)

    def json_schema(self) -> dict[str, Any]:
        """Return the JSON Schema of the input object."""
        definitions: dict[str, Any] = {}

        def of_model(cls: type) -> dict[str, Any]:
            if not is_pydantic_model(cls):
                raise NotImplementedError  # msgspec's way to hear "not mine"
            schema: dict[str, Any] = cls.model_json_schema()  # type: ignore[attr-defined]  # a pydantic model
            definitions.update(schema.pop("$defs", {}))
            return schema

        schema = msgspec.json.schema(self._arguments[0], schema_hook=of_model)
        schema.setdefault("$defs", {}).update(definitions)
        return schema

    @cached_property
    def _arguments(self) -> tuple[type[msgspec.Struct], msgspec.json.Decoder[Any]]:
        fields = [self._field(each) for each in self._declared]
        struct = msgspec.defstruct(
            self._function.__qualname__.rpartition(".")[2],
            fields[: len(self._positional)],
            module=self._function.__module__,
            forbid_unknown_fields=True,
        )
        if self._keyword_only:
            struct = msgspec.defstruct(
                struct.__name__,
                fields[len(self._positional) :],
                bases=(struct,),
                kw_only=True,
                module=self._function.__module__,
                forbid_unknown_fields=True,
            )
        return struct, decoder_of(struct)

    @cached_property
    def _result(self) -> tuple[Any, msgspec.json.Decoder[Any]]:
        type_ = _resolved(self._function, self._returns, "its result")
        type_ = Any if type_ in _BOTTOM else type_
        require_decodable(type_, f"the result of {_name_of(self._function)}")
        return type_, decoder_of(type_)

    def _field(self, parameter: inspect.Parameter) -> tuple[str, Any, Any]:
        """Return what defstruct wants to know of one parameter."""
        what = f"parameter {parameter.name!r} of {_name_of(self._function)}"
        type_ = _resolved(self._function, parameter.annotation, what)
        require_decodable(type_, what)
        default = parameter.default
        if default is parameter.empty:
            return parameter.name, type_, msgspec.field()
        try:
            decode(encode(default, where=f"the default of {what}"), type_, where=f"the default of {what}")
        except PayloadError as error:
            raise ConfigError(str(error)) from error
        if default.__hash__ is not None:
            return parameter.name, type_, msgspec.field(default=default)
        # A copy for every call: a body that changes it must not change what the next one sees.
        return parameter.name, type_, msgspec.field(default_factory=lambda: copy.deepcopy(default))

    def _misfit(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], where: str, error: TypeError
    ) -> PayloadError:
        """Return the PayloadError for arguments that do not fit, in Python's own words for it."""
        try:
            inspect.Signature([each.replace(annotation=Any) for each in self._declared]).bind(*args, **kwargs)
        except TypeError as misfit:
            return fault(where, "", str(misfit))
        return fault(where, "", str(error))


def _name_of(function: Callable[..., Any]) -> str:
    return f"`{getattr(function, '__qualname__', function)}`"


def _inspect(function: Callable[..., Any]) -> inspect.Signature:
    """Return Python's signature of `function`, its annotations as they stand."""
    if sys.version_info >= (3, 14):
        import annotationlib

        return inspect.signature(function, annotation_format=annotationlib.Format.FORWARDREF)
    return inspect.signature(function)


def _resolved(function: Callable[..., Any], annotation: Any, what: str) -> Any:
    """Return the type that `annotation` stands for; raises ConfigError if it cannot be found."""
    if annotation is inspect.Parameter.empty:
        return Any
    try:
        return _evaluated(function, annotation)
    except (NameError, AttributeError) as error:
        raise ConfigError(
            f"{what} is annotated {annotation!r}, which cannot be found ({error}); define or import the class at "
            "the top level of its module, not only under TYPE_CHECKING"
        ) from None
    except (TypeError, SyntaxError) as error:
        raise ConfigError(f"{what} has an annotation that is not a type: {error}") from None


def _resolves(function: Callable[..., Any], annotation: Any) -> bool:
    """Tell whether the names in `annotation` exist already; a class further down in the module does not."""
    try:
        _evaluated(function, annotation)
    except (NameError, AttributeError):
        return False
    except (TypeError, SyntaxError):
        return True  # it never will; whoever needs it says so
    return True


def _evaluated(function: Callable[..., Any], annotation: Any) -> Any:
    def holder() -> None: ...

    plain = inspect.unwrap(function)
    code, cells = getattr(plain, "__code__", None), getattr(plain, "__closure__", None) or ()
    names = code.co_freevars if code else ()
    holder.__annotations__ = {"it": annotation}
    return typing.get_type_hints(
        holder,
        globalns=getattr(plain, "__globals__", {}),
        localns=dict(_filled(zip(names, cells, strict=False))),
        include_extras=True,
    )["it"]


def _filled(cells: Iterable[tuple[str, types.CellType]]) -> Iterator[tuple[str, Any]]:
    """Yield what a closure holds; a variable that is assigned later, or the function itself, is not there yet."""
    for name, cell in cells:
        try:
            yield name, cell.cell_contents
        except ValueError:
            continue
