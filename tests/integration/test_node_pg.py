"""The same from Node: its `pg` client enqueues in a transaction with a business row."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import psycopg
import pytest
from psycopg.rows import TupleRow

Db = psycopg.Connection[TupleRow]

INSTALL_SECONDS = 120

SCRIPT = """
const { Client } = require("pg");
const { connection, ending } = JSON.parse(process.argv[2]);
(async () => {
  const client = new Client(connection);
  await client.connect();
  await client.query("begin");
  await client.query("insert into leads values ($1)", [17]);
  const { rows } = await client.query(
    "select stepwell.enqueue('welcome_lead', $1, key => $2, delay => $3) as id",
    [{ lead: { id: 17, name: "Zoë 🚀" } }, "17", "0 seconds"],
  );
  await client.query(ending);
  await client.end();
  console.log(rows[0].id);
})().catch((error) => { console.error(error); process.exit(1); });
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which `require("pg")` works."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("Node or npm is not installed")
    home = tmp_path_factory.mktemp("node")
    (home / "package.json").write_text('{"name": "enqueues", "private": true}')
    (home / "enqueue.js").write_text(SCRIPT)
    install = ["npm", "install", "--no-audit", "--no-fund", "--silent", "pg@8"]
    try:
        done = subprocess.run(
            install, cwd=home, capture_output=True, text=True, check=False, timeout=INSTALL_SECONDS
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm install pg took more than {INSTALL_SECONDS} s")
    if done.returncode != 0:
        pytest.skip(f"npm install pg failed: {done.stderr.strip()[-300:]}")
    return home


@pytest.fixture
def node(project: Path, database_url: str, db: Db) -> Callable[[str], str]:
    db.execute("create table leads (id int primary key)")
    url = urlsplit(database_url)
    at = {name: values[0] for name, values in parse_qs(url.query).items()}
    connection = {
        "host": at.get("host", url.hostname),
        "port": int(at.get("port", url.port or 5432)),
        "user": url.username,
        "database": unquote(url.path.lstrip("/")),
    }

    def run(ending: str) -> str:
        told = json.dumps({"connection": connection, "ending": ending})
        done = subprocess.run(
            ["node", "enqueue.js", told], cwd=project, capture_output=True, text=True, check=False, timeout=30
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def one(db: Db, statement: str) -> Any:
    row = db.execute(statement.encode()).fetchone()
    assert row is not None
    return row[0]


def test_node_enqueues_with_a_business_row(node: Callable[[str], str], db: Db) -> None:
    run = node("commit")
    assert str(one(db, "select id from stepwell.runs")) == run
    assert json.loads(one(db, "select input::text from stepwell.runs")) == {
        "lead": {"id": 17, "name": "Zoë 🚀"}
    }
    assert one(db, "select key from stepwell.keys") == "17"
    assert one(db, "select count(*) from leads") == 1
    db.execute("delete from leads")
    assert node("commit") == run  # the key is known
    assert one(db, "select count(*) from stepwell.runs") == 1


def test_a_rollback_in_node_leaves_nothing(node: Callable[[str], str], db: Db) -> None:
    node("rollback")
    for table in ("stepwell.runs", "stepwell.tasks", "stepwell.keys", "leads"):
        assert one(db, f"select count(*) from {table}") == 0
