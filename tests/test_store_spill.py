"""The spill: a queue on the disk against a list in memory, torn and damaged files, one heir for each orphan."""

import datetime as dt
import errno
import math
import os
import subprocess
import sys
import tempfile
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calling_ai.core.errors import InputTypeError, IntegrityError, StorageError
from calling_ai.store.spill import (
    REFUSED_FILE,
    Spill,
    decode_row,
    encode_row,
    erase,
    frame,
    frames_in,
    orphans,
    put_aside,
    read_refused,
    spill_files,
)

COLUMNS = {"decision": ("id", "user_key", "calling_score"), "outcome": ("id",)}
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(), max_size=20),
    st.uuids(),
    st.datetimes(timezones=st.just(dt.UTC)),
)


def payload(number: int, key: str = "ab" * 32) -> bytes:
    return encode_row("decision", (f"id-{number}", key, number / 7))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return type(one) is type(other) and one == other


@given(st.lists(VALUES, max_size=12))
def test_rows_come_back_to_the_bit(values: list[Any]) -> None:
    kind, row = decode_row(encode_row("decision", values))
    assert kind == "decision" and len(row) == len(values)
    assert all(same(one, other) for one, other in zip(values, row, strict=True))


def test_numpy_numbers_are_plain_and_other_things_are_refused() -> None:
    import numpy as np

    assert decode_row(encode_row("x", (np.float32(0.5), np.int64(3), np.bool_(True), np.float64(0.1)))) == (
        "x",
        (0.5, 3, True, 0.1),
    )
    for thing in (b"bytes", {1}, object(), 1j):
        with pytest.raises(InputTypeError, match="row holds a"):
            encode_row("x", (thing,))


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=6), st.data())
def test_broken_bytes_never_pass_for_a_row(rows: list[bytes], data: Any) -> None:
    whole = b"".join(frame(number, row) for number, row in enumerate(rows))
    written = set(enumerate(rows))
    broken = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    del broken[data.draw(st.integers(0, len(broken))) :]
    found = frames_in(bytes(broken))
    assert set(found.rows) <= written
    assert found.end + found.torn == len(broken) or not found.rows
    assert sum(len(frame(*row)) for row in found.rows) + found.damaged + found.torn == len(broken)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 5)),
        st.tuples(st.just("fail"), st.integers(1, 5)),
        st.tuples(st.just("read"), st.integers(1, 4)),
        st.tuples(st.just("drain"), st.integers(0, 6)),
    ),
    max_size=30,
)


@settings(max_examples=40)
@given(OPERATIONS)
def test_the_queue_is_a_list_that_survives(operations: list[tuple[str, int]]) -> None:
    real = os.fsync
    with tempfile.TemporaryDirectory() as folder:
        spill = Spill(folder, COLUMNS, segment_bytes=400)
        waiting: list[int] = []
        number, done = 0, 0
        for name, count in operations:
            rows = [(number + index, payload(number + index)) for index in range(1, count + 1)]
            if name == "append":
                spill.append(rows)
                waiting += [sequence for sequence, _ in rows]
                number += count
            if name == "fail":
                os.fsync = lambda handle: (_ for _ in ()).throw(OSError(errno.EIO, "broken"))
                try:
                    with pytest.raises(StorageError):
                        spill.append(rows)
                finally:
                    os.fsync = real
            if name == "read":  # twice the same: nothing was drained in between
                for _ in range(2):
                    found = spill.read(done, limit=count)
                    assert bool(found) == bool(waiting)
                    assert found == [(sequence, payload(sequence)) for sequence in waiting[: len(found)]]
            if name == "drain":
                done = max(done, waiting[:count][-1] if waiting[:count] else done)
                waiting = waiting[count:]
                spill.drained(done)
        spill.close()
        left = [sequence for orphan in orphans(folder) for sequence, _ in orphan.rows if sequence > done]
        assert left == waiting and spill.damaged == 0
        if not waiting:
            assert not [path for path in spill_files(folder) if path.suffix == ".part"]


def leave(folder: Path, numbers: range) -> Path:
    """Leave a segment behind as a dead process does."""
    spill = Spill(folder, COLUMNS)
    spill.append([(number, payload(number)) for number in numbers])
    [path] = spill.files
    spill.close()
    return path


def test_each_orphan_has_one_heir(tmp_path: Path) -> None:
    for start in range(0, 200, 10):
        leave(tmp_path, range(start, start + 10))
    taken: list[int] = []

    def inherit() -> None:
        for orphan in orphans(tmp_path):
            orphan.finish()
            taken.extend(sequence for sequence, _ in orphan.rows)

    heirs = [threading.Thread(target=inherit) for _ in range(8)]
    for heir in heirs:
        heir.start()
    for heir in heirs:
        heir.join()
    inherit()
    assert sorted(taken) == list(range(200)) and spill_files(tmp_path) == []


