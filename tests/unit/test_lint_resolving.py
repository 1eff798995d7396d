"""Names mean what Python makes them mean: imports under any alias, and whatever hides them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.checked import findings, told


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


IMPORTED = [
    ("import time", "time.time()"),
    ("import time as t", "t.time()"),
    ("from time import time", "time()"),
    ("from time import time as clock", "clock()"),
    ("from time import *", "time()"),
    ("import datetime", "datetime.datetime.now()"),
    ("from datetime import datetime as dt, UTC", "dt.now(UTC)"),
    ("import datetime as d", "d.date.today()"),
    ("", "import time\n    time.time()"),
    ("", "from time import time\n    time()"),
    ("try:\n    from time import time\nexcept ImportError:\n    time = None", "time()"),
    ("import time\nclock = time.time", "clock()"),
    ("import time", "clock = time.time\n    clock()"),
    ("import time", "(clock := time.time)()"),
    ("import functools, time", "functools.partial(time.time)()"),
    ("import time", "max([1], key=lambda x: time.time())"),
]
HIDDEN = [
    ("import time", "def flow(time):", "time.time()"),
    ("import time", "def flow(*, time=None):", "time.time()"),
    ("import time", "def flow(*time):", "time.time()"),
    ("import time", "def flow(given):", "time = given\n    time.time()"),
    ("import time", "def flow(given):", "for time in given:\n        time.time()"),
    ("import time", "def flow(given):", "with given as time:\n        time.time()"),
    ("import time", "def flow(given):", "a, (time, *b) = given\n    time.time()"),
    ("import time", "def flow(given):", "[time.time() for time in given]"),
    ("import time", "def flow(given):", "(lambda time: time.time())(given)"),
    ("import time", "def flow(given):", "(time := given).time()"),
    ("import time", "def flow(given):", "match given:\n        case {'t': time}:\n            time.time()"),
    ("import time", "def flow(given):", "try:\n        pass\n    except E as time:\n        time.time()"),
    ("import time", "def flow(given):", "def time(): ...\n    time.time()"),
    ("import time", "def flow(given):", "def inner(time):\n        time.time()"),
    ("import time\nimport mine as time", "def flow(given):", "time.time()"),
    ("from mine import time", "def flow(given):", "time.time()"),
    ("from mine import datetime", "def flow(given):", "datetime.now()"),
    ("from mine import *", "def flow(given):", "time.time()"),
    ("from mine import open", "def flow(given):", "open('x')"),
    ("def open(name): ...", "def flow(given):", "open('x')"),
    ("def hash(name): ...", "def flow(given):", "hash('x')"),
    ("class time:\n    @staticmethod\n    def time(): ...", "def flow(given):", "time.time()"),
    ("", "def flow(given):", "time.time()"),
]
TYPED = [
    ("io", "path: Path", "path.read_text()"),
    ("io", "path: 'Path'", "path.read_text()"),
    ("io", "path: Path | None", "path.read_text()"),
    ("io", "path: Optional[Path] = None", "path.read_text()"),
    ("io", "path: Annotated[Path, 'x']", "path.read_text()"),
    ("io", "given", "path: Path = given\n    path.read_text()"),
    ("io", "given", "path = cast(Path, given)\n    path.read_text()"),
    ("io", "given", "path = Path(given)\n    (path / 'x').with_suffix('.y').open()"),
    ("io", "given", "path = None\n    if given:\n        path = Path(given)\n    path.open()"),
    ("set-order", "tags: AbstractSet[str]", "list(tags)"),
    ("set-order", "tags: frozenset[str] | set[str]", "list(tags)"),
    ("set-order", "lead: Lead", "list(lead.tags)"),
    ("set-order", "lead: Lead", "lead = Lead(given)\n    list(lead.tags)"),
    ("set-order", "lead: Lead", "list(lead.own)"),
    ("set-order", "given", "list(tags_of(given))"),
    ("set-order", "given", "tags = tags_of(given)\n    for tag in tags: pass"),
    ("set-order", "given", "tags = wait(find(given))\n    list(tags)"),
    ("io", "given", "lead = Lead(given)\n    lead.http.get('x')"),
]
UNTYPED = [
    ("given", "path: Path\n    path: Lead\n    path = given\n    path.read_text()"),
    ("path", "path.read_text()"),
    ("path: Path | Lead", "path.read_text()"),
    ("path: dict[str, Path]", "path.read_text()"),
    ("path: Path", "path = given(path)\n    path.read_text()"),
    ("path: PurePath", "path.read_text()"),
    ("tags: Iterable[str]", "list(tags)"),
    ("tags: list[set[str]]", "list(tags)"),
    ("lead: Lead", "list(lead.names)"),
    ("lead: Lead", "list(lead.unheard_of)"),
]
TYPES = """\
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import AbstractSet, Annotated, Optional, cast
import httpx
from worker import step, wait, workflow
class Lead:
    tags: set[str]
    names: list[str]
    def __init__(self, http: httpx.Client):
        self.http = http
        self.own = set()
