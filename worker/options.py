"""Check what is given to `@step(…)`, `@transaction(…)` and `@workflow(…)`. Each raises ConfigError with the reason."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal

from outbox.codec import has_encodable_form
from outbox.errors import ConfigError
from worker.retries import RetryPolicy

OnCrash = Literal["retry", "hold"]


def name(given: Any, default: str) -> str:
    """Return the name of a definition, by default the qualified name of its function in its module."""
    chosen = default.rpartition("<locals>.")[2] if given is None else given
    if not isinstance(chosen, str) or not chosen.strip() or not chosen.isprintable():
        raise ConfigError(f"name= takes a printable text, got {given!r}")
    if "@" in chosen or chosen.startswith("step:"):
        raise ConfigError(
            f"a name has no @, which stands before a version, and does not begin with step:, got {chosen!r}"
        )
    return chosen


def queue(given: Any) -> str:
    """Return the name of a queue."""
    if not isinstance(given, str) or not given.strip() or not given.isprintable():
        raise ConfigError(f"queue= takes the name of a queue, got {given!r}")
    return given


def version(given: Any) -> str:
    """Return the version of a workflow, '' for none."""
    if not isinstance(given, str) or not given.isprintable() or given.strip() != given or "@" in given:
        raise ConfigError(f"version= takes a printable text without @, got {given!r}")
    return given


def retry(given: Any) -> RetryPolicy | None:
    """Return a retry policy, or None for no retry."""
    if given is None or isinstance(given, RetryPolicy):
        return given
    raise ConfigError(f"retry= takes retrying(stop=…, wait=…, on=…), got {given!r}")


def timeout(given: Any) -> float | None:
    """Return a timeout in seconds, or None for no limit."""
    if given is None:
        return None
    seconds = given.total_seconds() if isinstance(given, timedelta) else given
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise ConfigError(f"timeout= takes a positive number of seconds or a timedelta, got {given!r}")
    return float(seconds)


def on_crash(given: Any) -> OnCrash:
    """Return what follows an execution that never answered."""
    if given == "retry":
        return "retry"
    if given == "hold":
        return "hold"
    raise ConfigError(f'on_crash= takes "retry" or "hold", got {given!r}')


def verify(given: Any, parameters: Sequence[inspect.Parameter]) -> Callable[..., Any] | None:
    """Return a function that can be called with the arguments of a step that has these parameters."""
    if given is None:
        return None
    function: Any = given.__func__ if isinstance(given, staticmethod) else given
    if not inspect.isroutine(function):
        raise ConfigError(f"verify= takes a plain function of the step's parameters, got {given!r}")
    positional = [each for each in parameters if each.kind is not each.KEYWORD_ONLY]
    keywords = {each.name: each for each in parameters if each.kind is each.KEYWORD_ONLY}
    try:
        inspect.signature(function).bind(*positional, **keywords)
    except TypeError as error:
        raise ConfigError(
            f"verify= is called with the arguments of the step and cannot take them: {error}"
        ) from None
    return function


def raises(given: Any) -> tuple[type[Exception], ...]:
    """Return exception classes that a body can be given as they are."""
    classes = given if isinstance(given, tuple) else (given,)
    for each in classes:
        if not (isinstance(each, type) and issubclass(each, Exception)):
            raise ConfigError(f"raises= takes exception classes, got {each!r}")
        if not has_encodable_form(each):
            raise ConfigError(
                f"raises= takes classes that can be rebuilt, and {each.__qualname__} has no encodable form; "
                "make it a dataclass, or give it to_payload() and the class method from_payload(data)"
            )
    return classes
