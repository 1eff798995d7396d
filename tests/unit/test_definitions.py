from __future__ import annotations

import inspect
import sys
import types
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy.orm import Session

from outbox.errors import ConfigError
from tests.unit.drives import Run
from worker.definitions import (
    NOT_DONE,
    Registry,
    Step,
    Workflow,
    collecting,
    registry,
    step,
    transaction,
    workflow,
)
from worker.replay.decisions import Block
from worker.retries import retrying

if TYPE_CHECKING:
    from decimal import Decimal as OnlyForTheChecker

HERE = Path(__file__).name


@pytest.fixture(autouse=True)
def known() -> Iterator[Registry]:
    with collecting() as collected:
        yield collected


@dataclass
class Lead:
    id: int


@dataclass
class OutOfStock(Exception):
    item: str


def add(a: int, b: int = 2) -> int:
    return a + b


async def send(lead: Lead) -> str:
    return f"sent {lead.id}"


def fails(decorate: Callable[[], Any], *parts: str) -> None:
    """Expect a ConfigError whose message has all of the parts, and this file with a line."""
    with pytest.raises(ConfigError) as raised:
        decorate()
    for part in (*parts, HERE + ":"):
        assert part in str(raised.value)


class TestPlainly:
    def test_outside_of_a_run_a_definition_is_the_function_it_decorates(self):
        assert step(add)(1) == 3
        assert workflow(add)(1, b=5) == 6

    async def test_an_async_definition_is_awaited(self):
        assert await step(send)(Lead(1)) == "sent 1"

    def test_a_transaction_takes_its_session_first(self):
        given: Any = object()

        @transaction
        def save(session: Session, lead: Lead) -> int:
            assert session is given
            return lead.id

        assert save(given, Lead(4)) == 4
        assert save.signature.parameters == ("lead",)

    def test_a_definition_looks_like_its_function(self):
        made = step(send)
        assert made.__name__ == "send"
        assert made.__module__ == __name__
        assert inspect.signature(made) == inspect.signature(send)
        assert f"{HERE}:" in repr(made)


class TestOptions:
    def test_a_bare_step_has_no_retry_no_timeout_and_is_executed_again_after_a_crash(self):
        made = step(add)
        assert (made.retry, made.timeout, made.on_crash, made.verify, made.raises) == (
            None,
            None,
            "retry",
            None,
            (),
        )
        assert (made.is_async, made.transaction, made.name) == (False, None, "add")

    def test_options_are_kept(self, known: Registry):
        def was_added(a: int, b: int) -> Any:
            return NOT_DONE

        policy = retrying()
        made = step(
            name="sum",
            retry=policy,
            timeout=timedelta(minutes=1),
            on_crash="hold",
            verify=was_added,
            raises=OutOfStock,
        )(add)
        assert (made.name, made.retry, made.timeout, made.on_crash) == ("sum", policy, 60.0, "hold")
        assert (made.verify, made.raises) == (was_added, (OutOfStock,))
        assert known.steps == {"sum": made}

    def test_a_workflow_has_a_queue_and_may_be_strict(self, known: Registry):
        made = workflow(name="sums", queue="slow", strict=True)(add)
        assert (made.name, made.queue, made.strict, made.version) == ("sums", "slow", True, "")
        assert (workflow(send).queue, workflow(name="x")(send).strict) == ("default", False)
        assert known.workflows["sums"] is made

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"name": ""}, "name="),
            ({"name": "a\nb"}, "name="),
            ({"name": 3}, "name="),
            ({"retry": 3}, "retry= takes retrying("),
            ({"timeout": 0}, "timeout="),
            ({"timeout": "5"}, "timeout="),
            ({"timeout": float("inf")}, "timeout="),
            ({"timeout": True}, "timeout="),
            ({"timeout": timedelta(seconds=-1)}, "timeout="),
            ({"on_crash": "ignore"}, 'on_crash= takes "retry" or "hold"'),
            ({"verify": "add"}, "verify="),
            ({"verify": lambda: None}, "verify= is called with the arguments of the step"),
            ({"raises": ValueError("x")}, "raises="),
            ({"raises": (OutOfStock, int)}, "raises="),
            ({"raises": KeyboardInterrupt}, "raises="),
            ({"raises": ValueError}, "ValueError has no encodable form"),
        ],
    )
    def test_an_option_that_cannot_work_is_an_error_at_import(self, options: dict[str, Any], message: str):
        fails(lambda: step(**options)(add), "step add", message)

    def test_an_unknown_option_is_a_type_error(self):
        with pytest.raises(TypeError, match="retries"):
            step(retries=3)(add)

    @pytest.mark.parametrize("queue", ["", " ", 3])
    def test_a_queue_has_a_name(self, queue: Any):
        fails(lambda: workflow(queue=queue)(add), "workflow add", "queue=")