def test_what_an_heir_does_not_finish_the_next_one_gets(tmp_path: Path) -> None:
    leave(tmp_path, range(1, 5))
    with pytest.raises(KeyboardInterrupt):
        for _ in orphans(tmp_path):
            raise KeyboardInterrupt
    [rows] = [[sequence for sequence, _ in orphan.rows] for orphan in orphans(tmp_path)]
    assert rows == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "rows", "torn", "damaged"),
    [
        (lambda data: data[:-3], [1, 2], True, False),
        (lambda data: data + b"\0" * 50, [1, 2, 3], True, False),
        (lambda data: data.replace(b"id-2", b"id-9"), [1, 3], False, True),
        (lambda data: data[:10], [], True, True),
        (lambda data: b"", [], False, False),
    ],
)
def test_damage_is_told_from_a_torn_tail(
    tmp_path: Path, change: Any, rows: list[int], torn: bool, damaged: bool
) -> None:
    path = leave(tmp_path, range(1, 4))
    path.write_bytes(change(path.read_bytes()))
    for orphan in orphans(tmp_path):
        assert [sequence for sequence, _ in orphan.rows] == rows
        assert (orphan.torn > 0, orphan.damaged > 0) == (torn, damaged)
        orphan.finish()
    assert [item.suffix for item in spill_files(tmp_path)] == ([".damaged"] if damaged else [])


def test_an_error_of_the_disk_leaves_the_queue_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spill, real = Spill(tmp_path, COLUMNS), os.write
    spill.append([(1, payload(1))])

    def short(handle: int, data: Any) -> int:
        if len(data) > 30:
            return real(handle, bytes(data)[:30])
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "write", short)
    with pytest.raises(StorageError, match=f"writing to the spill {tmp_path.name} failed: the disk is full"):
        spill.append([(2, payload(2)), (3, payload(3))])
    monkeypatch.undo()
    spill.append([(2, payload(2))])
    assert [*spill.read(0), *spill.read(1)] == [(1, payload(1)), (2, payload(2))] and len(spill.files) == 2
    assert all(not frames_in(path.read_bytes()).torn for path in spill.files)
    spill.close()


def test_only_the_owner_may_look(tmp_path: Path) -> None:
    folder = tmp_path / "spill"
    path = leave(folder, range(1, 3))
    put_aside(folder, "outcome", {"id": "a"}, "because")
    assert oct(folder.stat().st_mode & 0o777) == "0o700"
    assert {oct(item.stat().st_mode & 0o777) for item in (path, folder / REFUSED_FILE)} == {"0o600"}


def test_a_child_does_not_free_the_lock_of_its_parent(tmp_path: Path) -> None:
    spill = Spill(tmp_path, COLUMNS)
    spill.append([(1, payload(1))])
    child = os.fork()
    if not child:
        spill.abandon()
        os._exit(len(list(orphans(tmp_path))))
    assert os.waitpid(child, 0)[1] == 0
    assert list(orphans(tmp_path)) == []
    spill.close()
    assert len([orphan.rows for orphan in orphans(tmp_path)]) == 1


def test_rows_put_aside_by_many_are_all_there(tmp_path: Path) -> None:
    def work(name: str) -> None:
        for number in range(20):
            put_aside(tmp_path, "decision", {"id": f"{name}-{number}", "at": dt.datetime.now(dt.UTC)}, "x" * 3000)

    workers = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for worker in workers:
        worker.start()
    for _ in range(5):
        erase(tmp_path, "nobody's key")
    for worker in workers:
        worker.join()
    assert {item["row"]["id"] for item in read_refused(tmp_path)} == {f"{n}-{i}" for n in "abcd" for i in range(20)}


def test_a_row_that_cannot_be_put_aside_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_aside(tmp_path, "decision", {"id": "a"}, "first")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(StorageError, match="writing refused.jsonl failed"):
        put_aside(tmp_path, "decision", {"id": "b"}, "second")
    assert [item["reason"] for item in read_refused(tmp_path)] == ["first"]
    with (tmp_path / REFUSED_FILE).open("ab") as stream:
        stream.write(b'{"torn')
    assert len(read_refused(tmp_path)) == 1
    monkeypatch.undo()
    put_aside(tmp_path, "decision", {"id": "c"}, "third")
    assert [item["reason"] for item in read_refused(tmp_path)] == ["first", "third"]
    with (tmp_path / REFUSED_FILE).open("ab") as stream:
        stream.write(b'{"wrong\n')
    with pytest.raises(IntegrityError, match=r"refused.jsonl is not what was written"):
        read_refused(tmp_path)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.booleans())
def test_whoever_is_erased_is_gone_and_the_others_stay(people: list[int], broken: bool) -> None:
    keys = [f"{index:064x}" for index in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        spill = Spill(folder, COLUMNS, segment_bytes=500)
        for number, person in enumerate(people, 1):
            spill.append([(number, payload(number, keys[person]))])
            put_aside(folder, "decision", {"user_key": keys[person]}, "because")
        spill.close()
        if broken:
            path = spill_files(folder)[0]
            path.write_bytes(path.read_bytes() + keys[0].encode())
        erased = erase(folder, keys[0])
        assert erased.held == 0 and erased.rows >= 2 * people.count(0)
        assert not any(keys[0].encode() in path.read_bytes() for path in spill_files(folder))
        left = [sequence for orphan in orphans(folder) for sequence, _ in orphan.rows]
        assert left == [number for number, person in enumerate(people, 1) if person]
        assert len(read_refused(folder)) == len(people) - people.count(0)


def test_import_is_light() -> None:
    code = (
        "import sys, calling_ai.store.spill, calling_ai.store.writer, calling_ai.store.backup\n"
        "print([name for name in ('pandas', 'torch', 'matplotlib', 'scipy') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_uuid_is_a_uuid() -> None:
    key = uuid.uuid4()
    assert decode_row(encode_row("x", ({"plain": 1}, key))) == ("x", ({"plain": 1}, key))
