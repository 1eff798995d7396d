"""Sealed values: they open as what they were, with their key, at their place, and with nothing else."""

from __future__ import annotations

import base64
import itertools
import json
import pickle
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox import PayloadError, Settings
from outbox.codec import decode, encode, encode_fault, fingerprint
from outbox.errors import ConfigError
from outbox.sealing import NO_KEYS, Keyring, Sealed, Veil, _Key, is_sealed, key_of
from worker.supervision.pipe import Briefing

SECRETS = {"a": bytes(range(32)), "b": bytes(range(1, 33)), "c": bytes(range(2, 34))}


def entry(name: str, secret: bytes | None = None) -> str:
    return f"{name}:{base64.b64encode(secret or SECRETS[name]).decode()}"


def ring(*names: str) -> Keyring:
    return Keyring.of(",".join(map(entry, names)))


A, B, BA = ring("a"), ring("b"), ring("b", "a")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 62), 1 << 62) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)
kinds = st.sampled_from(["input", "output", "arguments", "step", "child", "signal", "state", "stream"])
marks = st.integers(-(1 << 63), (1 << 63) - 1)


@pytest.mark.parametrize(
    ("secret", "about", "sealed"),
    [
        (b"\1" * 32, b"", "ce546ef63c9cc60765923609b33a9a1974e96e52daf2fcf7075e2271"),
        (b"\3" * 32, b"c2sp.org/XAES-256-GCM", "986ec1832593df5443a179437fd083bf3fdb41abd740a21f71eb769d"),
    ],
)
def test_the_cipher_is_the_one_that_c2sp_describes(secret: bytes, about: bytes, sealed: str) -> None:
    nonce = b"ABCDEFGHIJKLMNOPQRSTUVWX"
    cipher = _Key("a", secret)._cipher(nonce)
    assert cipher.encrypt(nonce[12:], b"XAES-256-GCM", about).hex() == sealed


# -- round trips ---------------------------------------------------------------------------------------


@given(value=json_values, kind=kinds, name=names)
def test_a_value_opens_as_the_very_text_that_was_sealed(value: Any, kind: str, name: str) -> None:
    text = json.dumps(value, ensure_ascii=False)
    sealed = A.seal(text, kind, name)
    assert is_sealed(sealed)
    assert key_of(sealed) == "a"
    assert isinstance(json.loads(sealed), dict), "it may stand where an input has to"
    for keyring in (A, BA):
        assert keyring.open(sealed, kind, name, where="x") == text
    assert sealed != A.seal(text, kind, name), "nobody sees that two values are the same"


@given(value=json_values, kind=kinds, name=names)
def test_a_plain_value_opens_as_itself(value: Any, kind: str, name: str) -> None:
    text = json.dumps(value)
    for keyring in (NO_KEYS, A):
        assert keyring.open(text, kind, name, where="x") == text
    assert NO_KEYS.seal(text, kind, name) == text


@given(value=json_values)
def test_the_first_key_seals_and_all_open(value: Any) -> None:
    text = json.dumps(value)
    assert key_of(BA.seal(text, "input", "w")) == "b"
    assert B.open(BA.seal(text, "input", "w"), "input", "w", where="x") == text
    assert BA.open(A.seal(text, "input", "w"), "input", "w", where="x") == text


def test_as_a_database_may_rewrite_json_it_still_opens() -> None:
    sealed = A.seal("17", "step", "s")
    rewritten = json.dumps(json.loads(sealed), sort_keys=True)
    assert rewritten != sealed
    assert A.open(rewritten, "step", "s", where="x") == "17"


# -- refusals ------------------------------------------------------------------------------------------


def test_without_its_key_a_value_does_not_open_and_the_key_is_named() -> None:
    sealed = A.seal("17", "step", "s")
    with pytest.raises(
        PayloadError, match=r"^the result is sealed with key 'a', and the encryption keys here are b$"
    ):
        B.open(sealed, "step", "s", where="the result")
    with pytest.raises(PayloadError, match=r"^the result is sealed with key 'a', and no key is given here$"):
        NO_KEYS.open(sealed, "step", "s", where="the result")
    with pytest.raises(PayloadError, match="another key of that id"):
        Keyring.of(entry("a", SECRETS["c"])).open(sealed, "step", "s", where="the result")


@given(kind=kinds, name=names, other_kind=kinds, other_name=names)
def test_a_value_opens_at_its_place_only(kind: str, name: str, other_kind: str, other_name: str) -> None:
    sealed = A.seal("17", kind, name)
    if (kind, name) == (other_kind, other_name):
        assert A.open(sealed, other_kind, other_name, where="x") == "17"
    else:
        with pytest.raises(PayloadError, match="stands where another value belongs"):
            A.open(sealed, other_kind, other_name, where="x")


