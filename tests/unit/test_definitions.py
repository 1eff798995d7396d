from __future__ import annotations

import inspect
import sys
import types
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import sqlalchemy
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session

from outbox.errors import ConfigError
from tests.unit.drives import Run
from worker.decisions import Block, Fail, Finish
from worker.definitions import (
    NOT_DONE,
    Registry,
    Step,
    TransactionKind,
    Workflow,
    collecting,
    registry,
    step,
    transaction,
    workflow,
)
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


class TestTransactions:
    @pytest.mark.parametrize(
        ("annotation", "kind"),
        [
            (psycopg.Connection, TransactionKind.PSYCOPG),
            (psycopg.Connection[Any], TransactionKind.PSYCOPG),
            (sqlalchemy.Connection, TransactionKind.SQLALCHEMY_CONNECTION),
            (Session, TransactionKind.SQLALCHEMY_SESSION),
            (type("OurSession", (Session,), {}), TransactionKind.SQLALCHEMY_SESSION),
            ("Session", TransactionKind.SQLALCHEMY_SESSION),
            ("psycopg.Connection[Any]", TransactionKind.PSYCOPG),
        ],
    )
    def test_the_first_parameter_says_which_transaction(self, annotation: Any, kind: TransactionKind):
        def save(tx, lead: Lead) -> None: ...

        save.__annotations__["tx"] = annotation
        made = transaction(save)
        assert made.transaction is kind
        assert made.signature.parameters == ("lead",)

    @pytest.mark.parametrize(
        ("annotation", "kind"),
        [
            (psycopg.AsyncConnection, TransactionKind.PSYCOPG_ASYNC),
            (AsyncConnection, TransactionKind.SQLALCHEMY_ASYNC_CONNECTION),
            (AsyncSession, TransactionKind.SQLALCHEMY_ASYNC_SESSION),
            ("AsyncSession", TransactionKind.SQLALCHEMY_ASYNC_SESSION),
        ],
    )
    def test_asynchronous_ones_take_async_def(self, annotation: Any, kind: TransactionKind):
        async def save(tx, lead: Lead) -> None: ...

        def plain(tx, lead: Lead) -> None: ...

        save.__annotations__["tx"] = plain.__annotations__["tx"] = annotation
        assert transaction(save).transaction is kind
        fails(lambda: transaction(plain), "plain", "takes `async def`")

    def test_a_synchronous_one_in_async_def_is_an_error_at_import(self):
        async def save(session: Session) -> None: ...

        fails(lambda: transaction(save), "transaction", "SQLAlchemy's Session, which takes `def`")

    def test_a_first_parameter_that_is_no_transaction_is_an_error_at_import(self):
        def nothing() -> None: ...

        def bare(session) -> None: ...

        def wrong(lead: Lead) -> None: ...

        def checker_only(session: OnlyForTheChecker) -> None: ...

        fails(lambda: transaction(nothing), "nothing", "no parameter for the transaction")
        fails(lambda: transaction(bare), "bare", "'session' has no annotation")
        fails(lambda: transaction(wrong), "wrong", "psycopg's Connection")
        fails(lambda: transaction(checker_only), "checker_only", "TYPE_CHECKING")

    def test_verify_on_a_transaction_is_an_error_at_import(self):
        def save(session: Session) -> None: ...

        fails(lambda: transaction(verify=lambda: None)(save), "save", "needs no verify=")

    def test_transactions_are_steps_and_take_their_options(self, known: Registry):
        @transaction(name="saved", timeout=3, on_crash="hold")
        def save(session: Session, lead: Lead) -> None: ...

        assert known.steps["saved"] is save
        assert (save.timeout, save.on_crash) == (3.0, "hold")


