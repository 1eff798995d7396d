"""What the first parameter of a `@transaction` says: whose transaction the step joins.

Classes are told apart by their names, so that this module needs neither psycopg nor SQLAlchemy.
"""

from __future__ import annotations

import enum
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

from outbox.errors import ConfigError


class TransactionKind(enum.Enum):
    """The connection or session that a transactional step is given."""

    PSYCOPG = "psycopg.Connection"
    PSYCOPG_ASYNC = "psycopg.AsyncConnection"
    SQLALCHEMY_CONNECTION = "sqlalchemy.engine.base.Connection"
    SQLALCHEMY_SESSION = "sqlalchemy.orm.session.Session"
    SQLALCHEMY_ASYNC_CONNECTION = "sqlalchemy.ext.asyncio.engine.AsyncConnection"
    SQLALCHEMY_ASYNC_SESSION = "sqlalchemy.ext.asyncio.session.AsyncSession"

    @property
    def is_async(self) -> bool:
        """Tell whether its methods are awaited, which takes an `async def` step."""
        return self.value.rpartition(".")[2].startswith("Async")


_KINDS = {kind.value: kind for kind in TransactionKind}
_WANTED = (
    "annotate it with psycopg's Connection or AsyncConnection, or with SQLAlchemy's "
    "Connection, Session, AsyncConnection or AsyncSession"
)


def kind_of(function: Callable[..., Any], parameter: inspect.Parameter | None) -> TransactionKind:
    """Return the kind that the annotation of `parameter` names. Raises ConfigError when it names none."""
    if parameter is None:
        raise ConfigError(f"it has no parameter for the transaction; give it a first one and {_WANTED}")
    if parameter.annotation is inspect.Parameter.empty:
        raise ConfigError(f"its first parameter {parameter.name!r} has no annotation; {_WANTED}")
    annotation = _resolved(function, parameter)
    kind = _kind_of_class(typing.get_origin(annotation) or annotation)
    if kind is None:
        raise ConfigError(f"its first parameter {parameter.name!r} is annotated {annotation!r}; {_WANTED}")
    if kind.is_async != inspect.iscoroutinefunction(function):
        wanted = "async def" if kind.is_async else "def"
        raise ConfigError(f"its first parameter is {_short(kind)}, which takes `{wanted}`")
    return kind


def _kind_of_class(annotation: Any) -> TransactionKind | None:
    for base in getattr(annotation, "__mro__", ()):
        kind = _KINDS.get(f"{base.__module__}.{base.__qualname__}")
        if kind is not None:
            return kind
    return None


def _resolved(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """Return the annotation as an object, alone: the other annotations may name what comes later in the file."""
    holder = types.SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    try:
        return typing.get_type_hints(holder, globalns=getattr(function, "__globals__", {}))[parameter.name]
    except NameError as error:
        raise ConfigError(
            f"the annotation {parameter.annotation!r} of its first parameter cannot be resolved ({error}); "
            "import the class at the top of the module and outside of `if TYPE_CHECKING`"
        ) from None


def _short(kind: TransactionKind) -> str:
    package, _, name = kind.value.partition(".")
    return f"{'psycopg' if package == 'psycopg' else 'SQLAlchemy'}'s {name.rpartition('.')[2]}"
