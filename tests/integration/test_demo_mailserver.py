"""The demo's mail provider, as the process that it is, with clients that break off and clients that die."""

from __future__ import annotations

import signal
import smtplib
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import EmailMessage
from pathlib import Path
from uuid import UUID

import pytest

from tests.waiting import wait_until
from worker import NOT_DONE
from worker.context import StepInfo, executing
from worker.demo import workflows
from worker.demo.maildir import Maildir, Message
from worker.demo.workflows import Lead, send_welcome
from worker.replay.records import RunFacts

RUN = UUID("0193f0aa-0000-7000-8000-000000000001")
NAME = f"{RUN}_1"
MESSAGE_ID = f"<{NAME}@stepwell.example>"
LEAD = Lead(
    id=7,
    name="Jürgen Größmann",
    email="jürgen@zurmühle.example",
    source="website",
    locale="de-DE",
    country="DE",
    signed_up_at=datetime(2026, 11, 1, tzinfo=UTC),
)
SLOW_SECONDS = 0.5
"""A latency that leaves time to act in the middle of a conversation."""


@dataclass
class Server:
    """A running provider."""

    process: subprocess.Popen[str]
    port: int
    maildir: Maildir

    def messages(self) -> list[Message]:
        return list(self.maildir.messages())


def start(directory: Path, *arguments: str) -> Server:
    process = subprocess.Popen(
        [sys.executable, "-m", "worker.demo.mailserver", "--maildir", str(directory), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return Server(process, int(process.stdout.readline()), Maildir(directory))


@contextmanager
def serving(directory: Path, *arguments: str) -> Iterator[Server]:
    server = start(directory, *arguments)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
        for pipe in (server.process.stdin, server.process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "mail") as started:
        yield started


@pytest.fixture
def slow_server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "mail", "--latency", str(2 * SLOW_SECONDS)) as started:
        yield started


def mail(message_id: str = MESSAGE_ID, to: str = "lead@example.com", execution: int = 1) -> EmailMessage:
    made = EmailMessage()
    made["From"] = "welcome@stepwell.example"
    made["To"] = to
    made["Subject"] = "Добро пожаловать"
    made["Message-ID"] = message_id
    made["X-Execution"] = str(execution)
    made.set_content("Hello\n.\n.. and a line that begins with dots\n")
    return made


def send(server: Server, message: EmailMessage, name: str = NAME) -> None:
    with smtplib.SMTP("127.0.0.1", server.port, local_hostname=name, timeout=20) as smtp:
        smtp.send_message(message)


class Conversation:
    """A client that speaks SMTP line by line, so that it can stop anywhere."""

    def __init__(self, port: int, name: str = NAME) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.lines = self.socket.makefile("rb")
        self.read()
        self.ask(f"EHLO {name}")

    def read(self) -> str:
        while (line := self.lines.readline())[3:4] == b"-":
            pass
        return line.decode()

    def ask(self, line: str) -> str:
        self.write(f"{line}\r\n")
        return self.read()

    def write(self, text: str) -> None:
        self.socket.sendall(text.encode())

    def close(self) -> None:
        self.lines.close()
        self.socket.close()


# A client in a process of its own: says that it has sent its part, then waits to be killed.
CLIENT = f"""
import smtplib, sys
smtp = smtplib.SMTP("127.0.0.1", int(sys.argv[1]), local_hostname="{NAME}")
smtp.ehlo()
smtp.mail("a@example.com")
smtp.rcpt("b@example.com")
assert smtp.docmd("DATA")[0] == 354
text = "Message-ID: {MESSAGE_ID}\\r\\nX-Execution: 1\\r\\n\\r\\nHello\\r\\n"
smtp.send(text + sys.argv[2].replace("|", "\\r\\n"))
print("sent", flush=True)
sys.stdin.read()
"""


def kill_client_after_it_sent(server: Server, ending: str) -> None:
    """Have a client process send a message up to `ending`, and SIGKILL it there."""
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(server.port), ending],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == "sent\n"
    finally:
        client.kill()
        client.communicate()


