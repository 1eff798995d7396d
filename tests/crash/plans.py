"""What the runs of `chaos_flows` have to come to, and how many of them there are of each.

Apart from it, so that whoever asks does not define those workflows in a process of its own.
"""

from __future__ import annotations

from tests.crash.checker import Plan

MANY = 20

PLANS: dict[str, Plan] = {
    "short": lambda _: ["greet", "book"],
    "plain": lambda _: ["count", "book"],
    "long": lambda _: ["greet", "count"] * MANY + ["book"],
    "stumbling": lambda _: ["stumble"] * 3,
    "sleepy": lambda _: ["greet", "book"],
    "careful": lambda _: ["pay", "fire"],
    "fanning": lambda _: ["greet", "count", "book"] + ["greet"] * MANY + ["count"],
    "parent": lambda _: ["count"],
    "waiting": lambda _: ["greet", "book"],
}

SHARES = {
    "short": 30, "plain": 15, "long": 3, "stumbling": 12, "sleepy": 12, "careful": 8, "fanning": 4, "parent": 8,
    "waiting": 8,
}  # fmt: skip
"""How many of a hundred runs are of which workflow."""
