"""Pseudonyms that lead nowhere without the secret, and identifiers that are unique, ordered, and safe after a fork."""

import datetime as dt
import hashlib
import hmac
import multiprocessing
import os
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calling_ai.core.errors import InputError, InputTypeError, SettingsError
from calling_ai.core.settings import Settings
from calling_ai.store import identity
from calling_ai.store.identity import (
    SECRET_VARIABLE,
    check_text,
    fingerprint,
    pseudonym,
    pseudonyms,
    tombstone,
    user_secret,
    uuid7,
    uuid7s,
)

SECRET = b"the secret of the tests"
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=200)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Return the settings of an empty workspace, with no secret in the environment."""
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    return Settings(tmp_path)


# ----------------------------------------------------------------------------------------------------- the secret


def test_the_secret_is_made_once_and_only_its_owner_reads_it(place: Settings) -> None:
    first = user_secret(place)
    assert user_secret(place) == first and len(first) == 64
    assert (place.var / "user.secret").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in place.var.iterdir()] == ["user.secret"]


def test_of_many_who_make_it_at_once_all_get_the_same(place: Settings) -> None:
    context = multiprocessing.get_context("fork")
    queue, start = context.Queue(), context.Event()

    def run() -> None:
        start.wait()
        queue.put(user_secret(place))

    made = [context.Process(target=run) for _ in range(8)]
    for process in made:
        process.start()
    start.set()
    said = {queue.get(timeout=60) for _ in made}
    for process in made:
        process.join()
    assert said == {user_secret(place)}


def test_the_environment_wins_and_makes_no_file(place: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, "sixteen letters!")
    assert user_secret(place) == b"sixteen letters!" and not place.var.exists()


def test_a_secret_that_is_none_is_refused_without_showing_it(place: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for short in ("", "fifteen letters"):
        monkeypatch.setenv(SECRET_VARIABLE, short)
        with pytest.raises(SettingsError, match=f"{SECRET_VARIABLE} has {len(short)} characters") as caught:
            user_secret(place)
        assert "fifteen" not in str(caught.value)
    monkeypatch.delenv(SECRET_VARIABLE)
    file = place.var / "user.secret"
    user_secret(place)
    file.chmod(0o644)
    with pytest.raises(SettingsError, match="run chmod 600 var/user.secret"):
        user_secret(place)
    file.chmod(0o600)
    file.write_text("")
    with pytest.raises(SettingsError, match="var/user.secret has 0 characters"):
        user_secret(place)
    file.write_bytes(b"\xff" * 40)
    with pytest.raises(SettingsError, match="is not text"):
        user_secret(place)


# ------------------------------------------------------------------------------------------------------ pseudonyms


@given(texts)
def test_a_pseudonym_is_the_hmac(user: str) -> None:
    assert pseudonym(user, SECRET) == hmac.new(SECRET, user.encode(), hashlib.sha256).hexdigest()


def test_a_known_vector() -> None:
    # RFC 4231, test case 2
    expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    assert pseudonym("what do ya want for nothing?", b"Jefe") == expected


@given(st.lists(st.one_of(texts, st.integers(-(2**70), 2**70)), max_size=20))
def test_many_are_the_same_as_one_by_one(users: list) -> None:
    assert pseudonyms(users, SECRET) == [pseudonym(user, SECRET) for user in users]
    assert pseudonyms(np.array(users, dtype=object), SECRET) == pseudonyms(users, SECRET)


def test_numbers_and_texts_of_numbers_are_one_person() -> None:
    assert pseudonym(7, SECRET) == pseudonym("7", SECRET) == pseudonyms(np.array([7]), SECRET)[0]
    assert pseudonyms([1, "1"], SECRET)[0] == pseudonyms([1, "1"], SECRET)[1]


@pytest.mark.parametrize("wrong", [True, 1.0, None, b"ada", ["ada"], np.float64(1)])
def test_what_is_no_id_is_refused_with_its_row(wrong: object) -> None:
    with pytest.raises(InputTypeError, match="row 2, user_id is a ") as caught:
        pseudonyms(["ada", 1, wrong], SECRET)
    assert (caught.value.row, caught.value.column) == (2, "user_id")


def test_other_secrets_and_tombstones_do_not_meet() -> None:
    key = pseudonym("ada", SECRET)
    others = [pseudonym("ada", b"another secret of tests"), tombstone(key), hashlib.sha256(b"ada").hexdigest()]
    assert len({key, *others}) == 4 and tombstone(key) == tombstone(key)
    assert fingerprint(SECRET) != fingerprint(SECRET + b"!") and fingerprint(SECRET) not in key


def test_texts_are_checked() -> None:
    assert check_text("ünïcode 🙂", "name") == "ünïcode 🙂"
    for wrong, words in (
        ("", "is empty"),
        ("a" * 201, "has 201 characters"),
        ("\0", "NUL"),
        ("\ud800", "lone surrogate"),
    ):
        with pytest.raises(InputError, match=f"name .*{words}"):
            check_text(wrong, "name")
    with pytest.raises(InputError) as caught:
        check_text("secret\0", "name", hidden=True)
    assert "secret" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------- identifiers


def test_the_layout_is_the_one_of_the_rfc(monkeypatch: pytest.MonkeyPatch) -> None:
    # RFC 9562, appendix A.6: 017F22E2-79B0-7CC3-98C4-DC0C0C07398F
    moment = dt.datetime.fromtimestamp(0x017F22E279B0 / 1000, dt.UTC)
    drawn = (0xCC3 << 62 | 0x18C4DC0C0C07398F) << 6
    monkeypatch.setattr(identity.os, "urandom", lambda n: drawn.to_bytes(10, "big"))
    assert uuid7(moment) == uuid.UUID("017F22E2-79B0-7CC3-98C4-DC0C0C07398F")


@given(st.datetimes(dt.datetime(1970, 1, 1), dt.datetime(9999, 12, 31), timezones=st.just(dt.UTC)))
def test_the_time_is_in_it(moment: dt.datetime) -> None:
    made = uuid7(moment)
    assert made.version == 7 and made.variant == uuid.RFC_4122
    assert made.int >> 80 == (moment - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(milliseconds=1)


def test_they_increase_also_when_the_clock_jumps_back(monkeypatch: pytest.MonkeyPatch) -> None:
    first = uuid7s(500)
    now = time.time_ns()
    monkeypatch.setattr(identity.time, "time_ns", lambda: now - 600 * 10**9)
    second = uuid7s(5_000)
    monkeypatch.setattr(identity.time, "time_ns", lambda: now + 600 * 10**9)
    third = uuid7s(500)
    everything = first + second + third
    assert everything == sorted(set(everything)) and {item.version for item in everything} == {7}
    assert (third[0].int >> 80) == (now + 600 * 10**9) // 10**6
    identity._reset()


def test_threads_never_get_the_same() -> None:
    made: list[list[uuid.UUID]] = [[] for _ in range(8)]
    threads = [threading.Thread(target=lambda own=own: own.extend(uuid7s(2_000))) for own in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(own == sorted(own) for own in made)
    assert len({item for own in made for item in own}) == 16_000


def test_a_forked_child_does_not_continue_its_parent() -> None:
    uuid7()
    read, write = os.pipe()
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            os.write(write, b"".join(item.bytes for item in uuid7s(100)))
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        data = stream.read()
    mine = {item.bytes for item in uuid7s(1_000)}
    theirs = {data[start : start + 16] for start in range(0, len(data), 16)}
    assert len(theirs) == 400 and not theirs & mine


def test_times_that_an_identifier_cannot_hold() -> None:
    with pytest.raises(InputError, match="must carry a time zone"):
        uuid7(dt.datetime(2025, 1, 1))
    with pytest.raises(InputError, match="must not be before 1970"):
        uuid7(dt.datetime(1969, 12, 31, tzinfo=dt.UTC))
    with pytest.raises(InputError, match="moments has 1 items: n is 2"):
        uuid7s(2, [dt.datetime(2025, 1, 1, tzinfo=dt.UTC)])
