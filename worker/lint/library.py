"""Which functions of the standard library, and of libraries that many use, are which rule's business.

Each line below names a module or class and what of it counts:

- `name` is a function, `name/2` one that is harmless with two arguments or more, as `strftime` of a given time;
- `name.*` is an object and all that belongs to it, `*` is all that belongs to what the line names;
- `-name` is harmless with all that belongs to it, whatever else the line says.

Errors are always harmless: a body may catch and raise what it likes.
"""

from __future__ import annotations

import builtins
from dataclasses import dataclass, field

from worker.lint import rules
from worker.lint.rules import Rule

_TABLE: dict[Rule, str] = {
    rules.CLOCK: """
        time: time time_ns monotonic monotonic_ns perf_counter perf_counter_ns process_time process_time_ns
        time: thread_time thread_time_ns clock_gettime clock_gettime_ns
        time: localtime/1 gmtime/1 ctime/1 asctime/1 strftime/2
        datetime.datetime: now utcnow today
        datetime.date: today
        email.utils: localtime/1 formatdate/1
        timeit: *
        pandas.Timestamp: now utcnow today
        pendulum: now today tomorrow yesterday
        arrow: now utcnow
        arrow.Arrow: now utcnow
        django.utils.timezone: now localdate/1 localtime/1
    """,
    rules.RANDOM: """
        random: * -Random
        random: Random/1 SystemRandom.*
        secrets: * -compare_digest
        uuid: uuid1 uuid4 uuid6 uuid7
        os: urandom getrandom
        ssl: RAND_bytes
        email.utils: make_msgid
        numpy.random: * -Generator -SeedSequence -RandomState -default_rng -PCG64 -MT19937 -Philox
        numpy.random: default_rng/1 RandomState/1 SeedSequence/1
        bcrypt: gensalt
        shortuuid: uuid random
        nanoid: generate
        ulid: new ULID/1
        cryptography.fernet.Fernet: generate_key
    """,
    rules.ENVIRONMENT: """
        os: environ.* environb.* getenv getenvb putenv unsetenv getpid getppid getuid geteuid getgid getegid
        os: getgroups getlogin uname cpu_count process_cpu_count getcwd getcwdb getloadavg sched_getaffinity
        os: getpgid getpgrp get_terminal_size sysconf
        os.path: abspath expanduser expandvars
        pathlib.Path: cwd home expanduser absolute
        sys: argv.* orig_argv.*
        platform: *
        socket: gethostname getfqdn
        shutil: which get_terminal_size
        getpass: getuser
        uuid: getnode
        multiprocessing: cpu_count
        locale: getlocale getdefaultlocale getpreferredencoding localeconv
        psutil: *
        dotenv: *
        decouple: config
    """,
    rules.IO: """
        builtins: open
        io: open open_code FileIO.*
        codecs: open
        os: access chdir chmod chown close dup dup2 fchmod fchown fdopen fstat fsync ftruncate fwalk kill killpg
        os: lchown link listdir listxattr lstat makedirs mkdir mkfifo mknod open pipe popen pread pwrite read
        os: readlink remove removedirs rename renames replace rmdir scandir sendfile stat statvfs symlink sync
        os: system truncate unlink utime walk write posix_spawn posix_spawnp execl execle execlp execlpe execv
        os: execve execvp execvpe spawnl spawnle spawnlp spawnlpe spawnv spawnve spawnvp spawnvpe startfile
        os.path: exists lexists getatime getmtime getctime getsize isfile isdir islink ismount realpath samefile
        pathlib.Path: read_text read_bytes write_text write_bytes open exists is_file is_dir is_symlink is_mount
        pathlib.Path: is_socket is_fifo iterdir glob rglob walk mkdir touch unlink rename replace rmdir stat lstat
        pathlib.Path: chmod lchmod symlink_to hardlink_to resolve readlink samefile owner group copy move
        sys.stdin: *
        shutil: copy copy2 copyfile copyfileobj copymode copystat copytree rmtree move disk_usage chown
        shutil: make_archive unpack_archive
        glob: glob iglob
        fileinput: *
        tempfile: *
        importlib.resources: *
        pkgutil: get_data
        linecache: getline getlines
        gzip: open
        bz2: open
        lzma: open
        shelve: open
        dbm: open
        mmap: mmap.*
        fcntl: *
        subprocess: * -list2cmdline
        pty: *
        webbrowser: *
        socket: * -inet_aton -inet_ntoa -inet_pton -inet_ntop -htonl -htons -ntohl -ntohs
        urllib.request: * -Request -quote -unquote -pathname2url -url2pathname
        urllib3: * -Retry -Timeout -util
        http.client: HTTPConnection.* HTTPSConnection.*
        ftplib: *
        smtplib: *
        imaplib: *
        poplib: *
        xmlrpc.client: ServerProxy.*
        requests: * -Request -PreparedRequest -Response -codes -utils -auth -structures -status_codes -exceptions
        httpx: * -URL -Timeout -Limits -Headers -QueryParams -Request -Response -Cookies -codes -Auth -BasicAuth
        httpx: -DigestAuth
        aiohttp: * -ClientTimeout -BasicAuth -FormData -ClientResponse -hdrs
        aiofiles: *
        websockets: *
        paramiko: *
        grpc: insecure_channel secure_channel
        grpc.aio: insecure_channel secure_channel
        sqlite3: * -Row -register_adapter -register_converter
        psycopg: connect Connection.* AsyncConnection.* Cursor.* AsyncCursor.*
        psycopg_pool: *
        psycopg2: connect
        psycopg2.extensions: connection.* cursor.*
        asyncpg: connect create_pool Connection.* Pool.*
        pymysql: connect
        MySQLdb: connect
        oracledb: connect
        pyodbc: connect
        sqlalchemy: create_engine Engine.* Connection.*
        sqlalchemy.orm: Session.* scoped_session.* sessionmaker.*
        sqlalchemy.ext.asyncio: create_async_engine AsyncEngine.* AsyncConnection.* AsyncSession.*
        sqlalchemy.ext.asyncio: async_sessionmaker.* async_scoped_session.*
        django.db.models.Model: objects.* save delete refresh_from_db asave adelete arefresh_from_db
        django.db: connection.* connections.* transaction.*
        django.core.mail: *
        django.core.cache: cache.* caches.*
        redis: Redis.* StrictRedis.* from_url
        redis.asyncio: Redis.* from_url
        pymongo: MongoClient.* AsyncMongoClient.*
        motor.motor_asyncio: *
        elasticsearch: Elasticsearch.* AsyncElasticsearch.*
        boto3: *
        botocore.session: *
        aioboto3: *
        google.cloud: *
        pika: BlockingConnection.*
        kafka: KafkaProducer.* KafkaConsumer.*
        confluent_kafka: Producer.* Consumer.*
        aiokafka: AIOKafkaProducer.* AIOKafkaConsumer.*
        stripe: *
        slack_sdk: *
        twilio.rest: *
        sendgrid: SendGridAPIClient.*
        pandas: read_csv read_json read_excel read_parquet read_sql read_sql_query read_sql_table read_html
        pandas: read_xml read_feather read_pickle
        outbox: Client.* AsyncClient.*
    """,
    rules.BLOCKING: """
        time: sleep
        builtins: input breakpoint
        pdb: set_trace
        getpass: getpass
        select: *
        selectors: *
        signal: pause sigwait sigwaitinfo sigtimedwait
        os: wait wait3 wait4 waitpid waitid
        queue: Queue.* LifoQueue.* PriorityQueue.* SimpleQueue.*
        multiprocessing: Queue.* SimpleQueue.* JoinableQueue.*
        threading.Event: wait
        threading.Thread: join
        threading.Barrier: wait
        threading.Condition: acquire wait wait_for __enter__
        threading.Lock: acquire __enter__
        threading.RLock: acquire __enter__
        threading.Semaphore: acquire __enter__
        threading.BoundedSemaphore: acquire __enter__
        concurrent.futures: wait as_completed
        concurrent.futures.Future: result exception
        sched.scheduler: run
        tenacity: Retrying.* AsyncRetrying.*
    """,
    rules.ASYNCIO: """
        asyncio: * -iscoroutine -iscoroutinefunction -isfuture
        anyio: *
        trio: * -Cancelled
        uvloop: *
    """,
    rules.THREAD: """
        threading: *
        _thread: *
        multiprocessing: * -current_process
        concurrent.futures: *
        joblib: *
        os: fork forkpty
    """,
    rules.SET_ORDER: """
        builtins.set: pop
    """,
    rules.HASH: """
        builtins: hash id
    """,
}