# -- what is stored ----------------------------------------------------------------------------------


def test_a_message_is_stored_when_the_client_is_told_so(server: Server) -> None:
    send(server, mail(to="jürgen@zurmühle.example"))

    assert server.messages() == [Message(MESSAGE_ID, "jürgen@zurmühle.example", 1)]
    found = server.maildir.find(MESSAGE_ID)
    assert found is not None
    assert found.parent.name == "new"
    assert b"\n.\n.. and a line" in found.read_bytes()
    assert list((server.maildir.path / "tmp").iterdir()) == []


def test_the_same_message_twice_is_there_twice(server: Server) -> None:
    send(server, mail())
    send(server, mail())

    assert [message.message_id for message in server.messages()] == [MESSAGE_ID, MESSAGE_ID]


def test_many_clients_at_once_lose_nothing(server: Server) -> None:
    def send_one(number: int) -> None:
        send(server, mail(f"<{number}@x>", f"lead{number}@example.com"), f"client{number}")

    with ThreadPoolExecutor(32) as threads:
        list(threads.map(send_one, range(200)))

    assert {message.recipient for message in server.messages()} == {
        f"lead{n}@example.com" for n in range(200)
    }
    assert len(server.messages()) == 200
    wait_until(lambda: not server.maildir.connections())


def test_a_message_is_found_by_its_own_id_only(server: Server) -> None:
    send(server, mail())

    assert server.maildir.find("<somebody-else@stepwell.example>") is None


def test_a_mail_reader_may_move_a_message_on(server: Server) -> None:
    send(server, mail())
    stored = server.maildir.find(MESSAGE_ID)
    assert stored is not None
    stored.rename(server.maildir.path / "cur" / f"{stored.name}:2,S")

    assert server.maildir.find(MESSAGE_ID) is not None


# -- clients that break off --------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["", "and no line end", "|.", "|..|"])
def test_half_a_message_is_never_stored(server: Server, ending: str) -> None:
    kill_client_after_it_sent(server, ending)

    server.maildir.wait_until_closed(NAME, 10)
    assert server.messages() == []
    assert list((server.maildir.path / "tmp").iterdir()) == []


def test_a_whole_message_is_stored_although_its_client_died_before_the_answer(slow_server: Server) -> None:
    kill_client_after_it_sent(slow_server, ".|")

    # The client is dead, the server has all of its message and has not written it yet.
    assert slow_server.messages() == []
    assert slow_server.maildir.is_being_served(NAME)
    slow_server.maildir.wait_until_closed(NAME, 10)
    assert [message.message_id for message in slow_server.messages()] == [MESSAGE_ID]


def test_a_connection_is_listed_before_its_ehlo_is_answered(slow_server: Server) -> None:
    with socket.create_connection(("127.0.0.1", slow_server.port)) as client:
        client.recv(512)
        client.sendall(f"EHLO {NAME}\r\n".encode())

        wait_until(lambda: slow_server.maildir.is_being_served(NAME))
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(512)


def test_each_connection_of_one_name_is_waited_for(server: Server) -> None:
    first, second = Conversation(server.port), Conversation(server.port)
    assert server.maildir.is_being_served(NAME)
    assert not server.maildir.is_being_served(NAME[:-1])

    first.close()
    with pytest.raises(TimeoutError, match=f"connection of {NAME}"):
        server.maildir.wait_until_closed(NAME, 0.3)
    second.close()
    server.maildir.wait_until_closed(NAME, 10)


def test_a_name_that_is_a_path_stays_in_the_list(server: Server) -> None:
    hostile = "../../../../tmp/elsewhere"
    client = Conversation(server.port, hostile)

    assert server.maildir.is_being_served(hostile)
    assert len(server.maildir.connections()) == 1
    client.close()


# -- what verify makes of it -------------------------------------------------------------------------


