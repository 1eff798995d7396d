"""From a body into its helper functions, within its package and not beyond."""

from __future__ import annotations

from pathlib import Path

import pytest

from outbox.errors import ConfigError
from tests.unit.checked import findings, told, written
from worker.lint import check

FLOW = "from worker import workflow\n"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_finding_in_a_helper_tells_the_way_to_it(tmp_path: Path) -> None:
    (found,) = findings(
        tmp_path,
        """\
        import time
        from worker import workflow

        def stamp():
            return time.time()

        def prepare(lead):
            return lead, stamp()

        @workflow
        def welcome_lead(lead):
            prepare(lead)
        """,
    )
    assert (found.line, found.by_way_of) == (5, ("prepare", "stamp"))
    assert found.message.endswith(
        "; reached from workflow welcome_lead (flows.py:11) by way of prepare(), stamp()"
    )


def test_a_long_way_is_shortened(tmp_path: Path) -> None:
    chain = "\n".join(f"def f{n}():\n    f{n + 1}()" for n in range(5))
    text = f"{FLOW}{chain}\ndef f5():\n    open('x')\n@workflow\ndef flow():\n    f0()\n"
    (found,) = findings(tmp_path, text)
    assert found.message.endswith("by way of f0(), …, f5()")


def test_a_line_is_reported_once_however_many_workflows_reach_it(tmp_path: Path) -> None:
    text = f"{FLOW}def helper():\n    open('x')\n" + "".join(
        f"@workflow\ndef flow{n}():\n    helper()\n    helper()\n" for n in range(3)
    )
    (found,) = findings(tmp_path, text)
    assert found.workflow is not None
    assert found.workflow.name == "flow0"


def test_helpers_that_call_each_other_end(tmp_path: Path) -> None:
    text = f"{FLOW}def a():\n    b()\ndef b():\n    a()\n    open('x')\n@workflow\ndef flow():\n    a()\n    flow()\n"
    assert told(findings(tmp_path, text)) == ["6 io"]


@pytest.mark.parametrize(
    ("imports", "call"),
    [
        ("from .helpers import prepare", "prepare()"),
        ("from .helpers import prepare as p", "p()"),
        ("from . import helpers", "helpers.prepare()"),
        ("from . import helpers as h", "h.prepare()"),
        ("from .helpers import *", "prepare()"),
        ("from shop.helpers import prepare", "prepare()"),
        ("from shop import helpers", "helpers.prepare()"),
        ("import shop.helpers", "shop.helpers.prepare()"),
        ("import shop.helpers as y", "y.prepare()"),
        ("from shop import prepare", "prepare()"),
        ("from shop.deep import prepare", "prepare()"),
        ("from shop.deep.again import prepare", "prepare()"),
        ("import shop", "shop.prepare()"),
        ("", "from .helpers import prepare\n    prepare()"),
        ("from .helpers import Helper", "Helper()"),
        ("from .helpers import Helper", "Helper.make()"),
        ("from .helpers import Helper", "helper: Helper\n    helper = given()\n    helper.go()"),
        ("from .helpers import HELPER", "HELPER.go()"),
        ("from .helpers import Child", "Child().go()"),
        ("from .helpers import prepare", "list(map(prepare, []))"),
        ("from .helpers import prepare", "sorted([], key=prepare)"),
        ("from .helpers import stamp", "stamp()"),
        ("from .helpers import cached", "cached()"),
        ("from .helpers import managed", "with managed():\n        pass"),
    ],
)
def test_helpers_of_the_same_package_are_followed(imports: str, call: str, tmp_path: Path) -> None:
    files = {
        "shop/__init__.py": "from .helpers import prepare\n",
        "shop/flows.py": f"{FLOW}{imports}\n@workflow\ndef flow():\n    {call}\n",
        "shop/helpers.py": """\
            import contextlib, functools
            def effect():
                open("x")
            def prepare(*args):
                effect()
            class Helper:
                def __init__(self):
                    effect()
                @classmethod
                def make(cls):
                    effect()
                def go(self):
                    self.inner()
                def inner(self):
                    effect()
            class Child(Helper):
                pass
            HELPER = Helper()
            stamp = lambda: effect()
            @functools.cache
            def cached():
                effect()
            @contextlib.contextmanager
            def managed():
                effect()
                yield
            """,
        "shop/deep/__init__.py": "from ..helpers import prepare\n",
        "shop/deep/again.py": "from ..helpers import prepare\n",
    }
    assert told(findings(tmp_path, files, "shop.flows")) == ["shop/helpers.py:3 io"]


