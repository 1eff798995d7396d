from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from outbox.errors import ConfigError
from worker.definitions import Registry, collecting, load_app

FLOW = """
from worker.definitions import workflow

@workflow
def {name}() -> None: ...
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write a module into the current directory; whatever is imported is forgotten afterwards."""

    def written(name: str, source: str = FLOW, flow: str = "flow") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source.replace("{name}", flow))
        return path

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = dict(sys.modules)
    with collecting():
        yield written
    for name in set(sys.modules) - set(before):
        del sys.modules[name]


def refused(app: str, *parts: str) -> str:
    """Expect a ConfigError of one line that has all of the parts."""
    with pytest.raises(ConfigError) as raised:
        load_app(app)
    message = str(raised.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


class TestLoad:
    def test_a_module_path_is_imported_from_the_current_directory(self, write: Write):
        write("app_one.py", flow="one")
        assert set(load_app("app_one").workflows) == {"one"}

    def test_a_module_of_a_package_is_imported(self, write: Write):
        write("shop_pkg/__init__.py", "")
        write("shop_pkg/flows.py", flow="sell")
        assert set(load_app("shop_pkg.flows").workflows) == {"sell"}

    @pytest.mark.parametrize("spelled", ["app_two.py", "./app_two.py", "{tmp}/app_two.py"])
    def test_a_file_path_is_imported_under_its_own_name(self, write: Write, tmp_path: Path, spelled: str):
        write("app_two.py", flow="two")
        assert set(load_app(spelled.replace("{tmp}", str(tmp_path))).workflows) == {"two"}
        assert "app_two" in sys.modules

    def test_a_file_finds_its_neighbours(self, write: Write):
        write("sub/neighbour_of_app.py", "name = 'three'\n")
        write("sub/app_three.py", "import neighbour_of_app\n" + FLOW, flow="three")
        assert set(load_app("sub/app_three.py").workflows) == {"three"}

    def test_an_app_that_is_loaded_already_is_not_loaded_again(self, write: Write):
        write("app_four.py")
        first = load_app("app_four.py").workflows["flow"]
        assert load_app("app_four").workflows["flow"] is first
        assert load_app("./app_four.py").workflows["flow"] is first

    def test_a_script_that_loads_itself_is_not_loaded_again(self, write: Write):
        source = (
            FLOW
            + "\nfrom worker.definitions import load_app\nfor app in ('app_five', 'app_five.py', __file__):\n"
        )
        write("app_five.py", source + "    assert load_app(app).workflows['flow'] is flow\nprint('once')\n")
        root = Path(__file__).parents[2]
        done = subprocess.run(
            [sys.executable, "app_five.py"],
            env={"PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.stdout, done.stderr) == ("once\n", "")

    def test_the_registry_of_the_process_is_returned(self, write: Write):
        write("app_six.py")
        assert isinstance(load_app("app_six"), Registry)


class TestRefusals:
    def test_nothing_of_that_name(self, write: Write):
        refused("no_such_app", "there is no module 'no_such_app'")
        refused("no.such.app", "there is no module 'no.such.app'")
        refused("no_such_app.py", "there is no file no_such_app.py")
        refused("", "APP is empty")
        refused(".relative", "there is no module")

    def test_a_file_that_cannot_be_a_module(self, write: Write):
        write("not-a-name.py")
        write("sub/flows.txt")
        refused("not-a-name.py", "must be a Python name")
        refused("sub/flows.txt", "end with .py")

    def test_an_app_that_raises_is_named_with_its_line(self, write: Write):
        path = write("app_raises.py", "x = 1\nraise ValueError('bad\\nsecond line')\n")
        refused("app_raises", "app_raises cannot be imported: ValueError: bad", f"{path}:2")
        refused("app_raises.py", "ValueError: bad", f"{path}:2")

    def test_an_app_that_does_not_parse(self, write: Write):
        write("app_syntax.py", "def broken(:\n")
        refused("app_syntax", "SyntaxError")

    def test_an_app_that_exits(self, write: Write):
        write("app_exits.py", "raise SystemExit(3)\n")
        refused("app_exits", "SystemExit: 3")

    def test_an_app_whose_own_import_fails(self, write: Write):
        path = write("app_imports.py", "import no_such_library\n")
        refused("app_imports", "No module named 'no_such_library'", f"{path}:1")
        write("pkg_raises/__init__.py", "1 / 0\n")
        write("pkg_raises/flows.py")
        refused("pkg_raises.flows", "ZeroDivisionError")

    def test_an_error_of_a_definition_is_passed_on_as_it_is(self, write: Write):
        write("app_wrong.py", "from worker.definitions import step\n@step\ndef act(*args): ...\n")
        refused("app_wrong", "step act", "*args")

    def test_an_app_without_a_workflow(self, write: Write):
        write("app_empty.py", "")
        refused("app_empty", "defines no workflow")

    def test_an_annotation_that_cannot_be_found(self, write: Write):
        source = "from __future__ import annotations\n" + FLOW.replace("()", "(a: Nowhere)")
        write("app_annotated.py", source)
        refused("app_annotated", "workflow flow", "Nowhere")

    @pytest.mark.parametrize("ours", ["worker", "outbox"])
    def test_a_users_worker_or_outbox_beside_ours(self, write: Write, ours: str):
        write(f"{ours}.py")
        refused(f"{ours}.py", f"Stepwell's own package '{ours}'", "rename")
        refused(ours, f"Stepwell's own package '{ours}'", "rename")

    def test_a_file_of_the_name_of_another_module(self, write: Write):
        write("json.py")
        refused("json.py", "another module of that name is loaded from", "rename")

    def test_a_file_that_a_module_of_the_same_name_hides(self, write: Write, tmp_path: Path):
        write("first/app_hidden.py")
        write("second/app_hidden.py")
        sys.path.insert(0, str(tmp_path / "first"))
        sys.path.append(str(tmp_path / "second"))
        refused("second/app_hidden.py", "is hidden by the module 'app_hidden' of", "rename")
