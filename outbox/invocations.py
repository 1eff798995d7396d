"""From a call (`workflow, arguments`) to what is enqueued: a name and an input object as JSON text. Pure."""

from __future__ import annotations

from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

from typing_extensions import TypeVar

from outbox.codec import Signature, encode
from outbox.errors import ConfigError, PayloadError, UnknownWorkflow
from outbox.sealing import NO_KEYS, Keyring
from outbox.statements import Key, key_text, workflow_text

R_co = TypeVar("R_co", covariant=True, default=Any)
R = TypeVar("R", default=Any)
T = TypeVar("T")

MAX_CHUNK = 10_000
MAX_BATCH_BYTES = 8 * 1024 * 1024


class WorkflowLike(Protocol[R_co]):
    """What `@workflow` makes of a function, as far as a producer needs it. `R_co` is what a run of it gives."""

    @property
    def name(self) -> str: ...
    @property
    def signature(self) -> Signature: ...
    @property
    def queue(self) -> str: ...
    @property
    def version(self) -> str: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Coroutine[Any, Any, R_co] | R_co: ...


def function_of(workflow: WorkflowLike[R] | str) -> WorkflowLike[R] | None:
    """Return the workflow's function if it was not given by name."""
    return None if isinstance(workflow, str) else workflow


@dataclass(frozen=True, slots=True)
class Target:
    """The workflow to enqueue, given by function or by name.

    By function, arguments are checked and encoded by its signature. By name there is nothing to check them by;
    `published` (the JSON Schema of its input, if a worker has published one) names positional arguments.
    """

    name: str
    queue: str | None = None
    signature: Signature | None = None
    published: Mapping[str, Any] | None = None
    version: str | None = None
    """its own if it is given by function; None for the one that was published last"""
    keyring: Keyring = NO_KEYS

    @classmethod
    def of(cls, workflow: WorkflowLike[Any] | str, keyring: Keyring = NO_KEYS) -> Target:
        """Return the target for a workflow function or a name; raises ConfigError for anything else."""
        if isinstance(workflow, str):
            return cls(workflow_text(workflow), keyring=keyring)
        signature = getattr(workflow, "signature", None)
        if not isinstance(signature, Signature) or not hasattr(workflow, "queue"):
            shown = getattr(workflow, "__qualname__", None) or type(workflow).__qualname__
            raise ConfigError(
                f"{shown} is no workflow: decorate it with @workflow, or pass the name of one as a str"
            )
        return cls(workflow.name, workflow.queue, signature, version=workflow.version, keyring=keyring)

    def needs_names(self, args: tuple[Any, ...]) -> bool:
        """Tell whether these positional arguments can be named only by a published schema."""
        return self.signature is None and bool(args) and not (len(args) == 1 and isinstance(args[0], Mapping))

    def encode(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], max_bytes: int, where: str = ""
    ) -> str:
        """Return the input object as JSON text, sealed if there is a key; raises PayloadError naming the field."""
        text = self._encoded(args, kwargs, max_bytes, where or f"input of workflow {self.name!r}")
        return self.keyring.seal(text, "input", self.name)

    def _encoded(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], max_bytes: int, where: str) -> str:
        if self.signature is not None:
            return self.signature.encode_arguments(args, kwargs, where=where, max_bytes=max_bytes)
        if not args:
            return encode(dict(kwargs), where=where, max_bytes=max_bytes)
        if self.needs_names(args):
            return encode(self._named(args, kwargs, where), where=where, max_bytes=max_bytes)
        if kwargs:
            raise PayloadError(
                f"{where}: one mapping is the whole input, parameter name to value, so nothing can be added by "
                f"keyword ({', '.join(kwargs)})"
            )
        return encode(dict(args[0]), where=where, max_bytes=max_bytes)

    def knowing(self, schema: Mapping[str, Any] | None) -> Target:
        """Return this target with the published schema of its input."""
        return replace(self, published=schema)

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], where: str) -> dict[str, Any]:
        if self.published is None:
            raise UnknownWorkflow(
                f"no worker has published the parameters of workflow {self.name!r}, so positional arguments cannot "
                "be named: pass them by keyword, or one mapping of parameter name to value"
            )
        names = parameters_of(self.published)
        if len(args) > len(names):
            raise PayloadError(f"{where}: takes {len(names)} arguments ({', '.join(names)}), got {len(args)}")
        given = dict(zip(names, args, strict=False))
        if twice := [name for name in given if name in kwargs]:
            raise PayloadError(f"{where}: multiple values for {twice[0]!r}", field=twice[0])
        return {**given, **kwargs}


# -- many --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Batch:
    """What goes out in one round trip."""

    texts: list[str]
    keys: list[str | None]


def checked_chunk(chunk: int) -> int:
    """Return the number of items in a round trip, or raise ConfigError."""
    if type(chunk) is not int or not 1 <= chunk <= MAX_CHUNK:
        raise ConfigError(f"chunk must be 1 to {MAX_CHUNK:,}, got {chunk!r}")
    return chunk


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of `size`, reading no further ahead than that."""
    reading = iter(items)
    while chunk := list(islice(reading, size)):
        yield chunk


async def chunks_async(items: Iterable[T] | AsyncIterable[T], size: int) -> AsyncIterator[list[T]]:
    """Yield the items in lists of `size`, whether they come at once or one by one."""
    if not isinstance(items, AsyncIterable):
        for chunk in chunks(items, size):
            yield chunk
        return
    gathered: list[T] = []
    async for item in items:
        gathered.append(item)
        if len(gathered) == size:
            yield gathered
            gathered = []
    if gathered:
        yield gathered


def any_needs_names(target: Target, items: Sequence[Any]) -> bool:
    """Tell whether one of these items of `enqueue_many` can be named only by a published schema."""
    return target.signature is None and any(target.needs_names(_arguments(item)) for item in items)


def batches(
    target: Target, items: Sequence[Any], first: int, key: Callable[[Any], Key | None] | None, max_bytes: int
) -> Iterator[Batch]:
    """Yield the items encoded, with their keys, in batches of a bounded size; `first` is the number of the first.

    Raises PayloadError naming the item by its number, ``inputs[17]``.
    """
    texts: list[str] = []
    keys: list[str | None] = []
    size = 0
    for number, item in enumerate(items, first):
        where = f"inputs[{number}] of workflow {target.name!r}"
        text = target.encode(_arguments(item), {}, max_bytes, where)
        if texts and size + len(text) > MAX_BATCH_BYTES:
            yield Batch(texts, keys)
            texts, keys, size = [], [], 0
        texts.append(text)
        keys.append(None if key is None else _key_of(item, key, where))
        size += len(text)
    if texts:
        yield Batch(texts, keys)


def _arguments(item: Any) -> tuple[Any, ...]:
    """Return the positional arguments of one item: a tuple is all of them. A named tuple is one value, a row."""
    return item if type(item) is tuple else (item,)


def _key_of(item: Any, key: Callable[[Any], Key | None], where: str) -> str | None:
    try:
        return key_text(key(item))
    except PayloadError as error:
        raise PayloadError(f"{where}: {error}") from None


def parameters_of(schema: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the parameter names of an input schema, in the order of the function's parameters."""
    pointed = str(schema.get("$ref", "")).rpartition("/")[2]
    described = schema.get("$defs", {}).get(pointed, schema)
    return tuple(described.get("properties", {}))
