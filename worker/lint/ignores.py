"""Comments that silence: `# stepwell: ignore[rule]`, several with commas, without brackets all rules."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

from worker.lint.findings import Found
from worker.lint.rules import RULES, UNKNOWN_RULE, UNUSED_IGNORE, Rule

_COMMENT = re.compile(r"#\s*stepwell:\s*ignore\b(?![-\w])(?:\s*\[([^\]]*)\])?", re.IGNORECASE)


@dataclass
class _Comment:
    """`rules` is None for all of them. `used` are those that it has silenced."""

    line: int
    column: int
    rules: tuple[str, ...] | None
    used: set[str] = field(default_factory=set)

    def silences(self, rule: str) -> bool:
        if self.rules is not None and rule not in self.rules:
            return False
        self.used.add(rule)
        return True


class Ignores:
    """The comments of one file, and which of them were of use."""

    def __init__(self, text: str) -> None:
        self._comments = {comment.line: comment for comment in _comments(text)}

    def silence(self, found: Found) -> bool:
        """Tell whether a comment on its line, or on the first line of its statement, silences `found`."""
        silent = False
        for line in {found.line, found.statement}:
            comment = self._comments.get(line)
            if comment is not None and comment.silences(found.rule.id):
                silent = True  # and the other one is of use as well
        return silent

    def leftovers(self, looked_at: Container[int]) -> Iterator[Found]:
        """Return what is wrong with the comments themselves, on the lines that were looked at."""
        for comment in self._comments.values():
            if comment.line in looked_at:
                yield from _leftovers(comment)


def _comments(text: str) -> Iterator[_Comment]:
    if "stepwell:" not in text.lower():
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        found = _COMMENT.search(token.string) if token.type == tokenize.COMMENT else None
        if found is not None:
            line, column = token.start
            rules = found[1]
            named = None if rules is None else tuple(dict.fromkeys(each.strip() for each in rules.split(",")))
            yield _Comment(line, column + found.start() + 1, named)


def _leftovers(comment: _Comment) -> Iterator[Found]:
    if comment.rules is None:
        if not comment.used:
            yield _found(comment, UNUSED_IGNORE, "`stepwell: ignore`")
        return
    unused = [name for name in comment.rules if name in RULES and name not in comment.used]
    for name in comment.rules:
        if name not in RULES:
            yield _found(comment, UNKNOWN_RULE, f"{name!r}" if name else "an empty name")
    if unused and UNUSED_IGNORE.id not in unused:
        yield _found(comment, UNUSED_IGNORE, f"`stepwell: ignore[{', '.join(unused)}]`")


def _found(comment: _Comment, rule: Rule, what: str) -> Found:
    return Found(rule, comment.line, comment.column, comment.line, f"{what} {rule.why}", rule.instead)
