"""The calls that a body can make: awaitables that are performed when they are awaited, once.

A call says what it asks for (`decision`), and what an answer means (`outcome`); where it stands in the body, and
whether it is recorded, is the drive's concern. It can be one branch of a join as it is.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple
from uuid import UUID

from outbox.codec import decode, decode_fault, fingerprint
from outbox.errors import HistoryMismatch, PayloadError, RunCancelled, RunFailed
from worker.replay.cursor import described, mismatch
from worker.replay.decisions import Asked, AwaitChild, DoStep, Sleep, TakeSignal
from worker.replay.records import Path, Record, dotted

if TYPE_CHECKING:
    from worker.context import Drive
    from worker.definitions import Step, Workflow


class Misfit(HistoryMismatch):
    """A recorded value that the annotation of its call does not take."""


class Call:
    """A call that a body holds in its hand. One that it drops without awaiting it is told to the drive."""

    __slots__ = ("_drive", "_performed")

    kind: ClassVar[str]
    name: str
    """The name under which it is recorded."""
    mark: int | None = None
    """The fingerprint of its arguments, if it has any; known once it was asked."""
    _drive: Drive
    _performed: bool

    def __await__(self) -> Generator[Any, Any, Any]:
        yield from ()  # makes this a generator, which a call needs no more: it switches away instead
        return self.perform()

    def __del__(self) -> None:
        if not self._performed and not self._drive.discarding():
            self._drive.forgotten(self.what())

    def perform(self) -> Any:
        """Make the call, and return its value."""
        if self._performed:
            self.once()
        self._performed = True
        return self._drive.perform(self)

    def once(self) -> None:
        """Take note that the call is made now; raise RuntimeError if it was before."""
        if self._performed:
            raise RuntimeError(f"{self.what()} was awaited already; call it again to make another call")
        self._performed = True

    def what(self) -> str:
        """Return what is called, for messages."""
        raise NotImplementedError

    # -- for the drive

    def ask(self, path: Path) -> None:
        """Encode what it is called with at a path. Raises PayloadError."""

    def decision(self, path: Path, earlier: tuple[Record, ...]) -> Asked:
        """Return what has to be done for it. `earlier` are the recorded executions that did not complete it."""
        raise NotImplementedError

    def outcome(self, record: Record) -> Any:
        """Return the recorded value, or raise the recorded error. Raises HistoryMismatch for any other record."""
        raise NotImplementedError


class StepCall(Call):
    """The call of a step."""

    __slots__ = ("_args", "_kwargs", "arguments", "mark", "name", "step")

    kind = "step"

    def __init__(
        self, drive: Drive, step: Step[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._performed = False
        self._drive = drive
        self.step = step
        self.name = step.name
        self._args = args
        self._kwargs = kwargs

    def what(self) -> str:
        """Return the name of the step."""
        return f"step {self.name!r}"

    def ask(self, path: Path) -> None:  # noqa: ARG002 - who executes it records what it does not take
        """Encode the arguments. Raises PayloadError."""
        step = self.step
        self.arguments = step.signature.encode_arguments(self._args, self._kwargs, where=step.arguments_where)
        self.mark = fingerprint(self.arguments)

    def decision(self, path: Path, earlier: tuple[Record, ...]) -> DoStep:
        """Return the execution of the step."""
        mark = self.mark
        assert mark is not None, "a call is asked before it is decided upon"
        drift = bool(earlier) and any(each.fingerprint not in (None, mark) for each in earlier)
        return DoStep(path, self.step, self.arguments, mark, earlier, drift)

    def outcome(self, record: Record) -> Any:
        """Return the step's result, or raise its error."""
        step = self.step
        if record.outcome != "completed":
            raise _failure(record, step.raises)
        try:
            return step.signature.decode_result(record.value or "null", where=step.result_where)
        except PayloadError as error:
            again = f"`stepwell runs resolve {self._drive.facts.id} {dotted(record.path)} --value …`"
            raise _misfit(error, step, f"; if a person gave it, {again} gives another") from error


class UndoCall(StepCall):
    """The undo of a completed step. Its arguments are JSON already."""

    __slots__ = ()

    def __init__(self, drive: Drive, step: Step[Any, Any], arguments: str) -> None:
        super().__init__(drive, step, (), {})
        self.arguments = arguments

    def ask(self, path: Path) -> None:  # noqa: ARG002 - as above
        """Take the arguments as they are."""
        self.mark = fingerprint(self.arguments)

    def outcome(self, record: Record) -> None:
        """Return nothing: nobody looks at what an undo returns."""
        if record.outcome != "completed":
            raise _failure(record, ())


class SleepCall(Call):
    """The call of a durable sleep."""

    __slots__ = ("_seconds", "_until")

    kind = "sleep"
    name = "sleep"

    def __init__(self, drive: Drive, seconds: float | None, until: datetime | None) -> None:
        self._performed = False
        self._drive = drive
        self._seconds = seconds
        self._until = until

    def what(self) -> str:
        """Return what it is, there is no name."""
        return "a sleep"

    def decision(self, path: Path, earlier: tuple[Record, ...]) -> Sleep:  # noqa: ARG002 - it has no executions
        """Return the wait."""
        return Sleep(path, self._seconds, self._until)

    def outcome(self, record: Record) -> None:
        """Return when the sleep is over."""


