"""A Postgres that speaks TLS on a loopback address, and refuses who does not: with certificates made for the test.

The embedded server is built without TLS, so that it takes one of the system's.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from outbox import embedded
from outbox.database import connect
from outbox.schema import migrate
from outbox.service_account import service_account
from tests.postgres import PREFIX, SETTINGS, binaries, places

HOST = "db.stepwell.test"
"""What the server's certificate is made out to. Nobody resolves it: the address is given beside it."""
PASSWORD = "a-Pass:word@with/all?of#it"

HBA = """
local   all all                          trust
hostssl all with_certificate 127.0.0.0/8 cert
hostssl all with_password    127.0.0.0/8 scram-sha-256
"""


@dataclass(frozen=True)
class Authority:
    """Somebody who signs certificates, with a directory for them."""

    directory: Path
    name: str

    @classmethod
    def made(cls, directory: Path, name: str) -> Authority:
        authority = cls(directory, name)
        _openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
            "-subj", f"/CN={name}", "-keyout", authority.key, "-out", authority.certificate,
        )  # fmt: skip
        return authority

    @property
    def certificate(self) -> Path:
        return self.directory / f"{self.name}.crt"

    @property
    def key(self) -> Path:
        return self.directory / f"{self.name}.key"

    def signs(self, name: str) -> tuple[Path, Path]:
        """Return (certificate, key) for a host or a user."""
        certificate, key, request = (self.directory / f"{name}.{end}" for end in ("crt", "key", "csr"))
        _openssl(
            "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", f"/CN={name}",
            "-addext", f"subjectAltName=DNS:{name}", "-keyout", key, "-out", request,
        )  # fmt: skip
        _openssl(
            "x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self.key, "-CAcreateserial", "-days", "2",
            "-copy_extensions", "copy", "-out", certificate,
        )  # fmt: skip
        key.chmod(0o600)
        return certificate, key


@dataclass(frozen=True)
class Encrypted:
    """A running server: how to reach it, and what its clients need."""

    address: str
    local_url: str
    right: Authority
    wrong: Authority
    certificate: Path
    key: Path

    def url(self, **options: object) -> str:
        """Return the URL for a role with a password; options are libpq's."""
        given = {
            "hostaddr": self.address,
            "sslmode": "verify-full",
            "sslrootcert": self.right.certificate,
            **options,
        }
        user = str(given.pop("user", "with_password"))
        secret = f":{_quoted(PASSWORD)}" if user == "with_password" else ""
        shown = {name: value for name, value in given.items() if value is not None}
        return f"postgresql://{user}{secret}@{HOST}:{embedded.PORT}/postgres?{urlencode(shown)}"

    def url_with_certificate(self, **options: object) -> str:
        """Return the URL for a role that shows a certificate instead of a password."""
        return self.url(user="with_certificate", sslcert=self.certificate, sslkey=self.key, **options)


@contextmanager
def encrypted_postgres() -> Iterator[Encrypted]:
    """Run a server with the schema until the end of the block. Raises LookupError where the machine has none."""
    programs = binaries(15)
    if shutil.which("openssl") is None:
        raise LookupError("there is no openssl on this machine to make certificates with")
    home = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=places()[0]))
    home.chmod(0o755)
    private = Path(tempfile.mkdtemp(prefix="stepwell-tls-"))  # the client's side
    server = None
    try:
        right, wrong = Authority.made(private, "right"), Authority.made(private, "wrong")
        certificate, key = right.signs("with_certificate")
        address = _free_address()
        settings = {
            **SETTINGS,
            "listen_addresses": address,
            "ssl": "on",
            "ssl_min_protocol_version": "TLSv1.2",
        }
        server = embedded.Server(home, programs, {**settings, **_server_files(home, right)})
        server.start()
        local = f"postgresql://postgres@/postgres?host={server.socket_dir()}&port={embedded.PORT}"
        _prepare(local)
        yield Encrypted(address, local, right, wrong, certificate, key)
    finally:
        if server is not None:
            server.stop("immediate")
        shutil.rmtree(home, ignore_errors=True)
        shutil.rmtree(private, ignore_errors=True)


def _server_files(home: Path, authority: Authority) -> dict[str, str]:
    """Put what the server reads into its home; return the settings that name it."""
    certificate, key = authority.signs(HOST)
    (home / "hba.conf").write_text(HBA)
    for source in (certificate, key, authority.certificate):
        shutil.copy(source, home / source.name)
    (home / key.name).chmod(0o600)
    if os.geteuid() == 0:
        account = service_account()
        os.chown(home / key.name, account.pw_uid, account.pw_gid)
    return {
        "hba_file": str(home / "hba.conf"),
        "ssl_cert_file": str(home / certificate.name),
        "ssl_key_file": str(home / key.name),
        "ssl_ca_file": str(home / authority.certificate.name),
    }


def _prepare(url: str) -> None:
    with connect(url, application_name="tests") as connection:
        migrate(connection)
        quoted = PASSWORD.replace("'", "''")
        connection.execute(
            f"create role with_password login password '{quoted}' in role stepwell_worker;"
            " create role with_certificate login in role stepwell_worker;"
            " create table seen (step text, ssl bool); grant insert on seen to stepwell_worker".encode()
        )


def _free_address() -> str:
    """Return a loopback address on which nobody serves Postgres: the port is fixed, the address is not."""
    for last in range(1, 255):
        address = f"127.{os.getpid() // 250 % 250 + 1}.{os.getpid() % 250 + 1}.{last}"
        with socket.socket() as probe:
            try:
                probe.bind((address, embedded.PORT))
            except OSError:
                continue
            return address
    raise LookupError(f"port {embedded.PORT} is taken on every loopback address that was tried")


def _openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def _quoted(text: str) -> str:
    from urllib.parse import quote

    return quote(text, safe="")