@given(text=st.text(max_size=50), at=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_one_bit_that_is_changed_is_noticed(text: str, at: int, bit: int) -> None:
    envelope = json.loads(A.seal(json.dumps(text), "step", "s"))["stepwell:sealed"]
    raw = bytearray(base64.b64decode(envelope["d"]))
    raw[at % len(raw)] ^= 1 << bit
    changed = json.dumps({"stepwell:sealed": {**envelope, "d": base64.b64encode(raw).decode()}})
    with pytest.raises(PayloadError, match="it was changed"):
        A.open(changed, "step", "s", where="x")


@pytest.mark.parametrize(
    "inside",
    [
        "17", "null", "[]", "{}", '{"k":"a"}', '{"d":"AAAA"}', '{"k":1,"d":"x"}', '{"k":"a","d":null}',
        '{"k":"a","d":""}', '{"k":"a","d":"AAAA"}', '{"k":"a","d":"no base64!"}', '{"k":"zz","d":"AAAA"}',
        '{"k":"a","d":"\u00e4"}', '{"k":"a"', "",
    ],
)  # fmt: skip
def test_what_only_looks_like_a_sealed_value_is_refused_and_never_passed_on(inside: str) -> None:
    for text in (f'{{"stepwell:sealed":{inside}}}', f'{{"stepwell:sealed": {inside}}}'):
        for keyring in (NO_KEYS, A):
            with pytest.raises(PayloadError, match=r"^x "):
                keyring.open(text, "step", "s", where="x")
            assert isinstance(keyring.shown(text, "step", "s", where="x"), Sealed)


def test_more_beside_the_envelope_is_refused() -> None:
    text = A.seal("17", "step", "s")[:-1] + ',"more":1}'
    with pytest.raises(PayloadError, match="looks like a sealed value"):
        A.open(text, "step", "s", where="x")


@pytest.mark.parametrize(
    "value", [{"stepwell:sealed": 1}, {"stepwell:forgotten": True, "a": 1}, {"stepwell:": 1}]
)
def test_a_users_value_that_looks_like_one_of_stepwells_own_is_refused_when_it_is_encoded(value: Any) -> None:
    with pytest.raises(PayloadError, match="Stepwell's own"):
        encode(value, where="the value")
    within = encode({"a": value}, where="the value")
    assert not is_sealed(within)
    assert decode(within, where="x") == {"a": value}


def test_what_cannot_be_opened_is_shown_as_such() -> None:
    sealed = A.seal('{"name": "Ada"}', "input", "w")
    shown = NO_KEYS.shown(sealed, "input", "w", where="x")
    assert isinstance(shown, Sealed)
    assert str(shown) == "sealed with key a"
    assert json.dumps(shown) == '{"stepwell:sealed": "sealed with key a"}'
    assert A.shown(sealed, "input", "w", where="x") == {"name": "Ada"}
    with pytest.raises(PayloadError):
        encode(shown, where="sent again")


# -- errors --------------------------------------------------------------------------------------------


def test_of_an_error_only_its_type_and_reason_are_readable() -> None:
    error = {**encode_fault(ValueError("Ada")), "data": {"name": "Ada"}, "reason": "history mismatch"}
    sealed = A.seal_fault(error)
    assert "Ada" not in json.dumps(sealed)
    assert (sealed["type"], sealed["message"], sealed["reason"]) == (
        "ValueError",
        "sealed",
        "history mismatch",
    )
    assert A.open_fault(sealed, where="x") == error
    assert A.seal_fault(sealed) == sealed, "it is sealed once"
    assert A.open_fault(error, where="x") == error
    assert NO_KEYS.seal_fault(error) == error
    with pytest.raises(PayloadError, match="with key 'a'"):
        B.open_fault(sealed, where="x")
    text = json.dumps(sealed)
    assert A.shown_fault(text, where="x") == error
    assert NO_KEYS.shown_fault(text, where="x") == {
        "type": "ValueError", "message": "history mismatch (sealed with key a)", "reason": "history mismatch",
    }  # fmt: skip


@pytest.mark.parametrize("inside", [1, None, {}, {"k": "a"}, {"k": "a", "d": "AAAA"}, "x"])
def test_an_error_that_only_looks_sealed_is_refused_and_shown(inside: Any) -> None:
    forged = {"type": "E", "message": "m", "stepwell:sealed": inside}
    with pytest.raises(PayloadError, match=r"^x "):
        A.open_fault(forged, where="x")
    assert A.shown_fault(json.dumps(forged), where="x")["message"].startswith("sealed")


# -- fingerprints --------------------------------------------------------------------------------------

RUN, OTHER_RUN = UUID(int=1), UUID(int=2)


def veil(keyring: Keyring = A, run: UUID = RUN) -> Veil:
    made = keyring.veil(keyring.seal("{}", "input", "w"), run)
    assert made is not None
    return made


@given(mark=marks)
def test_a_fingerprint_is_read_back_as_it_was(mark: int) -> None:
    hidden = veil().hide(mark)
    assert -(1 << 63) <= hidden < 1 << 63
    assert veil().reveal(hidden) == mark
    assert veil(BA).reveal(hidden) != mark or mark != hidden


def test_the_same_arguments_look_different_in_another_run_and_under_another_key() -> None:
    mark = fingerprint('{"vote": true}')
    seen = {mark, veil().hide(mark), veil(A, OTHER_RUN).hide(mark), veil(B).hide(mark)}
    assert len(seen) == 4


def test_neighbouring_fingerprints_are_veiled_unlike_each_other() -> None:
    hidden = [veil().hide(mark) & ((1 << 64) - 1) for mark in range(2000)]
    assert len(set(hidden)) == 2000
    changed = [(one ^ two).bit_count() for one, two in itertools.pairwise(hidden)]
    assert 30 < sum(changed) / len(changed) < 34, "on average half of the bits"


def test_a_run_with_a_plain_input_has_no_veil_and_one_without_its_key_is_refused() -> None:
    assert A.veil("{}", RUN) is None
    with pytest.raises(PayloadError, match="key 'a'"):
        B.veil(A.seal("{}", "input", "w"), RUN)


# -- keys ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "there is no encryption key"),
        (" , \n", "there is no encryption key"),
        (entry("a")[2:], "encryption key number 1 is not written as id:key"),
        (f"{entry('a')},b", "encryption key number 2 is not written as id:key"),
        (entry("a").replace("a:", "an id:"), "encryption key number 1 is not written as id:key"),
        (entry("a").replace("a:", ":"), "encryption key number 1 is not written as id:key"),
        (entry("a", b"x" * 31), "encryption key 'a' has 31 bytes, and not 32"),
        ("a:", "encryption key 'a' has 0 bytes"),
        ("a:!!!!", "encryption key 'a' is not written in base64"),
        (f"{entry('a')},{entry('a', SECRETS['b'])}", "encryption key 'a' is given twice"),
    ],
)
def test_keys_that_cannot_work_are_told_in_a_sentence_without_any_part_of_a_key(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings(encryption_keys=text)
    assert str(caught.value).startswith(says)
    for part in text.replace(",", ":").split(":"):
        assert len(part) < 6 or part not in str(caught.value)


def test_keys_are_read_as_people_write_them() -> None:
    url_safe = base64.urlsafe_b64encode(b"\xff" * 32).decode()
    keyring = Keyring.of(f"  a:{url_safe} ,\n\n2026-11_b.c: {entry('b')[2:]}\n")
    assert keyring.ids == ["a", "2026-11_b.c"]


def test_no_key_is_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given_keys = f"{entry('a')},{entry('b')}"
    secrets = (
        [entry(name)[2:] for name in "ab"]
        + [SECRETS[name].hex() for name in "ab"]
        + [repr(SECRETS["a"])[2:20]]
    )
    settings = Settings(encryption_keys=given_keys)
    file = tmp_path / "keys"
    file.write_text(given_keys.replace(",", "\n"))
    monkeypatch.setenv("STEPWELL_ENCRYPTION_KEYS_FILE", str(file))
    loaded = Settings.load()
    assert loaded.keyring().ids == settings.keyring().ids == ["a", "b"]
    briefing = Briefing(
        settings=settings,
        url="postgresql://db",
        app="flows",
        worker_id=1,
        supervisor_id=2,
        queues=("default",),
    )
    shown = [
        repr(each)
        for each in (settings, loaded, briefing, settings.keyring(), settings.keyring()._keys, veil())
    ]
    with pytest.raises(TypeError) as caught:
        pickle.dumps(settings.keyring())  # nothing that a key is in can be written by accident
    shown += [str(caught.value), caplog.text, str(sys.exc_info())]
    for text in shown:
        for secret in secrets:
            assert secret not in text
    assert "encryption_keys=Keyring(a, b)" in shown[0]
    assert Briefing.from_line(briefing.to_line()).settings.keyring().ids == ["a", "b"], "children are told"


def test_a_file_holds_the_keys_instead_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    monkeypatch.setenv("STEPWELL_ENCRYPTION_KEYS_FILE", str(file))
    with pytest.raises(ConfigError, match=r"encryption_keys_file .* cannot be read: No such file"):
        Settings.load()
    file.write_text("a:short\n")
    with pytest.raises(ConfigError, match=r"encryption_keys_file .*: encryption key 'a'") as caught:
        Settings.load()
    assert "short" not in str(caught.value)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="it is no text"):
        Settings.load()
    file.write_text(f"{entry('a')}\n")
    assert Settings.load().keyring().ids == ["a"]
    assert Settings.load(encryption_keys=entry("b")).keyring().ids == ["b"], (
        "arguments go before the environment"
    )
    monkeypatch.setenv("STEPWELL_ENCRYPTION_KEYS", entry("b"))
    with pytest.raises(ConfigError, match="not both"):
        Settings.load()


def test_a_bad_variable_is_named_and_its_value_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPWELL_ENCRYPTION_KEYS", entry("a", b"x" * 16))
    with pytest.raises(
        ConfigError, match=r"^STEPWELL_ENCRYPTION_KEYS: encryption key 'a' has 16 bytes"
    ) as caught:
        Settings.load()
    assert entry("a", b"x" * 16)[2:] not in str(caught.value)


def test_without_what_encrypts_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(ConfigError, match=r'pip install "stepwell\[encryption\]"'):
        Settings(encryption_keys=entry("a"))
    assert not Settings().keyring(), "without keys it is not needed"