_INSTEAD = {
    "time.sleep": "await sleep(…) of Stepwell, which is durable, in a def body wait(sleep(…))",
    "tenacity.Retrying": "let the @step retry: @step(retry=retrying(…))",
    "tenacity.AsyncRetrying": "let the @step retry: @step(retry=retrying(…))",
    "uuid.uuid1": "use uuid() of Stepwell",
    "uuid.uuid4": "use uuid() of Stepwell",
    "uuid.uuid6": "use uuid() of Stepwell",
    "uuid.uuid7": "use uuid() of Stepwell",
    "builtins.set.pop": "take the first of them in an order: min(…), or sorted(…)",
    "outbox.Client": "enqueue in a @step, whose result is recorded",
    "outbox.AsyncClient": "enqueue in a @step, whose result is recorded",
    **dict.fromkeys(
        ("asyncio.sleep", "anyio.sleep", "anyio.sleep_until", "trio.sleep", "trio.sleep_until"),
        "await sleep(…) of Stepwell, which is durable",
    ),
    **dict.fromkeys(
        (
            "asyncio.timeout", "asyncio.timeout_at", "asyncio.wait_for", "anyio.fail_after", "anyio.move_on_after",
            "trio.fail_after", "trio.move_on_after",
        ),
        "give the step a timeout: @step(timeout=…)",
    ),
    **dict.fromkeys(
        (
            "asyncio.gather", "asyncio.create_task", "asyncio.ensure_future", "asyncio.TaskGroup",
            "anyio.create_task_group", "trio.open_nursery",
        ),
        "use gather(…) of Stepwell",
    ),
    **dict.fromkeys(
        ("asyncio.wait", "asyncio.as_completed"), "use gather(…) or first(…) of Stepwell"
    ),
    **dict.fromkeys(
        (
            "asyncio.Event", "asyncio.Lock", "asyncio.Condition", "asyncio.Semaphore", "asyncio.BoundedSemaphore",
            "asyncio.Barrier", "asyncio.Queue", "asyncio.LifoQueue", "asyncio.PriorityQueue",
        ),
        "leave it out, nothing else touches what a body holds; what steps share is guarded in the @step",
    ),
    **dict.fromkeys(
        ("asyncio.run", "anyio.run", "trio.run"), "await it in an async body, in a def body wait(…) of Stepwell"
    ),
    **dict.fromkeys(
        ("asyncio.to_thread", "anyio.to_thread", "trio.to_thread"), "make it a def @step, which has a thread"
    ),
}  # fmt: skip