class TestMethods:
    def test_static_methods_above_and_below(self, known: Registry):
        class Shop:
            @staticmethod
            @step
            def below(a: int) -> int:
                return a + 1

            @step
            @staticmethod
            def above(a: int) -> int:
                return a + 2

            @step
            def neither(a: int) -> int:
                return a + 3

        assert (Shop.below(1), Shop.above(1), Shop().below(1), Shop().above(1), Shop.neither(1)) == (
            2,
            3,
            2,
            3,
            4,
        )
        assert set(known.steps) == {"Shop.below", "Shop.above", "Shop.neither"}

        @workflow
        def flow() -> list[int]:
            return [Shop.below(1), Shop().above(1)]

        run = Run(flow)
        assert run.finish() == Finish("[2,3]")
        assert [each.name for each in run.history] == ["Shop.below", "Shop.above"]

    def test_class_methods_above_and_below_get_their_class_again_when_executed(self, known: Registry):
        class Shop:
            rate = 10

            @classmethod
            @step
            def below(cls, a: int) -> int:
                return a * cls.rate

            @step
            @classmethod
            async def above(cls, a: int) -> int:
                return a * cls.rate + 1

        assert (Shop.below(1), Shop().below(2)) == (10, 20)
        assert known.steps["Shop.below"].signature.parameters == ("a",)

        @workflow
        async def flow() -> list[int]:
            return [Shop.below(1), await Shop.above(a=2), Shop().below(3)]

        run = Run(flow)
        assert run.finish() == Finish("[10,21,30]")
        assert run.decisions[0].arguments == '{"a":1}'

    def test_a_transaction_may_be_a_class_method(self):
        given: Any = object()

        class Shop:
            @transaction
            @classmethod
            def above(cls, session: Session, a: int) -> int:
                assert session is given
                return a + 1

            @classmethod
            @transaction
            def below(cls, session: Session, a: int) -> int:
                assert session is given
                return a + 2

        for made in (Shop.above, Shop.below):
            assert made.transaction is TransactionKind.SQLALCHEMY_SESSION
            assert made.signature.parameters == ("a",)
        assert (Shop.above.function(given, 1), Shop.below.function(given, 1)) == (2, 3)

    def test_a_workflow_may_be_a_static_or_class_method(self, known: Registry):
        class Onboarding:
            step = 2

            @staticmethod
            @workflow
            def plain(a: int) -> int:
                return a

            @workflow
            @classmethod
            def of_class(cls, a: int) -> int:
                return a * cls.step

        assert Run(known.workflows["Onboarding.plain"], a=3).finish() == Finish("3")
        assert Run(Onboarding.of_class, a=3).finish() == Finish("6")

    def test_through_a_subclass_a_step_is_plain_and_refused_in_a_body(self):
        class Base:
            rate = 1

            @step
            @classmethod
            def price(cls) -> int:
                return cls.rate

            @classmethod
            @step
            def cost(cls) -> int:
                return cls.rate

        class Special(Base):
            rate = 5

        assert (Special.price(), Special.cost(), Base.price()) == (5, 5, 1)

        @workflow(name="through a subclass")
        def flow(method: str) -> int:
            return getattr(Special, method)()

        for method in ("price", "cost"):
            outcome = Run(flow, method=method).finish()
            assert isinstance(outcome, Fail)
            assert "called through" in outcome.error["message"]

    def test_from_python_3_13_on_class_methods_are_called_with_their_class(
        self, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(sys, "version_info", (3, 13, 0, "final", 0))

        class Shop:
            rate = 3

            @step
            def price(cls, a: int) -> int:
                return a * cls.rate

        class Special(Shop):
            rate = 5

        made = Shop.__dict__["price"]
        bound, inherited = types.MethodType(made, Shop), types.MethodType(made, Special)
        assert (bound(2), inherited(2)) == (6, 10)

        @workflow
        def flow(special: bool) -> int:
            return inherited(2) if special else bound(2)

        assert Run(flow, special=False).finish() == Finish("6")
        assert isinstance(Run(flow, special=True).finish(), Fail)

    def test_a_class_method_whose_class_cannot_be_found_says_so(self):
        class Shop:
            @classmethod
            @step
            def price(cls) -> int:
                return 1

        made = Shop.__dict__["price"].__func__
        fails(made.function, "price", "cannot be found by its name")

    def test_instance_methods_are_an_error_at_import(self):
        with pytest.raises(ConfigError, match="static or a class method"):

            class Shop:
                @step
                def sell(self, a: int) -> None: ...


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