def tags_of(given) -> set[str]: ...
@step
async def find(given) -> set[str]: ...
@workflow
"""


@pytest.mark.parametrize(("imports", "body"), IMPORTED)
def test_an_import_is_known_under_any_name(imports: str, body: str, tmp_path: Path) -> None:
    found = findings(
        tmp_path, f"from worker import workflow\n{imports}\n@workflow\ndef flow():\n    {body}\n"
    )
    assert [each.rule for each in found] == ["clock"]


@pytest.mark.parametrize(("imports", "signature", "body"), HIDDEN)
def test_what_hides_an_import_is_no_import(imports: str, signature: str, body: str, tmp_path: Path) -> None:
    text = f"from worker import workflow\n{imports}\n@workflow\n{signature}\n    {body}\n"
    assert told(findings(tmp_path, text)) == []


@pytest.mark.parametrize(("rule", "parameter", "body"), TYPED)
def test_annotations_and_constructors_tell_what_a_name_is(
    rule: str, parameter: str, body: str, tmp_path: Path
) -> None:
    found = findings(tmp_path, f"{TYPES}def flow({parameter}):\n    {body}\n")
    assert [each.rule for each in found] == [rule]


@pytest.mark.parametrize(("parameter", "body"), UNTYPED)
def test_what_cannot_be_told_is_not_told(parameter: str, body: str, tmp_path: Path) -> None:
    assert told(findings(tmp_path, f"{TYPES}def flow({parameter}):\n    {body}\n")) == []


@pytest.mark.parametrize(
    "defined",
    [
        "from worker import workflow\n@workflow\ndef flow():",
        "from worker import workflow as wf\n@wf\nasync def flow():",
        "from worker import workflow\n@workflow(name='x', queue='q')\nasync def flow():",
        "import worker\n@worker.workflow\ndef flow():",
        "import worker as w\n@w.workflow()\ndef flow():",
        "from worker import *\n@workflow\ndef flow():",
        "from worker.definitions import workflow\n@workflow\ndef flow():",
        "from functools import partial\nfrom worker import workflow\nmine = partial(workflow, queue='q')\n@mine()\ndef flow():",
        "from worker import workflow\nmine = workflow(queue='q')\n@mine\ndef flow():",
        "from worker import workflow\ndef mine(f):\n    return workflow(queue='q')(f)\n@mine\ndef flow():",
        "from shop import workflow\n@workflow\ndef flow():",
    ],
)
def test_a_workflow_is_one_under_any_name(defined: str, tmp_path: Path) -> None:
    files = {
        "flows.py": f"{defined}\n    open('x')\n",
        "shop.py": "from worker import workflow\n",
    }
    assert [each.rule for each in findings(tmp_path, files)] == ["io"]


def test_workflows_are_found_in_classes_functions_and_assignments(tmp_path: Path) -> None:
    text = """\
    from worker import workflow
    class Onboarding:
        @workflow
        @staticmethod
        def one():
            open("1")
        @classmethod
        @workflow
        def two(cls):
            open("2")
            cls.helper()
        @classmethod
        def helper(cls):
            open("3")
    def make():
        @workflow
        def three():
            open("4")
        return three
    def plain():
        open("5")
    four = workflow(name="four")(plain)
    def never():
        open("6")
    """
    found = findings(tmp_path, text)
    assert told(found) == ["6 io", "10 io", "14 io", "18 io", "21 io"]
    assert found[2].by_way_of == ("Onboarding.helper",)
    assert found[2].workflow is not None
    assert found[2].workflow.name == "Onboarding.two"


@pytest.mark.parametrize(
    "defined",
    [
        "@step\ndef effect():",
        "@step(timeout=3)\ndef effect():",
        "@transaction\ndef effect(session: Session):",
        "@worker.step\ndef effect():",
        "@mine\ndef effect():",
        "@partly(timeout=3)\ndef effect():",
        "@own\ndef effect():",
        "@elsewhere.activity\ndef effect():",
        "@own_class()\ndef effect():",
    ],
)
def test_steps_and_what_may_be_one_are_left_alone(defined: str, tmp_path: Path) -> None:
    text = f"""\
import functools
import elsewhere
import worker
from sqlalchemy.orm import Session
from worker import step, transaction, workflow
mine = step(timeout=3)
partly = functools.partial(step, on_crash="hold")
def own(function):
    @functools.wraps(function)
    def inner(*args):
        return function(*args)
    return step(inner)
class own_class:
    def __call__(self, function):
        return step(function)
@workflow
def flow():
    effect()
{defined}
    open("x")
"""
    assert told(findings(tmp_path, text)) == []
