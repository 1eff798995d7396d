"""What users write: `@workflow`, `@step`, `@transaction`, and what becomes of the functions they decorate.

A definition is called as the function that it is. In a driven body the call goes to the drive, anywhere else
to the plain function. Everything that can be wrong with a definition is a ConfigError when its module is
imported; it names the function, the file and the line.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    ParamSpec,
    Protocol,
    TypeVar,
    cast,
    overload,
)

from outbox.codec import Signature
from outbox.errors import ConfigError, PayloadError
from worker import options
from worker.apps import load_app
from worker.context import current_drive
from worker.kinds import TransactionKind, kind_of
from worker.registry import Registry, collecting, registry
from worker.replay.calls import ChildCall, StepCall
from worker.retries import RetryPolicy, retrying

if TYPE_CHECKING:
    from typing import Self

__all__ = [
    "NOT_DONE",
    "Definition",
    "Registry",
    "Step",
    "TransactionKind",
    "Workflow",
    "collecting",
    "load_app",
    "registry",
    "step",
    "transaction",
    "workflow",
]

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")


STEP_TASK = "step:"
"""What stands before the name of a step where tasks are named by what their claimant must know."""


class _NotDone:
    """The type of NOT_DONE."""

    def __repr__(self) -> str:
        return "NOT_DONE"


NOT_DONE = _NotDone()
"""What a `verify` function returns when the effect of its step has not happened."""


class Definition(Generic[P, R]):
    """A registered function: its name, its signature, and the class it belongs to if it is a class method.

    Type checkers do not bind an object below `@classmethod` to its class as they bind a function, so they miss
    the class in calls of a class method; they follow static methods.

    `function` is what the engine calls, with a class method's class filled in; `plain` is what the user wrote.
    `skipped` counts the leading parameters that are no payload: a class, a session.
    """

    sort = "definition"

    def __init__(self, decorated: Any, name: str | None, *, session: bool = False) -> None:
        self.plain, self._of_class = _unwrapped(decorated, self.sort)
        functools.update_wrapper(cast("Any", self), self.plain)
        self.file = self.plain.__code__.co_filename
        self.where = f"{self.file}:{self.plain.__code__.co_firstlineno}"
        self.name = self._checked(lambda: options.name(name, self.plain.__qualname__))
        self.is_async = inspect.iscoroutinefunction(self.plain)
        self._owner: type | None = None
        # From 3.13 on classmethod(definition) hands the class over as an argument instead of asking __get__.
        self._given_class = (
            self._of_class and not isinstance(decorated, classmethod) and sys.version_info >= (3, 13)
        )
        self.function: Callable[..., Any] = self._with_class if self._of_class else self.plain
        self.skipped = int(self._of_class) + int(session)
        self._check_parameters()
        self.signature = self._checked(lambda: Signature.of(self.plain, skip_first=self.skipped))
        self.arguments_where = f"{self.sort} {self.name}"
        self.result_where = f"the result of {self.sort} {self.name}"

    def __set_name__(self, owner: type, name: str) -> None:
        self._owner = owner

    def __get__(self, instance: object, owner: type | None = None, /) -> Self:
        if not self._of_class:
            return self
        accessed = owner or type(instance)
        if accessed is self._found_owner(accessed):
            return self
        inherited: Any = functools.partial(self._inherited, accessed)
        return inherited  # type: ignore[no-any-return]  # called like the definition, which is what callers do

    def __repr__(self) -> str:
        return f"<{self.sort} {self.name} at {self.where}>"

    def resolve(self) -> None:
        """Resolve annotations that name what came later in the module. Raises ConfigError."""
        self._checked(self._resolved)

    def _resolved(self) -> None:
        _ = self.signature.returns
        with suppress(PayloadError):  # the empty input need not fit
            self.signature.check_input("{}")

    def problem(self, what: str) -> ConfigError:
        """Return the error that says what is wrong with this definition, and where it is."""
        return ConfigError(f"{self.sort} {self.plain.__qualname__} ({self.where}): {what}")

    def _checked(self, check: Callable[[], T]) -> T:
        try:
            return check()
        except ConfigError as error:
            raise self.problem(str(error)) from error

    def _check_parameters(self) -> None:
        if inspect.isgeneratorfunction(self.plain) or inspect.isasyncgenfunction(self.plain):
            raise self.problem("it is a generator; a definition has one result, so return a list instead")
        parameters = list(inspect.signature(self.plain).parameters.values())
        if not self._of_class and parameters and parameters[0].name == "self" and "." in self.name:
            raise self.problem("an instance cannot be recorded; make it a static or a class method")
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise self.problem(
                    f"parameter {str(parameter)!r} takes any arguments; name each one, or take a list or dict"
                )

    def _with_class(self, *args: Any, **kwargs: Any) -> Any:
        return self.plain(self._found_owner(None), *args, **kwargs)

    def _inherited(self, accessed: type, *args: Any, **kwargs: Any) -> Any:
        """Call through a subclass: plainly only, because a record holds the name and not the subclass."""
        if current_drive.get() is None:
            return self.plain(accessed, *args, **kwargs)
        raise self.problem(
            f"it is called through {accessed.__qualname__}, which is not recorded; call it through the class that "
            f"defines it, or decorate a class method of {accessed.__qualname__}"
        )

    def payload_of(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the positional arguments of a call without what is no payload."""
        return self._without_class(args) if self._given_class else args

    def _without_class(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        accessed, *rest = args
        if accessed is not self._found_owner(accessed):
            self._inherited(accessed)
        return tuple(rest)

    def _found_owner(self, accessed: type | None) -> type:
        """Return the class whose method this is: told by Python, seen on the way to a call, or looked up by name."""
        if self._owner is None and accessed is not None:
            self._owner = next((base for base in accessed.__mro__ if _holds(base, self)), None)
        if self._owner is None:
            found: Any = sys.modules.get(self.plain.__module__)
            for part in self.plain.__qualname__.split(".")[:-1]:
                found = getattr(found, part, None)
            if not isinstance(found, type):
                raise self.problem("its class cannot be found by its name; define it at the top of a module")
            self._owner = found
        return self._owner


class Step(Definition[P, R]):
    """A function with effects: the unit that is executed, recorded, and never executed again."""

    sort = "step"

    def __init__(
        self,
        decorated: Any,
        name: str | None = None,
        *,
        retry: RetryPolicy | None = None,
        timeout: float | timedelta | None = None,
        on_crash: options.OnCrash = "retry",
        verify: Callable[..., Any] | None = None,
        raises: type[Exception] | tuple[type[Exception], ...] = (),
        queue: str | None = None,
        undo: Callable[..., Any] | None = None,
        transactional: bool = False,
    ) -> None:
        if transactional:
            self.sort = "transaction"
        super().__init__(decorated, name, session=transactional)
        parameters = list(inspect.signature(self.plain).parameters.values())
        self.retry = self._checked(lambda: options.retry(retry))
        self.timeout = self._checked(lambda: options.timeout(timeout))
        self.on_crash: options.OnCrash = self._checked(lambda: options.on_crash(on_crash))
        self.verify = self._checked(lambda: options.verify(verify, parameters[self.skipped :]))
        self.raises = self._checked(lambda: options.raises(raises))
        self.queue = None if queue is None else self._checked(lambda: options.queue(queue))
        self.transaction = self._checked(lambda: self._kind(parameters)) if transactional else None
        self.undo = None if undo is None else self._checked(lambda: self._undone_by(undo))
        self.claimed_as = f"{STEP_TASK}{self.name}"
        """What a worker must know to execute it as a task of its own."""
        self.is_careful = verify is not None or self.on_crash == "hold"
        """Whether it matters to what happens next that an execution had started."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        drive = current_drive.get()
        if drive is None:
            return self._called_plainly(*args, **kwargs)  # type: ignore[no-any-return]  # as below
        call = StepCall(drive, self, self.payload_of(args) if self._given_class else args, kwargs)
        made: Any = call if self.is_async else call.perform()
        return made  # type: ignore[no-any-return]  # a drive gives what the function gives

    def _called_plainly(self, *args: Any, **kwargs: Any) -> Any:
        return (self.plain if self._given_class else self.function)(*args, **kwargs)

    def _undone_by(self, undo: Callable[..., Any]) -> Step[..., Any]:
        """Return the step that undoes this one; of a plain function, one that is tried again as this one is."""
        made = undo if isinstance(undo, Step) else Step(
            undo, f"{self.name}.undo", retry=self.retry or retrying(), timeout=self.timeout
        )  # fmt: skip
        strange = [name for name in made.signature.parameters if name not in self.signature.parameters]
        if len(strange) > 1:
            raise ConfigError(
                f"undo= is called with the arguments of the step by their names, and with its result in one more "
                f"parameter; {made.plain.__qualname__} has {', '.join(map(repr, strange))}"
            )
        return made

    def _kind(self, parameters: list[inspect.Parameter]) -> TransactionKind:
        if self.verify is not None:
            raise ConfigError(
                "a transaction needs no verify=: its effects and its record commit together or not at all"
            )
        return kind_of(self.plain, next(iter(parameters[int(self._of_class) :]), None))


class Workflow(Definition[P, R]):
    """A deterministic function: the plan that is replayed."""

    sort = "workflow"

    def __init__(
        self,
        decorated: Any,
        name: str | None = None,
        *,
        queue: str = "default",
        strict: bool = False,
        version: str = "",
    ) -> None:
        super().__init__(decorated, name)
        self.queue = self._checked(lambda: options.queue(queue))
        self.strict = bool(strict)
        self.version = self._checked(lambda: options.version(version))
        self.claimed_as = f"{self.name}@{self.version}" if self.version else self.name
        """What a worker must know to advance its runs."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        drive = current_drive.get()
        if drive is not None:
            call = ChildCall(drive, self, self.payload_of(args), kwargs)
            made: Any = call if self.is_async else call.perform()
            return made  # type: ignore[no-any-return]  # a drive gives what the function gives
        return (self.plain if self._given_class else self.function)(*args, **kwargs)  # type: ignore[no-any-return]


class _StepDecorator(Protocol):
    @overload
    def __call__(self, function: staticmethod[P, R], /) -> Step[P, R]: ...
    @overload
    def __call__(self, function: classmethod[T, P, R], /) -> Step[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Step[P, R]: ...


class _TransactionDecorator(Protocol):
    @overload
    def __call__(self, function: staticmethod[Concatenate[S, P], R], /) -> Step[P, R]: ...
    @overload
    def __call__(self, function: classmethod[T, Concatenate[S, P], R], /) -> Step[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[S, P], R], /) -> Step[P, R]: ...


class _WorkflowDecorator(Protocol):
    @overload
    def __call__(self, function: staticmethod[P, R], /) -> Workflow[P, R]: ...
    @overload
    def __call__(self, function: classmethod[T, P, R], /) -> Workflow[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Workflow[P, R]: ...


@overload
def step(function: staticmethod[P, R], /) -> Step[P, R]: ...
@overload
def step(function: classmethod[T, P, R], /) -> Step[P, R]: ...
@overload
def step(function: Callable[P, R], /) -> Step[P, R]: ...
@overload
def step(
    *,
    name: str | None = None,
    retry: RetryPolicy | None = None,
    timeout: float | timedelta | None = None,
    on_crash: options.OnCrash = "retry",
    verify: Callable[..., Any] | None = None,
    raises: type[Exception] | tuple[type[Exception], ...] = (),
    queue: str | None = None,
    undo: Callable[..., Any] | None = None,
) -> _StepDecorator: ...
def step(function: Any = None, /, **given: Any) -> Any:
    """Make a function a step: executed once and recorded.

    `retry` is a policy of `retrying(…)`, none means that the first failure is final. `timeout` is in seconds.
    `on_crash` says what follows an execution that never answered: "retry" executes again with the same
    idempotency key, "hold" waits for a person. `verify` is called with the step's arguments before every
    execution but the first; it returns the result, or NOT_DONE. `raises` are the exception classes that a body
    gets back as they are; every other failure reaches it as StepFailed. `queue`: only workers of that queue execute it.
    `undo` is a step or a function that undoes it when its run fails or is cancelled: it is called with the step's
    arguments by their names, and with its result in the one parameter that has another name, if there is one.
    """
    return _decorated(_registered_step, function, given)


@overload
def transaction(function: staticmethod[Concatenate[S, P], R], /) -> Step[P, R]: ...
@overload
def transaction(function: classmethod[T, Concatenate[S, P], R], /) -> Step[P, R]: ...
@overload
def transaction(function: Callable[Concatenate[S, P], R], /) -> Step[P, R]: ...
@overload
def transaction(
    *,
    name: str | None = None,
    retry: RetryPolicy | None = None,
    timeout: float | timedelta | None = None,
    on_crash: options.OnCrash = "retry",
    raises: type[Exception] | tuple[type[Exception], ...] = (),
    queue: str | None = None,
    undo: Callable[..., Any] | None = None,
) -> _TransactionDecorator: ...
def transaction(function: Any = None, /, **given: Any) -> Any:
    """Make a function a step whose writes and whose record commit together: exactly once.

    Its first parameter, a connection or session of psycopg or SQLAlchemy, is filled in by the worker; it must
    neither commit nor roll back. The other options are those of `step`.
    """
    return _decorated(_registered_transaction, function, given)


@overload
def workflow(function: staticmethod[P, R], /) -> Workflow[P, R]: ...
@overload
def workflow(function: classmethod[T, P, R], /) -> Workflow[P, R]: ...
@overload
def workflow(function: Callable[P, R], /) -> Workflow[P, R]: ...
@overload
def workflow(
    *, name: str | None = None, queue: str = "default", strict: bool = False, version: str = ""
) -> _WorkflowDecorator: ...
def workflow(function: Any = None, /, **given: Any) -> Any:
    """Make a function a workflow: the deterministic plan of a run.

    `strict` blocks a run whose replay calls a recorded step with other arguments than before; else that is
    only counted. Runs of a `version` are advanced only by workers that have that version; several may stand side by
    side in one app.
    """
    return _decorated(_registered_workflow, function, given)


def _decorated(register: Callable[..., Any], function: Any, given: dict[str, Any]) -> Any:
    """Serve both `@step` and `@step(…)`."""
    return functools.partial(register, **given) if function is None else register(function, **given)


def _registered_step(function: Any, /, **given: Any) -> Step[..., Any]:
    made: Step[..., Any] = Step(function, **given)
    registry().add_step(made)
    if made.undo is not None and made.undo.name not in registry().steps:
        registry().add_step(made.undo)
    return made


def _registered_transaction(function: Any, /, **given: Any) -> Step[..., Any]:
    return _registered_step(function, transactional=True, **given)


def _registered_workflow(function: Any, /, **given: Any) -> Workflow[..., Any]:
    made: Workflow[..., Any] = Workflow(function, **given)
    registry().add_workflow(made)
    return made


def _unwrapped(decorated: Any, sort: str) -> tuple[Any, bool]:
    """Return the plain function under `decorated`, and whether it is a class method."""
    function = decorated.__func__ if isinstance(decorated, staticmethod | classmethod) else decorated
    if isinstance(function, Definition):
        raise ConfigError(
            f"{function.where}: {function.plain.__qualname__} is a {function.sort} already; it cannot be a {sort} too"
        )
    if not inspect.isfunction(function):
        raise ConfigError(f"@{sort} decorates functions written with def or async def, not {function!r}")
    return function, isinstance(decorated, classmethod) or (
        not isinstance(decorated, staticmethod) and _looks_like_class_method(function)
    )


def _looks_like_class_method(function: Any) -> bool:
    """Tell a `@step` that stands below `@classmethod`: it sees the plain function only."""
    in_class = "." in function.__qualname__.rpartition("<locals>.")[2]
    return in_class and next(iter(inspect.signature(function).parameters), "") == "cls"


def _holds(base: type, definition: Definition[..., Any]) -> bool:
    held = base.__dict__.get(definition.plain.__name__)
    return held is definition or getattr(held, "__func__", None) is definition
