"""Payloads that only those can read who have the key: `Keyring` seals and opens them, each value by itself.

A sealed value is a JSON object that stands where the value stood::

    {"stepwell:sealed": {"k": "2026", "d": "…"}}

`k` is the id of the key, `d` in base64 a random nonce of 24 bytes, the ciphertext and a tag of 16. Since each value names
its key, values of several keys live side by side: the first key of a ring seals, all open. A value that is not sealed
opens as itself, for SQL may enqueue and signal in plain text.

The cipher is XAES-256-GCM (c2sp.org/XAES-256-GCM): AES-256-GCM under a key that is derived for each value from the first
half of its nonce. With plain AES-GCM random nonces begin to be unsafe after 2^32 values of a key, which a busy system has
in weeks; here after 2^80. What is authenticated besides is what a value is and of what: `place`. So whoever can write to
the database can still repeat a value where one of the same sort and name belongs, and delete it, but not make one up,
change it, or have a signal "denied" taken for one "approved".

What the database knows of arguments, their fingerprints, is kept from whoever would guess them as well: see `Veil`.

Nothing here does I/O. `cryptography` is imported when there is a key, and not before.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec

from outbox.errors import ConfigError, PayloadError
from outbox.payloads import decode

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

MEMBER = "stepwell:sealed"
BEGINNING = f'{{"{MEMBER}":'
"""How a sealed value begins, and no other: cheap to ask of every value that is read."""
KEY_BYTES = 32

_NONCE_BYTES = 24
_TAG_BYTES = 16
_KEY_ID = re.compile(r"[A-Za-z0-9._-]{1,40}")
_ROUNDS = 8
_OPENLY = ("type", "reason")
"""What of an error is not sealed: what kind it is, and the few words of Stepwell's own on why a run is blocked."""


class Sealed(dict[str, Any]):
    """Stands for a value that cannot be opened here. Its text says why: "sealed with key 2026"."""

    def __init__(self, said: str) -> None:
        super().__init__({MEMBER: said})

    def __str__(self) -> str:
        return str(self[MEMBER])


def is_sealed(text: str) -> bool:
    """Tell whether JSON text is a sealed value."""
    return text.startswith(BEGINNING)


def key_of(text: str) -> str | None:
    """Return the id of the key that a value is sealed with; None for one that is not, or not as it should be."""
    try:
        return _envelope(text).k if is_sealed(text) else None
    except msgspec.MsgspecError:
        return None


def place(kind: str, name: str) -> bytes:
    """Return what a value is and of what, as it is authenticated: known to who seals and who opens, from elsewhere.

    kind: input and output, of a workflow; arguments, of a step; step, child and signal, what is recorded of them;
    state, of a key; stream, of its name; fault, of anything.
    """
    return f"stepwell 1\n{kind}\n{name}".encode()