# The same thing under the name of the module that happens to hold it.
_ALIASES = {
    "posixpath": "os.path",
    "pathlib.PosixPath": "pathlib.Path",
    "builtins.frozenset": "builtins.set",
    "typing.Set": "builtins.set",
    "typing.FrozenSet": "builtins.set",
    "typing.AbstractSet": "builtins.set",
    "typing.MutableSet": "builtins.set",
    "collections.abc.Set": "builtins.set",
    "collections.abc.MutableSet": "builtins.set",
    "typing.List": "builtins.list",
    "typing.Dict": "builtins.dict",
    "typing.DefaultDict": "collections.defaultdict",
    "typing.Deque": "collections.deque",
    "requests.sessions.Session": "requests.Session",
    "requests.api": "requests",
    "psycopg.connection.Connection": "psycopg.Connection",
    "psycopg.connection_async.AsyncConnection": "psycopg.AsyncConnection",
    "sqlalchemy.engine": "sqlalchemy",
    "sqlalchemy.engine.base": "sqlalchemy",
    "sqlalchemy.orm.session": "sqlalchemy.orm",
    "sqlalchemy.ext.asyncio.session": "sqlalchemy.ext.asyncio",
    "sqlalchemy.ext.asyncio.engine": "sqlalchemy.ext.asyncio",
    "django.db.models.base.Model": "django.db.models.Model",
    "redis.client.Redis": "redis.Redis",
    "redis.asyncio.client.Redis": "redis.asyncio.Redis",
    "outbox.client": "outbox",
}

_RESULTS = {
    "builtins.open": "io.TextIOWrapper",
    "builtins.sorted": "builtins.list",
    "sqlite3.connect": "sqlite3.Connection",
    "psycopg.connect": "psycopg.Connection",
    "psycopg.Connection.connect": "psycopg.Connection",
    "psycopg.AsyncConnection.connect": "psycopg.AsyncConnection",
    "sqlalchemy.create_engine": "sqlalchemy.Engine",
    "sqlalchemy.ext.asyncio.create_async_engine": "sqlalchemy.ext.asyncio.AsyncEngine",
    "sqlalchemy.orm.sessionmaker.__call__": "sqlalchemy.orm.Session",
    "sqlalchemy.ext.asyncio.async_sessionmaker.__call__": "sqlalchemy.ext.asyncio.AsyncSession",
    "redis.from_url": "redis.Redis",
    "redis.asyncio.from_url": "redis.asyncio.Redis",
    "boto3.client": "boto3.Client",
    "boto3.resource": "boto3.Resource",
    "requests.session": "requests.Session",
    "numpy.random.default_rng": "numpy.random.Generator",
    **{
        f"builtins.set.{method}": "builtins.set"
        for method in ("copy", "union", "intersection", "difference", "symmetric_difference")
    },
    **{
        f"pathlib.Path.{method}": "pathlib.Path"
        for method in (
            "joinpath", "with_name", "with_stem", "with_suffix", "with_segments", "relative_to", "resolve", "absolute",
            "expanduser", "cwd", "home",
        )
    },
}  # fmt: skip

