"""Read a Dockerfile: as much of the language as ours uses. What it does not know is an error, not a guess."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

KNOWN = frozenset(
    {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: `flags` are its --name=value, `text` is the rest."""

    word: str
    flags: dict[str, str]
    text: str

    @property
    def arguments(self) -> list[str]:
        """Return the words, of the JSON form as well."""
        return (
            [str(each) for each in json.loads(self.text)] if self.text.startswith("[") else self.text.split()
        )


@dataclass(slots=True)
class Stage:
    """What follows one FROM."""

    image: str
    name: str
    steps: list[Instruction] = field(default_factory=list)

    def last(self, word: str) -> Instruction:
        """Return the instruction of this kind that counts."""
        return [each for each in self.steps if each.word == word][-1]


@dataclass(slots=True)
class Dockerfile:
    """The stages in their order, and the arguments before the first one."""

    arguments: dict[str, str]
    stages: list[Stage]

    @classmethod
    def parse(cls, text: str) -> Dockerfile:
        """Read a Dockerfile's text."""
        made = cls({}, [])
        for each in _instructions(text):
            match each.word:
                case "ARG" if not made.stages:
                    name, _, default = each.text.partition("=")
                    made.arguments[name] = default
                case "FROM":
                    image, *named = each.arguments
                    made.stages.append(Stage(substituted(image, made.arguments), named[1] if named else ""))
                case _:
                    made.stages[-1].steps.append(each)
        return made


def substituted(text: str, variables: dict[str, str]) -> str:
    """Replace ${NAME}. A name that is not known is an error."""
    return re.sub(r"\$\{(\w+)\}", lambda found: variables[found[1]], text)


def pairs(text: str) -> dict[str, str]:
    """Read what follows ENV, as NAME=VALUE."""
    return dict(word.split("=", 1) for word in text.split())


def _instructions(text: str) -> list[Instruction]:
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    made = []
    for line in re.sub(r"\\\n\s*", "", kept).splitlines():
        if not line.strip():
            continue
        word, rest = line.split(None, 1)
        flags: dict[str, str] = {}
        while found := re.match(r"--([a-z-]+)=(\S+)\s+", rest):
            flags[found[1]] = found[2]
            rest = rest[found.end() :]
        if word not in KNOWN:
            raise ValueError(f"the rehearsal does not know {word}: teach it in {__file__}")
        made.append(Instruction(word, flags, rest.strip()))
    return made