@pytest.fixture
def in_a_step(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The second execution of step 1 of a run."""
    with as_execution(server, monkeypatch, 2):
        yield server


@contextmanager
def as_execution(server: Server, monkeypatch: pytest.MonkeyPatch, execution: int) -> Iterator[None]:
    monkeypatch.setenv("STEPWELL_DEMO_SMTP", f"127.0.0.1:{server.port}")
    monkeypatch.setenv("STEPWELL_DEMO_MAILDIR", str(server.maildir.path))
    facts = RunFacts(RUN, "welcome_lead", datetime(2026, 11, 1, tzinfo=UTC), "seed")
    with executing(facts, StepInfo(RUN, (1,), execution, 5)):
        yield


def test_the_step_sends_once_and_its_verify_then_finds_it(in_a_step: Server) -> None:
    assert workflows.already_sent(LEAD) is NOT_DONE

    assert send_welcome(LEAD) == MESSAGE_ID

    assert in_a_step.messages() == [Message(MESSAGE_ID, LEAD.email, 2)]
    assert workflows.already_sent(LEAD) == MESSAGE_ID


def test_verify_asks_only_when_the_earlier_connection_is_closed(
    slow_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_client_after_it_sent(slow_server, ".|")
    assert slow_server.maildir.find(MESSAGE_ID) is None

    with as_execution(slow_server, monkeypatch, 2):
        assert workflows.already_sent(LEAD) == MESSAGE_ID


def test_verify_says_not_done_of_a_message_that_broke_off(in_a_step: Server) -> None:
    kill_client_after_it_sent(in_a_step, "")

    assert workflows.already_sent(LEAD) is NOT_DONE


def test_verify_gives_no_answer_while_the_earlier_connection_is_open(
    in_a_step: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflows, "SMTP_TIMEOUT_SECONDS", 0.2)
    client = Conversation(in_a_step.port)

    with pytest.raises(TimeoutError):
        workflows.already_sent(LEAD)
    client.close()


# -- the process -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_on_a_signal_and_leaves_no_list(server: Server, number: int) -> None:
    client = Conversation(server.port)
    server.process.send_signal(number)

    assert server.process.wait(10) == 0
    assert server.maildir.connections() == []
    client.close()


def test_it_ends_when_its_input_ends(server: Server) -> None:
    assert server.process.stdin is not None
    server.process.stdin.close()

    assert server.process.wait(10) == 0


def test_it_does_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "mail")], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    port = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()

    wait_until(lambda: refuses(port))


PARENT = """
import subprocess, sys, time
command = [sys.executable, "-m", "worker.demo.mailserver", "--maildir", sys.argv[1]]
child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
print(child.stdout.readline(), end="", flush=True)
child.wait()
"""


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return True
    return False


def test_the_list_of_a_server_that_was_killed_is_cleared_by_the_next(tmp_path: Path) -> None:
    with serving(tmp_path / "mail") as first:
        client = Conversation(first.port)
        first.process.kill()
        first.process.wait()
        client.close()
        assert first.maildir.is_being_served(NAME)

    with serving(tmp_path / "mail") as second:
        assert not second.maildir.is_being_served(NAME)


def test_without_aiosmtpd_it_says_how_to_install_it(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['aiosmtpd'] = None; sys.modules['aiosmtpd.smtp'] = None\n"
        "from worker.demo.mailserver import main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "--maildir", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 1
    assert 'pip install "stepwell[demo]"' in result.stderr
    assert "Traceback" not in result.stderr


def test_a_port_that_is_taken_is_one_sentence(server: Server, tmp_path: Path) -> None:
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "worker.demo.mailserver",
            "--maildir",
            str(tmp_path),
            "--port",
            str(server.port),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 1
    assert f"cannot serve on 127.0.0.1:{server.port}" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_message_that_cannot_be_stored_is_refused_and_the_server_goes_on(server: Server) -> None:
    (server.maildir.path / "new").rename(server.maildir.path / "gone")
    with pytest.raises(smtplib.SMTPDataError, match="451"):
        send(server, mail())

    (server.maildir.path / "gone").rename(server.maildir.path / "new")
    send(server, mail())
    assert len(server.messages()) == 1
