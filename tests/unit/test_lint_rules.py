"""Each rule finds what it is for, and leaves alone what only looks like it."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests.unit.checked import findings
from worker.lint import RULES

FLOW = """
import asyncio, collections, concurrent.futures, datetime, functools, glob, hashlib, io, itertools, json, logging
import math, multiprocessing, os, pathlib, platform, queue, random, secrets, shutil, smtplib, socket, sqlite3
import subprocess, sys, tempfile, threading, time, urllib.parse, urllib.request, uuid
import aiohttp, boto3, httpx, numpy as np, psycopg, requests, sqlalchemy
from pathlib import Path

import worker
from outbox import Client
from worker import current_run, gather, now, sleep, sleep_until, step, transaction, wait, workflow

CACHE = {}
SEEN: set[str] = set()
NAMES = ["a"]
LIMIT = 3
NUMBERS = itertools.count()
LOCK = threading.Lock()
ALOCK = asyncio.Lock()
GENERATOR = random.Random(7)
HTTP = httpx.AsyncClient()
ENGINE = sqlalchemy.create_engine("postgresql://")
log = logging.getLogger(__name__)

class Settings:
    debug = False
    seen = []

SETTINGS = Settings()

@step
async def send(text): ...

@step
def save(text): ...

@transaction
async def store(connection: psycopg.AsyncConnection, text): ...

@workflow
async def child(text): ...