class Keyring:
    """Keys by their ids, the one that seals first. An empty one seals nothing, and tells what it cannot open."""

    __slots__ = ("_keys",)

    def __init__(self, keys: Sequence[tuple[str, bytes]] = ()) -> None:
        self._keys = {name: _Key(name, secret) for name, secret in keys}

    @classmethod
    def of(cls, text: str) -> Keyring:
        """Return the ring that a setting describes: ``id:base64``, several with commas or line breaks between them.

        Raises ConfigError, which shows no part of a key.
        """
        keys: list[tuple[str, bytes]] = []
        entries = [entry.strip() for entry in re.split(r"[,\n]", text)]
        for number, entry in enumerate((each for each in entries if each), 1):
            name, separator, encoded = entry.partition(":")
            if not separator or not _KEY_ID.fullmatch(name):
                raise ConfigError(
                    f"encryption key number {number} is not written as id:key, with an id of letters, digits, '.', "
                    f"'_' and '-'; {_ADVICE}"
                )
            if name in dict(keys):
                raise ConfigError(f"encryption key {name!r} is given twice: give each key an id of its own")
            keys.append((name, _secret(name, encoded)))
        if not keys:
            raise ConfigError(f"there is no encryption key in what is given; {_ADVICE}")
        _require_cryptography()
        return cls(keys)

    def __bool__(self) -> bool:
        """Tell whether values are sealed."""
        return bool(self._keys)

    def __repr__(self) -> str:
        return f"Keyring({', '.join(self._keys)})"

    @property
    def ids(self) -> list[str]:
        """The ids of the keys; the first one seals."""
        return list(self._keys)

    def seal(self, text: str, kind: str, name: str) -> str:
        """Return JSON text sealed with the first key; as it is if there is none."""
        for key in self._keys.values():
            return f'{BEGINNING}{{"k":"{key.id}","d":"{key.sealed(text.encode(), place(kind, name))}"}}}}'
        return text

    def open(self, text: str, kind: str, name: str, *, where: str) -> str:
        """Return the JSON text in a sealed value, any other as it is. Raises PayloadError, beginning with `where`."""
        if not text.startswith(BEGINNING):
            return text
        try:
            envelope = _envelope(text)
        except msgspec.MsgspecError:
            raise PayloadError(
                f"{where} looks like a sealed value, but is none: it has no key and data"
            ) from None
        return self._opened(envelope, place(kind, name), where).decode()

    def seal_fault(self, fault: Mapping[str, Any]) -> dict[str, Any]:
        """Return a recorded error with everything sealed but its type and reason."""
        if not self._keys or MEMBER in fault:
            return dict(fault)
        hidden = {part: said for part, said in fault.items() if part not in _OPENLY}
        sealed = msgspec.json.decode(self.seal(_encode(hidden).decode(), "fault", ""))
        return {**{part: fault[part] for part in _OPENLY if part in fault}, "message": "sealed", **sealed}

    def open_fault(self, fault: dict[str, Any], *, where: str) -> dict[str, Any]:
        """Return a recorded error with what was sealed of it. Raises PayloadError, beginning with `where`."""
        if MEMBER not in fault:
            return fault
        try:
            envelope = msgspec.convert(fault[MEMBER], _Envelope)
        except msgspec.MsgspecError:
            raise PayloadError(
                f"{where} looks like a sealed value, but is none: it has no key and data"
            ) from None
        hidden = msgspec.json.decode(self._opened(envelope, place("fault", ""), where), type=dict[str, Any])
        return {**{part: fault[part] for part in _OPENLY if part in fault}, **hidden}

    # -- for people, who may look at what they cannot open

    def shown(self, text: str, kind: str, name: str, *, where: str) -> Any:
        """Return the decoded value in JSON text, or `Sealed` where it cannot be opened.

        SQL takes what nobody can decode (half characters, 1e400, a thousand brackets): that is shown as its text, so that
        the run which was given it can be listed, and its neighbours too.
        """
        try:
            opened = self.open(text, kind, name, where=where)
        except PayloadError:
            return Sealed(_said(key_of(text)))
        try:
            return decode(opened, where=where)
        except PayloadError:
            return opened

    def shown_fault(self, text: str, *, where: str) -> dict[str, Any]:
        """Return a recorded error in JSON text; where it cannot be opened its message says so."""
        fault: dict[str, Any] = decode(text, dict[str, Any], where=where)
        try:
            return self.open_fault(fault, where=where)
        except PayloadError:
            sealed = fault.pop(MEMBER)
            key = sealed.get("k") if isinstance(sealed, dict) else None
            said = _said(key)
            return {**fault, "message": f"{fault['reason']} ({said})" if "reason" in fault else said}

    # -- fingerprints

    def veil(self, input: str, seed: UUID) -> Veil | None:
        """Return what veils the fingerprints of a run: by the key of its input, which stays, and by its seed.

        None for a run whose input is not sealed. Raises PayloadError without that key.
        """
        name = key_of(input)
        if name is None:
            return None
        veiling = self._key(name, "the input").veiling
        return Veil(hashlib.blake2b(seed.bytes, key=veiling, digest_size=32).digest())

    def _opened(self, envelope: _Envelope, about: bytes, where: str) -> bytes:
        key = self._key(envelope.k, where)
        found = key.opened(envelope.d, about)
        if found is None:
            raise PayloadError(
                f"{where} cannot be opened with key {envelope.k!r}: it was changed, stands where another value belongs, "
                "or was sealed with another key of that id"
            )
        return found

    def _key(self, id: str, where: str) -> _Key:
        key = self._keys.get(id)
        if key is None:
            here = (
                f"the encryption keys here are {', '.join(self._keys)}"
                if self._keys
                else "no key is given here"
            )
            raise PayloadError(f"{where} is sealed with key {id!r}, and {here}")
        return key


NO_KEYS = Keyring()
"""Seals nothing, and opens what is not sealed."""


