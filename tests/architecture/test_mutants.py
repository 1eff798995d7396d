"""The list of mutants follows the code: each can still be made, and the tests that ought to notice it are there."""

from __future__ import annotations

import re

import pytest

from tests.mutants import MUTANTS, Mutant
from tests.mutations import ROOT, check


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.guard}, {mutant.off}")
def test_a_mutant_can_be_made_and_its_tests_are_there(mutant: Mutant) -> None:
    check(mutant, ROOT)
    for test in mutant.tests:
        path, _, name = test.partition("::")  # of some the file is named alone
        defined = rf"^ *(async )?def {re.escape(name.partition('[')[0])}\(" if name else ""
        assert re.search(defined, (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), test
