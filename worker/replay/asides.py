"""What a body asks and tells beside its calls: the time, chance, patches, state, streams, children that it starts.

None of it is recorded one by one. The time is that of the last record delivered, chance is drawn from the run's seed,
and what is told goes out with the next write (`worker.replay.effects`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn
from uuid import UUID

from greenlet import getcurrent  # type: ignore[import-untyped]  # ships no types

from outbox.codec import encode
from outbox.errors import NotDeterministic
from worker.replay.calls import ChildCall, Started, input_of
from worker.replay.course import Course
from worker.replay.cursor import mismatch
from worker.replay.effects import Effects, Emitted, Starting
from worker.replay.frames import calling_line
from worker.replay.guards import Guard
from worker.replay.records import Path, Record, RunFacts

if TYPE_CHECKING:
    from worker.definitions import Workflow


class ContinuedError(BaseException):
    """Unwinds a body that has asked to start anew."""


class Asides(Course):
    """A course with what happens beside it. `attempted`: an earlier claim may have come to the first call."""

    __slots__ = (
        "_answers",
        "_attempted",
        "_begun",
        "_draws",
        "_emitted",
        "_held_back",
        "_patches",
        "_successor",
    )

    def __init__(
        self,
        workflow: Workflow[..., Any],
        facts: RunFacts,
        history: Sequence[Record],
        driven: int,
        attempted: bool,
        guard: Guard,
    ) -> None:
        super().__init__(workflow, facts, history, driven, guard)
        self._attempted = attempted
        self._draws = self._emitted = 0
        self._successor: str | None = None
        self._held_back: dict[Path, Starting] = {}
        self._begun: set[Path] = set()
        self._answers: dict[Path, Record] = {}
        self._patches: dict[str, bool] = dict.fromkeys(self._cursor.patches, True)

    def take_effects(self) -> Effects | None:
        """Return what the body has done beside its calls since the last drive that is written down, once."""
        if self._held_back and not self._main_strand.ended:
            self._told().starting += self._held_back.values()
            self._held_back.clear()
        effects, self._effects = self._effects, None
        return effects

    def now(self) -> datetime:
        """Return the time of the last record delivered, before any that of the run's creation."""
        return self._now

    def random(self) -> float:
        """Return the next number in [0, 1)."""
        return (int.from_bytes(self._drawn()[:8], "big") >> 11) * 2.0**-53

    def uuid(self) -> UUID:
        """Return the next UUID (version 4)."""
        return UUID(bytes=self._drawn(), version=4)

    def patched(self, name: str, *, retired: bool = False) -> bool:
        """Tell whether this run takes the way that a patch of its code has opened."""
        known = self._patches.get(name)
        if known is None:
            # What an earlier drive came to, it came to with the code before the patch.
            untouched = self.fresh and not (self._attempted and self._seq == 0 and not self._live)
            if self._driven < 0:  # of a run that was retried, rewound or forked only its records tell
                untouched = untouched and self._cursor.left_over() is None
            known = self._patches[name] = untouched
            if untouched:
                self._told().patches.append((len(self._cursor.patches) + 1, name))
                self._cursor.patches.add(name)
        if retired and not known:
            self._block(
                mismatch(
                    f"what the code did before the patch {name!r}", f"retire_patch({name!r})", calling_line()
                )
            )
        return known

    def show(self, key: str, value: Any) -> None:
        """Show `value` under `key` to whoever looks at the run."""
        text = encode(value, where=f"the state {key!r}")
        if self.fresh:
            self._told().states[key] = text

    def emit(self, name: str, value: Any) -> None:
        """Append a value to a stream of the run."""
        text = encode(value, where=f"what is emitted to {name!r}")
        self._emitted += 1
        if self.fresh:
            self._told().emitted.append(Emitted(self._emitted, name, text))

    def begin_child(
        self, workflow: Workflow[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, detached: bool,
        deadline: float | None,
    ) -> Started:  # fmt: skip
        """Have a child made, and return what stands for it. It takes a path, though nothing is recorded there.

        Raises PayloadError.
        """
        strand = self._strand
        if self._stop is not None or strand.closing or getcurrent() is not strand.body:
            self._refuse(workflow.name)
        call = ChildCall(self, workflow, args, kwargs)
        call.once()
        call.ask(())  # nothing is recorded of a start
        path = strand.next_path()
        if self.fresh:
            self._begun.add(path)
            starting = Starting(path, workflow, call.input, detached, deadline)
            if self._driven < 0 and self._cursor.left_over() is not None:
                self._held_back[path] = starting
            else:
                self._told().starting.append(starting)
        return Started(self, workflow, path)

    def answered(self, of: Path, record: Record) -> None:
        """Take note that what has become of the child begun at a path is recorded, for whoever else waits for it.

        In a run that was retried, rewound or forked it is not begun again for that.
        """
        self._held_back.pop(of, None)
        self._answers[of] = record

    def begin_nobody(self) -> None:
        """Have no child begun by this drive: it goes on where all were begun that ever will be."""
        self._held_back.clear()
        if self._effects is not None:
            self._effects.starting.clear()

    def begins(self, of: Path) -> bool:
        """Tell whether the child of a path is begun in this drive: what is known of its failure is of before a retry."""
        return of in self._begun

    def has_answers(self) -> bool:
        """Tell whether something is recorded of any child that was begun."""
        return bool(self._answers)

    def answer(self, of: Path) -> Record | None:
        """Return what is recorded of the child begun at a path, None if that is nothing yet."""
        return self._answers.get(of)

    def continue_as(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        """End this history; the run starts anew with these arguments. Raises PayloadError."""
        if getcurrent() is not self._main_strand.body:
            raise NotDeterministic(
                f"{calling_line()}: continue_as() ends the whole run, so call it in the body itself"
            )
        self._successor = input_of(self._workflow, args, kwargs)
        raise ContinuedError

    def _drawn(self) -> bytes:
        self._draws += 1
        return hashlib.blake2b(f"{self.facts.seed}:{self._draws}".encode(), digest_size=16).digest()
