"""What is looked for, and what to write instead."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rule:
    """`id` is what comments name; `why` follows what was found, `instead` says what to do."""

    id: str
    finds: str
    why: str
    instead: str


_STEP = "do it in a @step, whose result is recorded"

CLOCK = Rule(
    "clock",
    "clocks: time.time, datetime.now, date.today, …",
    "gives another time in every replay",
    "use now() of Stepwell",
)
RANDOM = Rule(
    "random",
    "randomness: random, secrets, uuid.uuid4, os.urandom, numpy.random, …",
    "gives something else in every replay",
    "use random() of Stepwell, or a generator that is seeded by it: Random(random())",
)
ENVIRONMENT = Rule(
    "environment",
    "the machine and the process: os.environ, sys.argv, platform, os.getpid, …",
    "differs between the machines that replay",
    "pass it in as input, or read it in a @step",
)
IO = Rule(
    "io",
    "files, the network, databases, subprocesses",
    "is done again in every replay",
    _STEP,
)
BLOCKING = Rule(
    "blocking",
    "real waiting: time.sleep, input, queues, locks, futures",
    "holds up every run of the worker and waits again in every replay",
    _STEP,
)
ASYNCIO = Rule(
    "asyncio",
    "primitives of asyncio, anyio and trio",
    "needs an event loop, and a body has none",
    _STEP,
)
THREAD = Rule(
    "thread",
    "threads, processes and pools",
    "deals with what runs beside the body, in an order that no replay repeats",
    _STEP,
)
GLOBAL_STATE = Rule(
    "global-state",
    "changing what is global: module-level names, attributes of modules and classes",
    "which other runs and every replay in this process share",
    "keep it in a local variable, or in the database by a @step",
)
SET_ORDER = Rule(
    "set-order",
    "iterating over a set",
    "whose order differs between processes",
    "sort it first: sorted(…)",
)
HASH = Rule(
    "hash",
    "hash() and id()",
    "differs between processes",
    "use a value of your own, or hashlib",
)
FINALLY = Rule(
    "finally",
    "calls of steps in finally, or where BaseException is caught",
    "which also runs each time the run is parked",
    "call it after the try, and in an except Exception for failures",
)
NOT_AWAITED = Rule(
    "not-awaited",
    "async steps and sleeps that are called and never awaited",
    "is called and never awaited, so it does not happen",
    "await it",
)
UNKNOWN_RULE = Rule(
    "unknown-rule",
    "a comment that ignores a rule which does not exist",
    "is no rule",
    "`stepwell check --rules` lists them",
)
UNUSED_IGNORE = Rule(
    "unused-ignore",
    "a comment that ignores what is not there",
    "silences nothing here",
    "take it out",
)

RULES = {
    rule.id: rule
    for rule in (
        CLOCK, RANDOM, ENVIRONMENT, IO, BLOCKING, ASYNCIO, THREAD, GLOBAL_STATE, SET_ORDER, HASH, FINALLY,
        NOT_AWAITED, UNKNOWN_RULE, UNUSED_IGNORE,
    )
}  # fmt: skip