class Veil:
    """Fingerprints of a run as they are stored: each stands for one, and only who has the key knows for which.

    A fingerprint is a hash of arguments: of a yes or no, or of the name of a customer, it tells which. Under the veil it
    tells only whether two calls of the same run had the same arguments. It is a permutation of 64 bits, a Feistel network
    with a keyed hash for its rounds (Luby and Rackoff), so that what is read back is what was computed: whoever drives the
    body compares plain fingerprints and knows nothing of keys. A fork keeps the seed of its run, and so its fingerprints.
    """

    __slots__ = ("_keyed",)

    def __init__(self, key: bytes) -> None:
        self._keyed = hashlib.blake2b(key=key, digest_size=4)

    def hide(self, mark: int) -> int:
        """Return a fingerprint as it is stored."""
        left, right = _halves(mark)
        for number in range(_ROUNDS):
            left, right = right, left ^ self._round(number, right)
        return _whole(left, right)

    def reveal(self, stored: int) -> int:
        """Return the fingerprint that is stored as this."""
        left, right = _halves(stored)
        for number in reversed(range(_ROUNDS)):
            left, right = right ^ self._round(number, left), left
        return _whole(left, right)

    def _round(self, number: int, half: int) -> int:
        keyed = self._keyed.copy()
        keyed.update(bytes([number]) + half.to_bytes(4, "big"))
        return int.from_bytes(keyed.digest(), "big")


class _Envelope(msgspec.Struct):
    k: str
    d: str


class _Sealed(msgspec.Struct, forbid_unknown_fields=True):
    sealed: _Envelope = msgspec.field(name=MEMBER)


class _Key:
    """One key, and what is derived from it. It shows its id only."""

    __slots__ = ("_mac", "id", "veiling")

    def __init__(self, id: str, secret: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.algorithms import AES
        from cryptography.hazmat.primitives.cmac import CMAC

        self.id = id
        self._mac = CMAC(AES(secret))
        self.veiling = _derived(secret, b"stepwell fingerprints")

    def __repr__(self) -> str:
        return f"_Key({self.id})"

    def sealed(self, plain: bytes, about: bytes) -> str:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        hidden = self._cipher(nonce).encrypt(nonce[12:], plain, about)
        return base64.b64encode(nonce + hidden).decode()

    def opened(self, data: str, about: bytes) -> bytes | None:
        """Return the plain text, None if it is not what was sealed there."""
        from cryptography.exceptions import InvalidTag

        try:
            raw = base64.b64decode(data, validate=True)
        except ValueError:
            return None
        if len(raw) < _NONCE_BYTES + _TAG_BYTES:
            return None
        nonce = raw[:_NONCE_BYTES]
        try:
            return self._cipher(nonce).decrypt(nonce[12:], raw[_NONCE_BYTES:], about)
        except InvalidTag:
            return None

    def _cipher(self, nonce: bytes) -> AESGCM:
        """Return AES-256-GCM under the key that XAES-256-GCM derives for a nonce, by CMAC in counter mode."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        derived = b""
        for counter in (1, 2):
            mac = self._mac.copy()
            mac.update(bytes([0, counter]) + b"X\0" + nonce[:12])
            derived += mac.finalize()
        return AESGCM(derived)


_ADVICE = "make one with `stepwell encryption key`, or as `openssl rand -base64 32` with an id and a colon before it"

_envelopes = msgspec.json.Decoder(_Sealed)
_encode: Callable[[Any], bytes] = msgspec.json.Encoder().encode


def _envelope(text: str) -> _Envelope:
    return _envelopes.decode(text).sealed


def _said(key: str | None) -> str:
    return f"sealed with key {key}" if key else "sealed"


def _secret(id: str, encoded: str) -> bytes:
    try:
        secret = base64.b64decode(encoded.strip().translate(str.maketrans("-_", "+/")), validate=True)
    except ValueError:
        raise ConfigError(f"encryption key {id!r} is not written in base64; {_ADVICE}") from None
    if len(secret) != KEY_BYTES:
        raise ConfigError(f"encryption key {id!r} has {len(secret)} bytes, and not {KEY_BYTES}; {_ADVICE}")
    return secret


def _require_cryptography() -> None:
    try:
        import cryptography.hazmat.primitives.ciphers.aead  # noqa: F401 - only whether it is there
    except ImportError:
        raise ConfigError(
            'encryption keys are given, but what encrypts is not installed: pip install "stepwell[encryption]"'
        ) from None


def _derived(secret: bytes, purpose: bytes) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), KEY_BYTES, None, purpose).derive(secret)


def _halves(number: int) -> tuple[int, int]:
    whole = number & (1 << 64) - 1
    return whole >> 32, whole & (1 << 32) - 1


def _whole(left: int, right: int) -> int:
    whole = left << 32 | right
    return whole - (1 << 64) if whole >> 63 else whole