@workflow
async def flow(given, names: list[str], tags: set[str]):
"""


def rules_in(tmp_path: Path, body: str) -> list[str]:
    """Return the rules that the body of a workflow breaks, in the order of its lines."""
    return [found.rule for found in findings(tmp_path, FLOW + textwrap.indent(textwrap.dedent(body), "    "))]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


FOUND = {
    "clock": [
        "time.time()",
        "started = time.monotonic()",
        "time.localtime()",
        "time.strftime('%Y')",
        "datetime.datetime.now()",
        "datetime.datetime.now(datetime.UTC).isoformat()",
        "datetime.datetime.utcnow()",
        "datetime.date.today()",
        "given = datetime.datetime.now() if given is None else given",
        "[time.time() for _ in names]",
        "return {'at': time.time_ns()}",
        "f = lambda: time.time()",
        "def inner():\n    return time.time()",
        "async def inner(at=time.time()): ...",
        "f'{time.time():.1f}'",
        "with given as x:\n    time.perf_counter()",
        "match given:\n    case 1 if time.time() > 2:\n        pass",
        "sorted(names, key=functools.partial(time.strftime, '%Y'))",
        "list(map(datetime.datetime.fromtimestamp, [time.time()]))",
    ],
    "random": [
        "random.random()",
        "random.choice(names).title()",
        "random.shuffle(names)",
        "secrets.token_hex()",
        "uuid.uuid4()",
        "uuid.uuid1()",
        "os.urandom(8)",
        "np.random.rand(3)",
        "np.random.default_rng()",
        "random.Random()",
        "random.Random(None)",
        "random.SystemRandom().random()",
        "GENERATOR.random()",
    ],
    "environment": [
        "os.environ['HOME']",
        "os.environ.get('HOME')",
        "os.getenv('HOME')",
        "if 'CI' in os.environ:\n    pass",
        "for name in os.environ:\n    pass",
        "os.environ['HOME'] = '/'",
        "sys.argv[1:]",
        "platform.system()",
        "socket.gethostname()",
        "os.getpid()",
        "Path.home()",
        "os.getcwd()",
    ],
    "io": [
        "open('x')",
        "with open('x') as file:\n    file.read()",
        "Path('x').read_text()",
        "(Path('a') / 'b').exists()",
        "p = pathlib.Path('x')\np.parent.mkdir()",
        "requests.get('http://x')",
        "requests.Session().get('http://x')",
        "await HTTP.get('http://x')",
        "httpx.get('http://x')",
        "urllib.request.urlopen('http://x')",
        "socket.create_connection(('x', 1))",
        "subprocess.run(['ls'])",
        "os.system('ls')",
        "os.listdir('.')",
        "os.path.exists('x')",
        "glob.glob('*')",
        "shutil.rmtree('x')",
        "tempfile.mkdtemp()",
        "psycopg.connect('')",
        "ENGINE.connect()",
        "with ENGINE.begin() as connection:\n    pass",
        "boto3.client('s3')",
        "smtplib.SMTP('x')",
        "sqlite3.connect('x')",
        "Client()",
        "list(map(open, names))",
        "async with aiohttp.ClientSession() as session:\n    pass",
    ],
    "blocking": [
        "time.sleep(1)",
        "input()",
        "breakpoint()",
        "queue.Queue().get()",
        "concurrent.futures.wait([])",
        "with LOCK:\n    pass",
        "os.wait()",
    ],
    "asyncio": [
        "await asyncio.sleep(1)",
        "await asyncio.gather(send('a'), send('b'))",
        "await asyncio.wait_for(send('a'), 3)",
        "async with asyncio.timeout(3):\n    await send('a')",
        "async with asyncio.TaskGroup() as group:\n    pass",
        "asyncio.create_task(send('a'))",
        "asyncio.Queue()",
        "await asyncio.to_thread(given)",
        "asyncio.run(given)",
        "async with ALOCK:\n    pass",
    ],
    "thread": [
        "threading.Thread(target=given)",
        "multiprocessing.Pool()",
        "concurrent.futures.ThreadPoolExecutor()",
        "os.fork()",
    ],
    "global-state": [
        "global LIMIT\nLIMIT = 4",
        "global LIMIT\nLIMIT += 1",
        "CACHE['x'] = 1",
        "del CACHE['x']",
        "CACHE.update(x=1)",
        "CACHE.setdefault('x', 1)",
        "SEEN.add('x')",
        "NAMES.append('x')",
        "NAMES[0], rest = 'x', 1",
        "own = CACHE\nown['x'] = 1",
        "next(NUMBERS)",
        "SETTINGS.debug = True",
        "Settings.debug = True",
        "Settings.seen.append(1)",
        "setattr(SETTINGS, 'debug', True)",
        "globals()['LIMIT'] = 4",
        "json.encoder = None",
        "worker.limit = 3",
    ],
    "set-order": [
        "for x in {1, 2}:\n    save(x)",
        "for x in set(names):\n    save(x)",
        "for x in frozenset(names):\n    save(x)",
        "for x in {name for name in names}:\n    save(x)",
        "for tag in tags:\n    save(tag)",
        "for x in SEEN:\n    save(x)",
        "own = set()\nown.add(given)\nfor x in own:\n    save(x)",
        "own: set[str] = given\n[save(x) for x in own]",
        "own = set(names)\nown = own | tags\nlist(own)",
        "for x in set(names) - {'a'}:\n    save(x)",
        "for x in tags.union(names):\n    save(x)",
        "list(tags)",
        "tuple(tags)",
        "enumerate(tags)",
        "', '.join(tags)",
        "next(iter(tags))",
        "await gather(*tags)",
        "await worker.map(send, tags)",
        "first, *rest = tags",
        "[*tags]",
        "{tag: 1 for tag in tags}",
        "any([save(tag) for tag in tags])",
        "any(save(tag) for tag in tags)",
        "tags.pop()",
        "dict.fromkeys(tags)",
        "for x in given.keys() & {'a': 1}.keys():\n    save(x)",
        "list(itertools.chain(tags, names))",
        "given.extend(tags)",
        "def inner():\n    yield from tags",
        "for tag in tags if given else set():\n    save(tag)",
    ],
    "hash": ["hash(given)", "id(given)", "sorted(names, key=hash)"],
    "finally": [
        "try:\n    pass\nfinally:\n    await send('a')",
        "try:\n    pass\nfinally:\n    save('a')",
        "try:\n    pass\nfinally:\n    wait(send('a'))",
        "try:\n    pass\nfinally:\n    await sleep(3)",
        "try:\n    pass\nfinally:\n    if given:\n        await store('a')",
        "try:\n    pass\nfinally:\n    await child('a')",
        "try:\n    pass\nexcept BaseException:\n    save('a')\n    raise",
        "try:\n    pass\nexcept:\n    save('a')\n    raise",
        "try:\n    pass\nexcept (ValueError, BaseException):\n    save('a')",
    ],
    "not-awaited": [
        "send('a')",
        "store('a')",
        "sleep(3)",
        "sleep_until(given)",
        "worker.sleep(3)",
        "gather(send('a'), send('b'))",
        "child('a')",
        "if given:\n    send('a')",
        "def inner():\n    send('a')",
        "dropped = send('a')",
    ],
}
LEFT_ALONE = [
    "time.localtime(given)",
    "time.strftime('%Y', given)",
    "datetime.datetime.fromisoformat(given)",
    "datetime.datetime(2026, 1, 1) + datetime.timedelta(days=1)",
    "now().isoformat()",
    "worker.random(), worker.uuid()",
    "random.Random(7).random()",
    "own = random.Random(given)\nown.shuffle(names)",
    "np.random.default_rng(7).random()",
    "uuid.uuid5(uuid.NAMESPACE_URL, 'x')",
    "uuid.UUID(given)",
    "os.path.join('a', 'b')",
    "Path('a') / 'b'",
    "Path('a').name",
    "io.StringIO()",
    "json.dumps(given)",
    "urllib.parse.quote(given)",
    "hashlib.sha256(b'').hexdigest()",
    "print(given)",
    "log.info('welcome %s', given)",
    "raise TimeoutError",
    "try:\n    await send('a')\nexcept (asyncio.TimeoutError, requests.RequestException, OSError):\n    pass",
    "try:\n    await send('a')\nexcept Exception:\n    save('a')",
    "try:\n    await send('a')\nfinally:\n    log.info('done')",
    "try:\n    await send('a')\nfinally:\n    def later():\n        save('a')",
    "try:\n    await send('a')\nexcept BaseException:\n    log.info('parked')\n    raise",
    "subprocess.CalledProcessError(1, 'x')",
    "socket.AF_INET",
    "asyncio.iscoroutine(given)",
    "math.sqrt(2)",
    "own = {}\nown['x'] = 1\nown.update(y=2)",
    "own = []\nown.append(LIMIT)",
    "own = list(NAMES)\nown.append('x')",
    "own = CACHE.copy()\nown['x'] = 1",
    "CACHE.get('x')",
    "given.x = 1\ngiven['y'] = 2\ngiven.append(3)",
    "count = 0\ndef inner():\n    nonlocal count\n    count += 1",
    "own = Settings()\nown.debug = True",
    "sorted(tags)",
    "sorted(set(names))",
    "for x in sorted(tags):\n    save(x)",
    "sorted(x.lower() for x in tags)",
    "sorted(list(tags))",
    "len(tags), min(tags), max(tags), sum(tags), 'a' in tags",
    "any(tag == 'x' for tag in tags)",
    "{tag.lower() for tag in tags}",
    "frozenset(tags) | set(names)",
    "set(names).update(x for x in tags)",
    "own = set(names)\nown = sorted(own)\nfor x in own:\n    save(x)",
    "for x in {'a': 1}:\n    save(x)",
    "for x in dict.fromkeys(names):\n    save(x)",
    "for x in given.keys():\n    save(x)",
    "for x in names:\n    save(x)",
    "await send('a')",
    "wait(send('a'))",
    "save('a')",
    "own = send('a')\nawait own",
    "return sleep(3)",
    "await gather(send('a'), send('b'))",
    "await gather(*[send(name) for name in names])",
    "own = [send(name) for name in names]",
    "current_run().id",
    "@step\ndef inner():\n    return time.time()",
    "given.sleep(1), given.now(), given.open()",
    "given: 'time.time()' = 1",
    "'os.environ'",
]


@pytest.mark.parametrize(
    ("rule", "body"), [(rule, body) for rule, bodies in FOUND.items() for body in bodies]
)
def test_a_rule_finds(rule: str, body: str, tmp_path: Path) -> None:
    found = rules_in(tmp_path, body)
    assert found
    assert set(found) == {rule}


@pytest.mark.parametrize("body", LEFT_ALONE)
def test_nothing_is_found_in(body: str, tmp_path: Path) -> None:
    assert rules_in(tmp_path, body) == []


def test_every_rule_is_tried_here_or_beside_the_comments() -> None:
    assert set(FOUND) == set(RULES) - {"unknown-rule", "unused-ignore"}


def test_what_is_one_mistake_is_one_finding(tmp_path: Path) -> None:
    assert rules_in(tmp_path, "print(os.environ.get('HOME').lower(), random.choice(names).title())") == [
        "environment",
        "random",
    ]


@pytest.mark.parametrize(
    ("body", "instead"),
    [
        ("await asyncio.sleep(1)", "await sleep(…) of Stepwell"),
        ("await asyncio.gather()", "use gather(…) of Stepwell"),
        ("await asyncio.wait_for(given, 1)", "@step(timeout=…)"),
        ("uuid.uuid4()", "use uuid() of Stepwell"),
        ("send('a')", "await it"),
        ("def inner():\n    send('a')", "wrap it: wait(send(…))"),
    ],
)
def test_the_advice_fits_what_was_found(body: str, instead: str, tmp_path: Path) -> None:
    (found,) = findings(tmp_path, FLOW + textwrap.indent(body, "    "))
    assert instead in found.instead


def test_a_finding_says_what_and_where(tmp_path: Path) -> None:
    (found,) = findings(
        tmp_path,
        """\
        from datetime import datetime
        from worker import workflow

        @workflow
        def flow():
            return (
                datetime.now()
            )
        """,
    )
    assert (found.path, found.line, found.column) == ("flows.py", 7, 9)
    assert found.message == "datetime.now() gives another time in every replay; use now() of Stepwell"
