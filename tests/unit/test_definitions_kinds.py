from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import sqlalchemy
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session

from outbox.errors import ConfigError
from tests.unit.drives import Run
from worker.definitions import (
    Registry,
    TransactionKind,
    collecting,
    step,
    transaction,
    workflow,
)
from worker.replay.decisions import Fail, Finish

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


def fails(decorate: Callable[[], Any], *parts: str) -> None:
    """Expect a ConfigError whose message has all of the parts, and this file with a line."""
    with pytest.raises(ConfigError) as raised:
        decorate()
    for part in (*parts, HERE + ":"):
        assert part in str(raised.value)


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