class TestParameters:
    def test_any_arguments_are_an_error_at_import(self):
        def many(*leads: Lead) -> None: ...

        def options(**options: int) -> None: ...

        fails(lambda: step(many), "step", "many", "*leads")
        fails(lambda: workflow(options), "workflow", "options", "**options")

    def test_generators_are_an_error_at_import(self):
        def numbers() -> Iterator[int]:
            yield 1

        async def later() -> AsyncIterator[int]:
            yield 1

        fails(lambda: step(numbers), "numbers", "generator")
        fails(lambda: workflow(later), "later", "generator")

    def test_types_that_json_cannot_carry_are_an_error_at_import(self):
        def odd(module: types.ModuleType) -> None: ...

        def result() -> types.ModuleType: ...

        fails(lambda: step(odd), "odd", "'module'")
        fails(lambda: workflow(result), "result")

    def test_a_default_that_cannot_be_encoded_is_an_error_at_import(self):
        def odd(value: Any = NOT_DONE) -> None: ...

        fails(lambda: step(odd), "odd", "value")

    def test_an_annotation_that_exists_for_the_checker_only_is_an_error_when_the_app_is_loaded(
        self, known: Registry
    ):
        @step
        def pay(amount: OnlyForTheChecker) -> None: ...

        fails(known.resolve, "step", "pay", "amount", "TYPE_CHECKING")

    def test_an_annotation_may_name_what_comes_later_in_the_module(self, known: Registry):
        module = types.ModuleType("names_what_comes_later")
        source = """
from __future__ import annotations
from dataclasses import dataclass
from worker.definitions import step

@step
def greet(lead: Later) -> str: return lead.name

@dataclass
class Later:
    name: str
"""
        sys.modules[module.__name__] = module
        try:
            exec(compile(source, "later.py", "exec"), module.__dict__)
            known.resolve()
            args, _ = known.steps["greet"].signature.decode_arguments('{"lead": {"name": "Ada"}}', where="x")
            assert args[0].name == "Ada"
        finally:
            del sys.modules[module.__name__]

    @pytest.mark.parametrize(
        "thing", [print, 3, lambda: None, Lead], ids=["builtin", "int", "lambda", "class"]
    )
    def test_only_functions_are_decorated(self, thing: Any):
        if inspect.isfunction(thing):
            assert step(name="a lambda")(thing)() is None
        else:
            with pytest.raises(ConfigError, match="@step decorates functions"):
                step(thing)

    def test_a_function_is_one_thing_only(self):
        made = step(add)
        with pytest.raises(ConfigError, match="is a step already"):
            workflow(made)
        with pytest.raises(ConfigError, match="is a step already"):
            step(staticmethod(made))


class TestRegistry:
    def test_names_are_qualified_in_their_module(self, known: Registry):
        class Outer:
            class Inner:
                @staticmethod
                @step
                def run() -> None: ...

        step(add)
        assert set(known.steps) == {"Outer.Inner.run", "add"}

    def test_a_name_is_given_once(self):
        step(add)

        def other() -> None: ...

        fails(lambda: step(name="add")(other), "step 'add' is defined twice, at", "give it a name of its own")

    def test_steps_and_workflows_may_share_a_name(self):
        step(add)
        workflow(add)

    def test_a_module_that_is_reloaded_replaces_its_definitions(self, known: Registry):
        first, second = step(add), step(add)
        assert known.steps["add"] is second is not first

    def test_the_same_file_under_two_module_names_is_named_as_such(self):
        source = "from worker.definitions import step\n@step\ndef act() -> None: ...\n"
        code = compile(source, __file__, "exec")
        exec(code, {"__name__": "__main__"})
        with pytest.raises(ConfigError, match="was loaded twice, as module '__main__' and as 'flows'"):
            exec(code, {"__name__": "flows"})

    def test_what_is_typed_into_a_console_may_be_typed_again(self, known: Registry):
        names: dict[str, Any] = {"__name__": "__main__"}
        for line in ("\n", "\n\n\n"):
            source = f"{line}from worker.definitions import step\n@step\ndef act() -> None: ...\n"
            exec(compile(source, "<stdin>", "exec"), names)
        assert known.steps["act"].where == "<stdin>:5"

    def test_collecting_keeps_definitions_apart(self):
        outer = registry()
        with collecting() as inner:
            made = step(add)
        assert inner.steps == {"add": made}
        assert registry() is outer
        assert outer.steps == {}


def test_the_kinds_of_definition_are_what_they_say():
    assert isinstance(step(add), Step)
    assert isinstance(workflow(add), Workflow)
    assert repr(NOT_DONE) == "NOT_DONE"
    assert not isinstance(Run(workflow(name="n")(add), a=1).finish(), Block)
