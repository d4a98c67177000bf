"""Files: whole or not at all, under kill -9, Ctrl-C, a full disk and a failing flush."""

import contextlib
import errno
import hashlib
import json
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calling_ai.core import files
from calling_ai.core.errors import CallingError, InputError, IntegrityError, NotFoundError, StorageError
from calling_ai.core.files import (
    atomic_path,
    read_json,
    sha256_bytes,
    sha256_file,
    to_json,
    write_bytes,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    """Return the names of all files of a folder, hidden ones included."""
    return sorted(path.name for path in folder.iterdir())


# The child writes one of two contents in turn, for ever, and acknowledges each finished write on its output.
WRITER = """
import sys
from calling_ai.core.files import write_bytes
target, size = sys.argv[1], int(sys.argv[2])
contents = [bytes([65 + turn]) * size for turn in (0, 1)]
turn = 0
while True:
    write_bytes(target, contents[turn % 2])
    turn += 1
    sys.stdout.write("%d\\n" % turn)
    sys.stdout.flush()
"""


def test_kill_at_random_moments_leaves_a_whole_file(tmp_path: Path) -> None:
    """Kill a writing process 40 times: with 0 failures the 95 % bound of the failure rate is 3/40."""
    target, size, moments = tmp_path / "target.bin", 2_000_000, random.Random(20_26)
    whole = [b"A" * size, b"B" * size]
    written, interrupted = 0, 0
    for _ in range(40):
        command = [sys.executable, "-c", WRITER, str(target), str(size)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as child:
            assert child.stdout is not None and child.stdout.readline(), "the child writes"
            time.sleep(moments.uniform(0, 0.02))
            child.send_signal(signal.SIGKILL)
            acknowledged = 1 + len(child.stdout.read().split())
            assert child.wait() == -signal.SIGKILL
        written += acknowledged
        found = target.read_bytes()
        assert found in whole
        # The last acknowledged write is there, or the one after it, which had no time to be acknowledged.
        assert found in (whole[(acknowledged - 1) % 2], whole[acknowledged % 2])
        left = [path for path in tmp_path.iterdir() if path != target]
        interrupted += len(left)
        assert all(path.name.startswith(".target.bin-") and path.suffix == ".part" for path in left)
        for path in left:
            path.unlink()
    assert written >= 40
    assert interrupted, "no kill hit a write in progress: the test has lost its teeth"


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    target, whole = tmp_path / "target.bin", {bytes([65 + turn]) * 300_000 for turn in range(2)}
    write_bytes(target, min(whole))
    stop, seen = threading.Event(), set()

    def read() -> None:
        while not stop.is_set():
            seen.add(target.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(40):
            for content in sorted(whole):
                write_bytes(target, content)
    finally:
        stop.set()
        reader.join()
    assert seen and seen <= whole


def test_many_writers_leave_one_whole_file(tmp_path: Path) -> None:
    target, contents = tmp_path / "target.bin", [bytes([65 + index]) * 100_000 for index in range(8)]
    threads = [threading.Thread(target=write_bytes, args=(target, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() in contents and names(tmp_path) == ["target.bin"]


@contextlib.contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Let no file grow beyond `limit` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("limit", [0, 1, 4096, 99_999])
@pytest.mark.parametrize("existed", [True, False])
def test_a_full_disk_keeps_the_old_content_and_says_so(limit: int, existed: bool, tmp_path: Path) -> None:
    target = tmp_path / "table.csv"
    if existed:
        target.write_bytes(b"old")
    with full_disk(limit), pytest.raises(StorageError, match="writing table.csv failed: .*free some space"):
        write_bytes(target, b"x" * 100_000)
    assert names(tmp_path) == (["table.csv"] if existed else [])
    assert not existed or target.read_bytes() == b"old"
    assert write_bytes(target, b"x" * 100_000).stat().st_size == 100_000, "after the repair it works, without a step"


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_an_error_at_any_step_keeps_the_old_content(
    code: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = write_text(tmp_path / "note.txt", "old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(*{"fsync": (os, "fsync")}.get(call, (Path, call)), fail)
    with pytest.raises(StorageError, match="writing note.txt failed: "):
        write_text(target, "new")
    monkeypatch.undo()
    assert target.read_text() == "old" and names(tmp_path) == ["note.txt"]


def test_a_flush_of_the_folder_that_fails_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, real, calls = write_text(tmp_path / "note.txt", "old"), os.fsync, []

    def second_fails(handle: int) -> None:
        calls.append(stat.S_ISDIR(os.fstat(handle).st_mode))
        if len(calls) == 2:
            raise OSError(errno.EIO, "input/output error")
        real(handle)

    monkeypatch.setattr(os, "fsync", second_fails)
    with pytest.raises(StorageError):
        write_text(target, "new")
    monkeypatch.undo()
    assert calls == [False, True], "the file is flushed first, then the folder"
    assert target.read_text() in ("old", "new") and names(tmp_path) == ["note.txt"]


def test_the_content_is_flushed_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(handle: int) -> None:
        events.append("flush folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "flush file")
        fsync(handle)

    def note_replace(self: Path, target: Path) -> Path:
        events.append("rename")
        assert self.parent == Path(target).parent
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    write_bytes(tmp_path / "note.txt", b"new")
    assert events == ["flush file", "rename", "flush folder"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, ValueError])
@pytest.mark.parametrize("existed", [True, False])
def test_an_interruption_leaves_nothing_behind(
    interruption: type[BaseException], existed: bool, tmp_path: Path
) -> None:
    target = tmp_path / "deep" / "table.csv"
    if existed:
        write_text(target, "old")
    with pytest.raises(interruption), atomic_path(target) as temporary:
        assert temporary.parent == target.parent and temporary.is_file()
        temporary.write_text("half of the new ta")
        raise interruption
    assert names(target.parent) == (["table.csv"] if existed else [])
    assert not existed or target.read_text() == "old"


def interrupted_at(step: int, target: Path, content: bytes) -> bool:
    """Write with a Ctrl-C before the line number `step` of all Python lines; say whether the write came that far."""
    seen = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal seen
        if event == "line":
            seen += 1
            if seen == step:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        write_bytes(target, content)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("existed", [True, False])
def test_control_c_before_every_line_leaves_no_temporary_file(existed: bool, tmp_path: Path) -> None:
    target, step, found, outcomes = tmp_path / "target.bin", 0, True, set()
    while found:
        step += 1
        target.unlink(missing_ok=True)
        if existed:
            target.write_bytes(b"old")
        found = interrupted_at(step, target, b"new")
        content = target.read_bytes() if target.exists() else None
        outcomes.add(content)
        assert content in (b"new", b"old" if existed else None), f"line {step}"
        assert set(names(tmp_path)) <= {"target.bin"}, f"line {step} leaves {names(tmp_path)}"
    assert step > 20 and outcomes == {b"new", b"old" if existed else None}


INTERRUPTED = """
import sys
from calling_ai.core.files import write_bytes
target, size = sys.argv[1], int(sys.argv[2])
print("ready", flush=True)
try:
    while True:
        write_bytes(target, b"x" * size)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_control_c_in_a_real_process_leaves_no_temporary_file(tmp_path: Path) -> None:
    target, size, moments = tmp_path / "target.bin", 3_000_000, random.Random(7)
    for _ in range(10):
        command = [sys.executable, "-c", INTERRUPTED, str(target), str(size)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
            assert child.stdout is not None and child.stdout.readline() == b"ready\n"
            time.sleep(moments.uniform(0.01, 0.04))
            child.send_signal(signal.SIGINT)
            _, errors = child.communicate(timeout=20)
        assert child.returncode == 130, errors.decode()
        assert set(names(tmp_path)) <= {"target.bin"}
        assert not target.exists() or target.stat().st_size == size


def test_our_own_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="^mine$"), atomic_path(tmp_path / "note.txt"):
        raise InputError("mine")
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder is a file", "target is a folder", "temporary removed", "name too long"])
def test_paths_that_cannot_be_written(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "note.txt"
    if kind == "folder is a file":
        target.write_text("old")
        target = target / "inside.txt"
    elif kind == "target is a folder":
        target.mkdir()
    elif kind == "name too long":
        target = tmp_path / ("x" * 300)
    with pytest.raises(StorageError, match=f"writing {target.name} failed: "), atomic_path(target) as temporary:
        temporary.write_text("new")
        if kind == "temporary removed":
            temporary.unlink()
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".part"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="permission denied; check who owns the folder"):
            write_text(tmp_path / "note.txt", "new")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("name", ["ü" * 60, "with space", ".hidden", "x" * 255, "a'b\"c%s{}"])
def test_unusual_names(name: str, tmp_path: Path) -> None:
    assert write_text(tmp_path / name, "grüezi").read_bytes() == "grüezi".encode()
    assert names(tmp_path) == [name]


@given(st.binary(max_size=5000))
def test_bytes_come_back_and_have_their_digest(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_bytes(Path(folder) / "deep" / "er" / "content", content)
        assert path.read_bytes() == content
        assert sha256_file(path) == sha256_bytes(content) == hashlib.sha256(content).hexdigest()


def test_digests_published_in_fips_180_4() -> None:
    assert sha256_bytes(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert sha256_bytes(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_bytes(b"a" * 1_000_000) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    calls: list[Callable[[Path], Any]] = [read_json, sha256_file]
    for call in calls:
        with pytest.raises(NotFoundError, match="file nothing.json does not exist"):
            call(tmp_path / "nothing.json")
        with pytest.raises(StorageError, match=f"reading .*{tmp_path.name} failed: it is a folder"):
            call(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1', b"\xff\xfe", b'{"a": 1} x', b"{'a': 1}"])
def test_broken_json_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_bytes(content)
    with pytest.raises(IntegrityError, match="^broken.json is not valid JSON: ") as caught:
        read_json(tmp_path / "broken.json")
    assert isinstance(caught.value, CallingError)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
).filter(lambda value: "\\ud" not in json.dumps(value))


@given(PLAIN)
def test_json_comes_back_as_it_was(value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert read_json(write_json(Path(folder) / "record.json", value)) == value


@given(st.dictionaries(st.text(max_size=5), st.integers(), max_size=6), st.randoms(use_true_random=False))
def test_the_order_of_keys_does_not_matter(value: dict, shuffle: random.Random) -> None:
    items = list(value.items())
    shuffle.shuffle(items)
    assert to_json(dict(items)) == to_json(value)


def test_numbers_that_json_lacks_become_null() -> None:
    value = {
        "a": float("nan"),
        "b": [np.inf, -np.inf],
        "c": np.array([[1.5, np.nan]]),
        "d": np.float32(0.5),
        "e": np.bool_(True),
    }
    assert json.loads(to_json(value)) == {"a": None, "b": [None, None], "c": [[1.5, None]], "d": 0.5, "e": True}
    assert "NaN" not in to_json(value) and "Infinity" not in to_json(value)


def test_a_set_has_one_text_whatever_the_order_of_its_hashes(root: Path) -> None:
    code = "from calling_ai.core.files import to_json; print(to_json({'names': {'b', 'a', 'c', 'd'}}))"
    texts = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (1, 2, 3)
    }
    assert len(texts) == 1


def test_written_files_can_be_read_by_others(tmp_path: Path) -> None:
    assert stat.S_IMODE(write_text(tmp_path / "note.txt", "x").stat().st_mode) == 0o644
    assert files.__doc__ and "whole or not at all" in files.__doc__