def test_instances_properties_and_context_managers_are_followed(tmp_path: Path) -> None:
    text = f"""{FLOW}
class Lead:
    def full_name(self):
        open("1")
    @property
    def age(self):
        open("2")
    def __enter__(self):
        open("3")
    def __exit__(self, *_):
        open("4")
    def __call__(self):
        open("5")
    def never(self):
        open("6")
@workflow
def flow(lead: Lead):
    lead.full_name()
    print(lead.age)
    with lead:
        lead()
"""
    assert told(findings(tmp_path, text)) == ["5 io", "8 io", "10 io", "12 io", "14 io"]


def test_other_packages_are_not_followed(tmp_path: Path) -> None:
    files = {
        "shop/__init__.py": "",
        "shop/flows.py": f"{FLOW}from billing import charge\nimport billing.rates\n@workflow\ndef flow():\n    charge()\n    billing.rates.rate()\n",
        "billing/__init__.py": "def charge():\n    open('x')\n",
        "billing/rates.py": "def rate():\n    open('x')\n",
    }
    assert told(findings(tmp_path, files, "shop.flows")) == []
    assert told(findings(tmp_path, files, "shop/flows.py")) == []


def test_beside_a_file_without_a_package_its_neighbours_are_followed(tmp_path: Path) -> None:
    files = {
        "flows.py": f"{FLOW}from prices import price\n@workflow\ndef flow():\n    price()\n",
        "prices.py": "def price():\n    open('x')\n",
        "worker.py": "raise SystemExit",
    }
    assert told(findings(tmp_path, files)) == ["prices.py:2 io"]


@pytest.mark.parametrize("app", ["shop.flows", "shop/flows.py", "shop", "shop/", "."])
def test_a_directory_without_init_is_a_package_too(app: str, tmp_path: Path) -> None:
    files = {
        "shop/flows.py": f"{FLOW}import shop.state\nfrom shop.prices import price\n@workflow\ndef flow():\n    price()\n    shop.state.CACHE['x'] = 1\n",
        "shop/prices.py": "def price():\n    open('x')\n",
        "shop/state.py": "CACHE = {}\n",
    }
    assert told(findings(tmp_path, files, app)) == ["shop/flows.py:7 global-state", "shop/prices.py:2 io"]


def test_the_workflows_of_what_app_imports_count(tmp_path: Path) -> None:
    flow = f"{FLOW}@workflow\ndef {{0}}():\n    open('x')\n"
    files = {
        "shop/__init__.py": "",
        "shop/app.py": "from shop import one\nimport shop.two\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import shop.types\n",
        "shop/one.py": flow.format("one") + "from . import three\n",
        "shop/two.py": flow.format("two"),
        "shop/three.py": flow.format("three"),
        "shop/types.py": flow.format("types"),
        "shop/unheard_of.py": flow.format("four"),
    }
    found = findings(tmp_path, files, "shop.app")
    assert told(found) == ["shop/one.py:4 io", "shop/three.py:4 io", "shop/two.py:4 io"]
    assert check(["shop.app"]).workflows == 3
    assert check(["shop"]).workflows == 5


def test_a_helper_that_calls_steps_must_not_be_called_in_finally(tmp_path: Path) -> None:
    text = """\
    from worker import step, workflow
    @step
    def save(): ...
    def inner():
        save()
    def outer():
        inner()
    def harmless():
        print("done")
    @workflow
    def flow():
        try:
            outer()
        finally:
            harmless()
            outer()
    """
    (found,) = findings(tmp_path, text)
    assert (found.rule, found.line) == ("finally", 16)
    assert found.what.startswith("outer(), which calls steps, is called in finally")