class SignalCall(Call):
    """The wait for a signal."""

    __slots__ = ("_seconds", "_type", "name")

    kind = "signal"

    def __init__(self, drive: Drive, name: str, seconds: float | None, type_: Any) -> None:
        self._performed = False
        self._drive = drive
        self.name = name
        self._seconds = seconds
        self._type = type_

    def what(self) -> str:
        """Return what is waited for."""
        return f"wait_signal({self.name!r})"

    def decision(self, path: Path, earlier: tuple[Record, ...]) -> TakeSignal:  # noqa: ARG002 - it has no executions
        """Return the wait."""
        return TakeSignal(path, self.name, self._seconds)

    def outcome(self, record: Record) -> Any:
        """Return the payload, or raise TimeoutError."""
        if record.outcome == "failed":
            raise TimeoutError((record.error or {}).get("message", ""))
        return decode(record.value or "null", self._type, where=f"the payload of signal {self.name!r}")


class ChildCall(Call):
    """The call of a workflow: a run of its own, which the body waits for.

    `of` is the path of the call that has started it, if that was `start`.
    """

    __slots__ = ("_args", "_kwargs", "_of", "_workflow", "input", "name")

    kind = "child"

    def __init__(
        self,
        drive: Drive,
        workflow: Workflow[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        of: Path | None = None,
    ) -> None:
        self._performed = False
        self._drive = drive
        self._workflow = workflow
        self.name = workflow.name
        self._args = args
        self._kwargs = kwargs or {}
        self._of = of
        self.input = ""

    def what(self) -> str:
        """Return the name of the workflow."""
        return f"workflow {self.name!r}"

    def ask(self, path: Path) -> None:
        """Encode the input. Raises PayloadError, unless what has become of the child is recorded: then it fitted once."""
        if self._of is not None:
            return
        try:
            self.input = input_of(self._workflow, self._args, self._kwargs)
        except PayloadError:
            if not self._drive.is_recorded(path):
                raise

    def decision(self, path: Path, earlier: tuple[Record, ...]) -> AwaitChild:  # noqa: ARG002 - it has no executions
        """Return the wait for the child, which is made first unless it was started."""
        return AwaitChild(path, self._workflow, self.input, self._of or path, starts=self._of is None)

    def outcome(self, record: Record) -> Any:
        """Return the child's output, or raise RunFailed or RunCancelled."""
        workflow = self._workflow
        if self._of is not None:
            self._drive.answered(self._of, record)
        if record.outcome == "completed":
            try:
                return workflow.signature.decode_result(record.value or "null", where=workflow.result_where)
            except PayloadError as error:
                raise _misfit(error, workflow) from error
        said = record.error or {}
        data = said.get("data") or {}
        kind = RunCancelled if said.get("type") == "RunCancelled" else RunFailed
        raise kind(UUID(data["run"]), data.get("error"))


class Started:
    """A child that the body has started: await it for its result, any number of times.

    Each await is a call with a path and a record of its own. The child tells its result once; what later awaits, and others
    at the same time, are answered with is what is recorded of the first (`Drive.answered`).
    """

    __slots__ = ("_drive", "_workflow", "path")

    def __init__(self, drive: Drive, workflow: Workflow[..., Any], path: Path) -> None:
        self._drive = drive
        self._workflow = workflow
        self.path = path

    def __await__(self) -> Generator[Any, Any, Any]:
        return self.result().__await__()

    def result(self) -> ChildCall:
        """Return the call that waits for it, for joins."""
        return ChildCall(self._drive, self._workflow, of=self.path)


Mode = Literal["all", "settled", "first"]


class First(NamedTuple):
    """What came first of several calls: which one, counted from 0, and its value."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody wants of a pair
    value: Any


class JoinCall(Call):
    """Several branches at once: calls, and coroutines that make calls.

    all      the values of all, in the order of the branches; the first failure is raised, and nobody waits for the rest
    settled  the values and the errors of all
    first    the value of whichever ends first, or its error
    """

    __slots__ = ("as_list", "branches", "limit", "mode")

    kind = "join"

    def __init__(
        self,
        drive: Drive,
        branches: Iterable[Any],
        mode: Mode,
        *,
        limit: int | None = None,
        as_list: bool = False,
    ) -> None:
        self._performed = False
        self._drive = drive
        self.branches = [each.result() if isinstance(each, Started) else each for each in branches]
        self.mode = mode
        self.limit = limit
        self.as_list = as_list

    def what(self) -> str:
        """Return what it is, there is no name."""
        return "first(…)" if self.mode == "first" else "map(…)" if self.as_list else "gather(…)"

    def perform(self) -> Any:
        """Run the branches side by side and return what they come to."""
        self.once()
        return self._drive.join(self)


def input_of(workflow: Workflow[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return the input of a run as JSON text. Raises PayloadError for what its workflow does not take.

    Asked before it goes out, by decoding it: a run whose input cannot be decoded is blocked for ever.
    """
    text = workflow.signature.encode_arguments(args, kwargs, where=workflow.arguments_where)
    workflow.signature.check_input(text, where=workflow.arguments_where)
    return text


def _failure(record: Record, raises: tuple[type[Exception], ...]) -> BaseException:
    if record.outcome != "failed":
        return mismatch(described(record), "a call that can only complete or fail")
    return decode_fault(record.error or {}, raises)


def _misfit(error: PayloadError, definition: Step[Any, Any] | Workflow[..., Any], advice: str = "") -> Misfit:
    return Misfit(
        f"{error}; the recorded value stands, so mend the annotation of {definition.where}{advice}",
        expected=str(definition.signature.returns),
        got="a recorded value of another type",
    )
