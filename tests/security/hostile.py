"""Values, texts and JSON that nobody sends by accident: what the fuzzing tests draw from."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

TEXTS = [
    "", " ", "'", '"', "''", "\\", "\\'", "$$", "$1", "%s", "%(name)s", "{}", "{0.__class__}", "%n%n%n", "#{x}", "${HOME}",
    "`id`", "$(id)", "; drop schema stepwell cascade; --", "'; select pg_sleep(9); --", "/*", "*/", "--", "-x", "--help",
    "\0", "a\0b", "\x01", "\x07", "\x08", "\t", "\n", "\r", "\r\n", "\x1b[2J", "\x1b]0;title\x07", "\x1b[31m", "\x7f",
    "\x85", "\x9b31m", "\u2028", "\u2029", "\u202e", "\u200b", "\u200d", "\ufeff", "\ufffe", "\uffff", "\U000e0001",
    "\ud800", "\udfff", "a\ud83d", "\udcff", "👩‍👩‍👧", "é", "e\u0301", "ﷺ", "🕳" * 100, "[bold]x[/bold]", "[/]", ":smile:",
    "stepwell", "stepwell:", "stepwell:child", "stepwell:sealed", "step:work", "w@1", "@", "../../etc/passwd", "NULL",
    "null", "true", "NaN", "Infinity", "1e400", "-0", "{}", "[]", '{"a": 1}', "x" * 255, "x" * 256, "é" * 128, "x" * 513,
    "\N{ZERO WIDTH NO-BREAK SPACE}", "__proto__", "constructor", "__class__",
]  # fmt: skip
"""Each is tried by itself; hypothesis adds what it finds."""

JSON_TEXTS = [
    '"\\u0000"', '"a\\u0000b"', '"\\ud800"', '"\\ud800\\u0041"', '"\\udc00\\ud800"', '{"\\u0000": 1}', '{"\\ud800": 1}',
    "1e400", "-1e400", "1e-400", "-0", "-0.0", "0.1e1", "1E+2", "9007199254740993", "18446744073709551616",
    "9" * 400, "9" * 5000, "-" + "9" * 5000, "0." + "9" * 5000, "1e99999999999999999999",
    "[" * 900 + "]" * 900, "[" * 1100 + "]" * 1100, '{"a":' * 1500 + "1" + "}" * 1500,
    '{"a": 1, "a": 2}', '{"": 1}', '{"a": {"a": {"a": null}}}', "null", "true", '""', "[]", "{}", "[[], {}, null]",
    '{"stepwell:sealed": {"k": "1", "d": "AA=="}}', '{"stepwell:sealed": 1}', '{"stepwell:forgotten": true}',
    '{"__class__": "os.system", "args": ["id"]}', '"\\u001b[2J"', '"\\u009b31m"', '"\\u202e"', '"\x7f"', '"\u009b2J"',
    ' \t\n{ "a" :\r 1 } ', '"' + "x" * 200_000 + '"', "[" + "0," * 20_000 + "0]",
]  # fmt: skip
"""Valid for Postgres, every one of them, and not what a reader may expect."""

texts = st.sampled_from(TEXTS) | st.text(st.characters(), max_size=40)  # with half characters
storable = texts.filter(lambda text: "\0" not in text and _is_whole(text))

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts
    | st.sampled_from([2**53 + 1, 10**400, -(10**400), 1e308, 5e-324, -0.0]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
"""What Python has and JSON may not have."""

json_texts = st.sampled_from(JSON_TEXTS) | st.builds(
    lambda value: json.dumps(value, allow_nan=False),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | storable,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(storable, inner, max_size=4),
        max_leaves=8,
    ),
)


def bounded(examples: int) -> Any:
    """Return the settings of a test that talks to a database: the same examples each time, and not for long."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
        ],
    )


def drives_a_terminal(text: str) -> str:
    """Return the characters of an output that a terminal would not print but obey, besides line ends."""
    return "".join(sorted({c for c in text if c != "\n" and not c.isprintable()} - set("\u200c\u200d")))


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
