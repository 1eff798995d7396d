"""The demo's leads: what the file holds, what is taken in, and what is asked for beyond it."""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import cache
from itertools import islice

import pytest

from worker.demo.leads import Intake, rows, take_in
from worker.demo.workflows import Lead, welcome_lead

RESERVED = ("example.com", "example.org", "example.net")
SCRIPTS = (
    "LATIN SMALL LETTER U WITH DIAERESIS",
    "CYRILLIC",
    "GREEK",
    "ARABIC",
    "HEBREW",
    "CJK",
    "HIRAGANA",
    "HANGUL",
    "DEVANAGARI",
    "THAI",
)


@cache
def taken_in(count: int) -> tuple[list[Lead], Intake]:
    intake = Intake()
    return list(take_in(count, welcome_lead.signature, intake)), intake


def test_the_file_holds_a_thousand_rows_with_some_broken_and_some_twice() -> None:
    leads, intake = taken_in(1000)

    assert intake.rows == 1000
    assert len(intake.rejected) == 8
    assert intake.duplicates == 12
    assert len(intake.accepted) == 980
    assert len(leads) == 992


def test_each_broken_row_says_what_is_wrong_with_it() -> None:
    _, intake = taken_in(1000)

    said = "\n".join(intake.rejected)
    assert all(reason.startswith("row ") for reason in intake.rejected)
    for wrong in ("column id", "column email", "column name", "column signed_up_at", "more cells"):
        assert wrong in said
    # Not all at the end, nor all at the beginning.
    numbers = [int(reason.split()[1].rstrip(":,")) for reason in intake.rejected]
    assert numbers[0] < 100
    assert numbers[-1] < 990


def test_no_address_belongs_to_anybody_real_and_none_to_two_leads() -> None:
    _, intake = taken_in(1000)

    addresses = [lead.email for lead in intake.accepted.values()]
    domains = {address.rpartition("@")[2] for address in addresses}
    assert all(domain in RESERVED or domain.endswith(".example") for domain in domains)
    assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize("script", SCRIPTS)
def test_names_come_in_many_scripts(script: str) -> None:
    _, intake = taken_in(1000)

    letters = {letter for lead in intake.accepted.values() for letter in lead.name}
    assert any(unicodedata.name(letter, "").startswith(script) for letter in letters)


def test_no_name_holds_an_emoji_or_a_control_character() -> None:
    letters = {letter for cells in rows(1000) for letter in cells["name"]}

    # Cf is the zero-width non-joiner, which Persian names are spelled with.
    assert {unicodedata.category(letter) for letter in letters}.isdisjoint({"Cc", "So", "Cs", "Co"})


def test_fewer_leads_are_the_first_of_the_file() -> None:
    assert list(rows(50)) == list(islice(rows(1000), 50))
    assert taken_in(50)[1].rows == 50


def test_more_leads_than_the_file_has_are_others_of_the_same_kind() -> None:
    leads, intake = taken_in(2500)

    assert intake.rows == 2500
    assert intake.duplicates > 24
    assert len(intake.rejected) > 16
    assert len({lead.email for lead in leads}) == len(intake.accepted)
    assert Counter(lead.id for lead in leads).most_common(1)[0][1] == 2


def test_an_empty_cell_of_an_optional_column_is_none() -> None:
    leads, _ = taken_in(1000)

    assert any(lead.phone is None for lead in leads)
    assert any(lead.company is None for lead in leads)
    assert "" not in {lead.phone for lead in leads} | {lead.company for lead in leads}