_LOWERCASE_CLASSES = frozenset(
    {f"builtins.{name}" for name in ("set", "list", "dict", "bytearray")}
    | {f"collections.{name}" for name in ("deque", "defaultdict")}
    | {f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta")}
    | {f"itertools.{name}" for name in ("count", "cycle")}
    | {f"sqlalchemy.{name}" for name in ("orm.sessionmaker", "orm.scoped_session")}
    | {f"sqlalchemy.ext.asyncio.{name}" for name in ("async_sessionmaker", "async_scoped_session")}
    | {"socket.socket", "mmap.mmap", "sched.scheduler"}
)

_PURE = frozenset(
    f"worker.{name}"
    for name in (
        "call", "current_run", "current_step", "in_step", "now", "patched", "random", "retire_patch", "retrying", "step", "transaction", "uuid",
        "workflow",
    )
)  # fmt: skip

AWAITED = frozenset(
    f"worker.{name}" for name in ("call", "first", "gather", "map", "sleep", "sleep_until", "wait_signal")
)
"""What does nothing until it is awaited."""

SEEDED = ("random.Random.", "numpy.random.Generator.", "numpy.random.RandomState.")
"""Generators that repeat themselves if only one run draws from them."""

_CALLERS = ("builtins.filter", "builtins.iter", "builtins.map", "builtins.max", "builtins.min", "builtins.sorted",
           "functools.partial", "functools.reduce", "itertools.", "builtins.list.sort")  # fmt: skip

READ = frozenset({"os.environ", "os.environb", "sys.argv", "sys.orig_argv"})
"""What counts without being called."""

BUILTINS = frozenset(dir(builtins))


@dataclass
class _Knowledge:
    functions: dict[str, tuple[Rule, int | None]] = field(default_factory=dict)
    roots: dict[str, Rule | None] = field(default_factory=dict)

    def learn(self, rule: Rule, line: str) -> None:
        owner, _, names = line.partition(":")
        for name in names.split():
            if name == "*":
                self.roots[owner] = rule
            elif name.startswith("-"):
                self.roots[f"{owner}.{name[1:]}"] = None
            elif name.endswith(".*"):
                self.roots[f"{owner}.{name[:-2]}"] = rule
            else:
                function, _, harmless_from = name.partition("/")
                self.functions[f"{owner}.{function}"] = rule, int(harmless_from) if harmless_from else None


_KNOWLEDGE = _Knowledge()
for _rule, _lines in _TABLE.items():
    for _line in _lines.strip().splitlines():
        _KNOWLEDGE.learn(_rule, _line.strip())


def canonical(name: str) -> str:
    """Return the name under which the tables here know what `name` names."""
    if name.startswith("worker.") and name.rpartition(".")[0].islower():
        return f"worker.{name.rpartition('.')[2]}"  # in whichever module of it a user has found that
    head = name
    while head:
        if head in _ALIASES:
            return _ALIASES[head] + name[len(head) :]
        head = head.rpartition(".")[0]
    return name


def rule_of(name: str, arguments: int = 0) -> Rule | None:
    """Return the rule that a call of `name` with so many arguments breaks, None for a harmless one."""
    if name.rpartition(".")[2].endswith(("Error", "Exception", "Warning")):
        return None
    known = _KNOWLEDGE.functions.get(name)
    if known is not None:
        rule, harmless_from = known
        return None if harmless_from is not None and arguments >= harmless_from else rule
    head = name
    while head:
        if head in _KNOWLEDGE.roots:
            return _KNOWLEDGE.roots[head]
        head = head.rpartition(".")[0]
    return None


def instead_of(name: str, rule: Rule) -> str:
    """Return what to write instead of `name`."""
    head = name
    while head:
        if head in _INSTEAD:
            return _INSTEAD[head]
        head = head.rpartition(".")[0]
    return rule.instead


def is_durable(name: str) -> bool:
    """Tell whether a call of `name` is recorded, so that a run may be parked at it."""
    return name.startswith("worker.") and name.islower() and name not in _PURE


def is_caller(name: str) -> bool:
    """Tell whether `name` calls the functions that it is given."""
    return name.startswith(_CALLERS)


def is_class(name: str) -> bool:
    """Tell whether calling `name` makes an instance of it, as far as a name can tell."""
    last = name.rpartition(".")[2]
    return name in _LOWERCASE_CLASSES or last[:1].isupper()


def result_of(name: str) -> str | None:
    """Return the class of what a call of `name` gives, if that is known."""
    return _RESULTS.get(name) or (name if is_class(name) else None)


def shown(name: str) -> str:
    """Return a name as its user writes it."""
    return (
        name.removeprefix("builtins.")
        .replace("datetime.datetime.", "datetime.")
        .replace("datetime.date.", "date.")
    )
