"""Model files kept elsewhere: nothing is referred to before it is there, and nothing damaged comes back."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from calling_ai.core.errors import CallingError, IntegrityError, StorageError
from calling_ai.core.settings import settings
from calling_ai.models.graph import export
from calling_ai.models.networks import build, default_spec
from calling_ai.operate.releases import ensure_release
from calling_ai.registry.audit import audit
from calling_ai.registry.storage import Remote
from calling_ai.registry.versions import Registry, VersionDraft
from calling_ai.serve.scorer import Scorer


class Failing(LocalFileSystem):
    """The files of this machine, with an operation that fails or is cut."""

    protocol = "failing"
    cachable = False
    left: int = 10**9
    way: str = "error"

    def _count(self) -> bool:
        Failing.left -= 1
        return Failing.left == 0

    def _fail(self) -> None:
        if self._count():
            raise OSError(5, "Input/output error")

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if self._count():
            if Failing.way == "cut" and "w" in mode:
                return Cut(super().open(path, mode, **options))
            raise OSError(28, "No space left on device")
        return super().open(path, mode, **options)

    def info(self, path: str, **options: Any) -> Any:
        return super().info(path, **options)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._fail()
        super().makedirs(path, exist_ok)

    def mv(self, first: str, second: str, **options: Any) -> None:
        self._fail()
        super().mv(first, second, **options)

    def rm(self, path: str, **options: Any) -> None:
        self._fail()
        super().rm(path, **options)


class Cut:
    """A stream that keeps half of what is written and says that all is well."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __enter__(self) -> "Cut":
        return self

    def __exit__(self, *problem: Any) -> None:
        self.stream.close()

    def write(self, data: bytes) -> int:
        self.stream.write(data[: len(data) // 2])
        return len(data)


fsspec.register_implementation("failing", Failing, clobber=True)


def place(folder: Path, url: str) -> Registry:
    folder.mkdir(parents=True)
    (folder / "settings.ini").write_text(f"[store]\nmodels = {url}\n")
    return Registry(folder)


def trained(folder: Path, seed: int) -> Path:
    path = folder / f"outcome-{seed}.onnx"
    export(build(default_spec("outcome"), seed=seed), path)
    return path


def bad(registry: Registry) -> list[str]:
    return [check.name for check in audit(registry) if not check.ok]


@pytest.fixture
def quiet() -> Any:
    Failing.left, Failing.way = 10**9, "error"
    yield
    Failing.left, Failing.way = 10**9, "error"


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_another_machine_serves_what_was_registered_here(tmp_path: Path, scheme: str) -> None:
    url = f"file://{tmp_path}/far" if scheme == "file" else f"memory://{tmp_path.name}"
    here = place(tmp_path / "here", url)
    here.register(
        [VersionDraft("outcome", "town", trained(tmp_path, 1))], promote={"outcome": "champion"}, actor="a test"
    )
    release = ensure_release(settings(tmp_path / "here"))
    assert release is not None and bad(here) == []
    for folder in (here.folder, here.releases):  # a machine that has the database only
        for path in folder.glob("*.onnx"):
            path.unlink()
    scorer = Scorer.load(root=tmp_path / "here", strict=False)
    assert (scorer.release, scorer.versions) == (release.digest, {"outcome": "v1.0-town"})
    assert here.read_file(here.get("outcome")) and bad(here) == []


def test_every_operation_that_fails_leaves_nothing_half(tmp_path: Path, quiet: None) -> None:
    """Fail operation 1, 2, 3 ... of an upload until one goes through; nothing is referred to before it is there."""
    file, failures = trained(tmp_path, 1), 0
    for way in ("error", "cut"):
        for operation in range(1, 30):
            registry = place(tmp_path / f"{way}-{operation}", f"failing://{tmp_path}/{way}-{operation}-far")
            Failing.left, Failing.way = operation, way
            try:
                registry.register([VersionDraft("outcome", "town", file)], actor="a test")
                done = True
            except (StorageError, IntegrityError):
                done, failures = False, failures + 1
            reached, Failing.left = Failing.left > 0, 10**9
            assert len(registry.list()) == done
            if done:
                assert bad(registry) == []
            registry.register([VersionDraft("outcome", "town", file)], actor="again")
            assert bad(registry) == [] and len(registry.list()) == 1 + done
            if done and reached:
                break
        else:
            raise AssertionError("it never went through")
    print(f"{failures} operations failed or were cut: 0 versions without their file")
    assert failures >= 5


def test_while_the_address_is_away_what_is_here_serves(tmp_path: Path) -> None:
    registry = place(tmp_path / "here", f"file://{tmp_path}/far")
    registry.register([VersionDraft("outcome", "town", trained(tmp_path, 1))], promote={"outcome": "champion"})
    ensure_release(settings(tmp_path / "here"))
    (tmp_path / "far").rename(tmp_path / "gone")
    (tmp_path / "far").write_text("not a folder")
    assert Scorer.load(root=tmp_path / "here").versions == {"outcome": "v1.0-town"}
    with pytest.raises(StorageError, match="check the address"):
        registry.register([VersionDraft("outcome", "town", trained(tmp_path, 2))])
    assert len(registry.list()) == 1


def test_what_was_damaged_there_is_refused_and_named(tmp_path: Path) -> None:
    registry = place(tmp_path / "here", f"file://{tmp_path}/far")
    [version] = registry.register(
        [VersionDraft("outcome", "town", trained(tmp_path, 1))], promote={"outcome": "champion"}
    )
    far = tmp_path / "far" / "models" / f"{version.digest}.onnx"
    whole = far.read_bytes()
    for damaged in (b"x" * 10, whole[:-1] + bytes([whole[-1] ^ 1])):  # another size, and the same with another bit
        far.chmod(0o644)
        far.write_bytes(damaged)
        assert bad(registry) == ["files"]
    (registry.folder / f"{version.digest}.onnx").unlink()
    with pytest.raises(IntegrityError, match="is not what its name says"):
        registry.read_file(version)
    scorer = Scorer.load(root=tmp_path / "here")
    assert scorer.score({}).path == "formula" and "is not what its name says" in str(scorer.problems)
    far.unlink()
    with pytest.raises(CallingError, match="is missing"):
        registry.read_file(version)


_KILLED = """
import os, signal, sys
from calling_ai.registry import storage
from calling_ai.registry.versions import Registry, VersionDraft
real, point = storage.Remote._read, int(sys.argv[3])
calls = []
def read(self, kind, digest):
    calls.append(1)
    if len(calls) == point: os.kill(os.getpid(), signal.SIGKILL)
    return real(self, kind, digest)
storage.Remote._read = read
Registry(sys.argv[1]).register([VersionDraft("outcome", "town", sys.argv[2])])
"""


@pytest.mark.parametrize("point", [1, 2])
def test_killed_between_upload_and_transaction_nothing_refers_to_it(tmp_path: Path, point: int) -> None:
    registry, file = place(tmp_path / "here", f"file://{tmp_path}/far"), trained(tmp_path, 1)
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "here"), str(file), str(point)]
    done = subprocess.run(command, capture_output=True, timeout=120, env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    assert registry.list() == [] and bad(registry) == []
    registry.register([VersionDraft("outcome", "town", file)])
    assert len(registry.list()) == 1 and bad(registry) == []
    assert Remote(f"file://{tmp_path}/far").has("models", registry.get("outcome", "v1.0-town").digest)
