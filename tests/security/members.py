"""Login roles with one of ours, for as long as a test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg.errors import InsufficientPrivilege
from psycopg.rows import TupleRow

from outbox.database import connect

Db = psycopg.Connection[TupleRow]

ROLES = ("stepwell_producer", "stepwell_viewer", "stepwell_worker")

_numbers = itertools.count(1)


class Member:
    """A login role, its URL, and a connection of its own."""

    def __init__(self, name: str, url: str, db: Db) -> None:
        self.name = name
        self.url = url
        self.db = db

    def one(self, statement: str, *parameters: Any) -> Any:
        row = self.db.execute(statement.encode(), parameters or None).fetchone()
        assert row is not None
        return row[0]

    def is_refused(self, statement: str) -> bool:
        """Tell whether the database refuses a statement for want of a privilege; any other error is the test's."""
        try:
            self.db.execute(statement.encode())
        except InsufficientPrivilege:
            return True
        return False


@contextmanager
def member_of(role: str | None, database_url: str, owner: Db) -> Iterator[Member]:
    """Yield a new login role with `role`, or with none."""
    login = f"security_login_{next(_numbers)}"
    owner.execute(f"create role {login} login{f' in role {role}' if role else ''}".encode())
    url = database_url.replace("postgres@", f"{login}@")
    try:
        with connect(url, application_name="test") as connection:
            yield Member(login, url, connection)
    finally:
        owner.execute(f"drop owned by {login}; drop role {login}".encode())