def test_an_async_helper_that_nobody_awaits_is_found(tmp_path: Path) -> None:
    text = """\
    from worker import sleep, workflow
    async def rest():
        await sleep(3)
    @workflow
    async def flow():
        rest()
        await rest()
    """
    assert told(findings(tmp_path, text)) == ["6 not-awaited"]


def test_nothing_is_imported_or_executed(tmp_path: Path) -> None:
    files = {
        "shop/__init__.py": "raise SystemExit('executed')\n",
        "shop/flows.py": f"{FLOW}raise SystemExit('executed')\n@workflow\ndef flow():\n    open('x')\n",
    }
    assert told(findings(tmp_path, files, "shop.flows")) == ["shop/flows.py:5 io"]


def test_several_apps_make_one_report(tmp_path: Path) -> None:
    written(
        tmp_path,
        {
            f"{name}.py": f"{FLOW}from c import help\n@workflow\ndef {name}():\n    help()\n"
            for name in ("a", "b")
        }
        | {"c.py": "def help():\n    open('x')\n"},
    )
    report = check(["b.py", "a.py", "a"])
    assert told(report.findings) == ["c.py:2 io"]
    assert report.workflows == 2
    assert report.findings[0].workflow is not None
    assert report.findings[0].workflow.name == "a"


@pytest.mark.parametrize(
    ("app", "files", "sentence"),
    [
        ("", {}, "APP is empty"),
        ("nope", {}, "there is no module 'nope'"),
        ("shop.nope", {"shop/__init__.py": ""}, "there is no module 'shop.nope'"),
        ("not a module", {}, "there is no module 'not a module'"),
        ("nope.py", {}, "there is no file nope.py"),
        ("shop/nope.py", {}, "there is no file shop/nope.py"),
        ("flows.py", {"flows.py": "x = (\n"}, "flows.py:1 cannot be parsed: '(' was never closed"),
        ("flows.py", {"flows.py": "# coding: nonsense\n"}, "flows.py cannot be read"),
        ("flows.py", {"flows.py": "x = 1\n"}, "flows.py defines no workflow; decorate a function"),
        ("flows.py", {"flows.py": "def workflow(f): ...\n@workflow\ndef f(): ...\n"}, "defines no workflow"),
        ("shop", {"shop/__init__.py": ""}, "shop defines no workflow"),
        ("empty", {"empty/readme.txt": ""}, "empty defines no workflow"),
        (
            "flows.py",
            {
                "flows.py": f"from worker import workflow\n@workflow\ndef f():\n    x = {' + '.join('a' * 2000)}\n"
            },
            "flows.py cannot be checked: an expression in it is nested too deeply",
        ),
        (
            "flows.py",
            {"flows.py": "from worker import workflow\nimport bad\n@workflow\ndef f(): ...", "bad.py": "1 +"},
            "bad.py:1 cannot be parsed",
        ),
    ],
)
def test_a_mistake_is_one_sentence(app: str, files: dict[str, str], sentence: str, tmp_path: Path) -> None:
    written(tmp_path, files)
    with pytest.raises(ConfigError) as error:
        check([app])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_hidden_directories_and_environments_are_left_out(tmp_path: Path) -> None:
    flow = f"{FLOW}@workflow\ndef flow():\n    open('x')\n"
    written(
        tmp_path,
        {
            "shop/flows.py": flow,
            ".git/flows.py": flow,
            "env/pyvenv.cfg": "",
            "env/lib/flows.py": flow,
            "node_modules/flows.py": flow,
        },
    )
    assert told(check(["."]).findings) == ["shop/flows.py:4 io"]


def test_a_file_elsewhere_is_reported_with_its_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, {"flows.py": f"{FLOW}@workflow\ndef flow():\n    open('x')\n", "below/x": ""})
    monkeypatch.chdir(tmp_path / "below")
    assert [each.path for each in check(["../flows.py"]).findings] == [str(tmp_path / "flows.py")]
