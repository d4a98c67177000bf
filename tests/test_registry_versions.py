"""The registry: numbers without gaps, all or nothing under kill -9, and no flipped bit served."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from calling_ai.core.errors import InputError, IntegrityError, NotFoundError, RefusedError, StorageError
from calling_ai.core.files import sha256_file
from calling_ai.core.records import Estimate
from calling_ai.registry.versions import MODELS, Registry, VersionDraft, aliases_table, parse_version, versions_table
from calling_ai.store.database import reading, writing

BOTH = {"calling_score": "champion", "outcome": "champion"}


def make_files(folder: Path, size: int = 3000) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, model in enumerate(MODELS):
        (folder / f"{model}.onnx").write_bytes(np.random.default_rng(index).bytes(size))


def drafts(folder: Path, source: str = "town", models=MODELS) -> list[VersionDraft]:
    return [
        VersionDraft(
            model,
            source,
            folder / f"{model}.onnx",
            metrics={"auc": Estimate(0.7, 0.6, 0.8), "rows": np.int64(7)},
            parameters={"epochs": 3},
            seeds={"training": 1},
            environment={"python": "3"},
        )
        for model in models
    ]


@pytest.fixture
def workspace(tmp_path):
    make_files(tmp_path / "made")
    (tmp_path / "work").mkdir()
    return tmp_path


def check_invariants(root: Path) -> list[str]:
    "Return what is wrong: versions without their whole file, aliases unlike the events, gaps in the numbers ..."
    registry, wrong = Registry(root), []
    versions = registry.list()
    if not versions:
        return wrong
    with reading(registry.database) as connection:
        if connection.exec_driver_sql("PRAGMA integrity_check").scalar() != "ok":
            wrong.append("database")
        aliases = connection.execute(sa.select(aliases_table)).all()
    for version in versions:
        file = registry.folder / f"{version.digest}.onnx"
        if not file.is_file() or sha256_file(file) != version.digest or file.stat().st_size != version.size:
            wrong.append(f"file of {version.model} {version.version}")
    for model in MODELS:
        minors: dict[str, list[int]] = {}
        for version in versions:
            if version.model == model:
                minors.setdefault(version.source, []).append(parse_version(version.version)[1])
        wrong += [
            f"numbers of {model} {source}: {found}"
            for source, found in minors.items()
            if found != list(range(len(found)))
        ]
        names = {version.version for version in versions if version.model == model}
        live = {version.version for version in versions if version.model == model and version.status == "active"}
        held = {alias: version for found, alias, version in aliases if found == model}
        if set(held.values()) - names or live != {held[alias] for alias in held if alias == "champion"}:
            wrong.append(f"aliases of {model}: {held}")
        last: dict[str, str | None] = {}
        for event in registry.events():
            if event.action == "alias" and event.model == model:
                if event.before != last.get(event.subject):
                    wrong.append(f"event {event.number} starts from {event.before}")
                last[event.subject] = event.after
        if {alias: version for alias, version in last.items() if version} != held:
            wrong.append(f"events of {model}: {last} but {held}")
    return wrong


def test_a_version_tells_everything(workspace):
    registry = Registry(workspace / "work")
    draft = drafts(workspace / "made")[0]
    [made] = registry.register([draft])
    assert (made.model, made.version, made.status, made.aliases) == ("calling_score", "v1.0-town", "staging", ())
    assert made.digest == sha256_file(draft.file) and made.size == 3000
    assert (made.metrics, made.parameters, made.seeds) == (
        {"auc": Estimate(0.7, 0.6, 0.8), "rows": 7},
        {"epochs": 3},
        {"training": 1},
    )
    assert made.created_at.utcoffset().total_seconds() == 0
    assert Registry(workspace / "work").get("calling_score", "v1.0-town") == made
    assert str(workspace) not in json.dumps(made.to_dict(), default=str)
    assert oct(registry.load_file(made).stat().st_mode & 0o777) == "0o444"


def test_numbers_follow_sources(workspace):
    registry = Registry(workspace / "work")

    def names(*pairs):
        return [registry.register(drafts(workspace / "made", source, (model,)))[0].version for source, model in pairs]

    score, outcome = MODELS
    assert names(
        ("town", score),
        ("town", score),
        ("hybrid", outcome),
        ("town", outcome),
        ("hybrid", score),
        ("town", score),
        ("a-b", outcome),
    ) == ["v1.0-town", "v1.1-town", "v2.0-hybrid", "v1.0-town", "v2.0-hybrid", "v1.2-town", "v3.0-a-b"]
    made = registry.register(drafts(workspace / "made") + drafts(workspace / "made", "coupons"))
    assert [version.version for version in made] == ["v1.3-town", "v1.1-town", "v4.0-coupons", "v4.0-coupons"]
    assert check_invariants(workspace / "work") == []


def test_promotion_moves_everything_together(workspace):
    registry = Registry(workspace / "work")
    for _ in range(3):
        registry.register(drafts(workspace / "made"), promote=BOTH)
    states = {version.version: (version.status, version.aliases) for version in registry.list("outcome")}
    assert states == {
        "v1.0-town": ("deprecated", ()),
        "v1.1-town": ("deprecated", ("previous",)),
        "v1.2-town": ("active", ("champion",)),
    }
    back = registry.promote("outcome", "previous", actor="somebody", evidence={"auc": Estimate(0.1, 0.0, 0.2)})
    assert (back.version, back.status) == ("v1.1-town", "active")
    assert registry.aliases()["outcome"] == {"champion": "v1.1-town", "previous": "v1.2-town"}
    event = next(event for event in reversed(registry.events()) if event.subject == "champion")
    assert (event.before, event.after, event.actor, event.evidence["auc"]["value"]) == (
        "v1.2-town",
        "v1.1-town",
        "somebody",
        0.1,
    )
    count = len(registry.events())
    registry.promote("outcome", "v1.1-town")  # already there: nothing happens, nothing is written
    assert len(registry.events()) == count
    registry.promote("outcome", "v1.0-town", alias="challenger")
    registry.promote("outcome", "challenger")
    assert registry.aliases()["outcome"] == {"champion": "v1.0-town", "previous": "v1.1-town"}
    assert check_invariants(workspace / "work") == []


def test_nothing_is_made_by_looking(tmp_path):
    registry = Registry(tmp_path)
    assert (
        registry.list() == []
        and registry.events() == ()
        and registry.orphans() == ()
        and registry.aliases() == {model: {} for model in MODELS}
    )
    for model in MODELS:
        with pytest.raises(
            NotFoundError,
            match=f"no version of {model} is registered yet: `calling-ai run` or `calling-ai train --model {model}",
        ):
            registry.get(model)
        with pytest.raises(NotFoundError):
            registry.promote(model, "v1.0-town")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        (lambda r, d: r.get("score"), InputError, "model is 'score': it must be calling_score or outcome"),
        (
            lambda r, d: r.get("outcome", "v3.0-town"),
            NotFoundError,
            r"outcome has no version v3\.0-town: it has v1\.0-town",
        ),
        (lambda r, d: r.get("outcome", "previous"), NotFoundError, "outcome has no previous"),
        (lambda r, d: r.register([]), InputError, "there is nothing to register"),
        (
            lambda r, d: r.register(d[:1], promote={"outcome": "champion"}),
            InputError,
            "exactly one draft must be of that model",
        ),
        (
            lambda r, d: r.register(d + d, promote={"outcome": "champion"}),
            InputError,
            "exactly one draft must be of that model",
        ),
        (lambda r, d: r.register(d, promote={"outcome": "winner"}), InputError, "it must be champion or challenger"),
        (lambda r, d: r.promote("outcome", "v1.0-town", alias="previous"), InputError, "previous follows by itself"),
        (
            lambda r, d: r.promote("outcome", "v1.0-town", alias="challenger"),
            RefusedError,
            "it cannot challenge itself",
        ),
        (
            lambda r, d: r.register([VersionDraft("outcome", "town", Path("/nowhere/x.onnx"))]),
            NotFoundError,
            r"x\.onnx does not exist",
        ),
        (
            lambda r, d: r.register([VersionDraft("outcome", "town", d[0].file, parent="v9.0-town")]),
            NotFoundError,
            r"no version v9\.0-town",
        ),
    ],
)
def test_wrong_requests_change_nothing(workspace, act, kind, message):
    registry = Registry(workspace / "work")
    registry.register(drafts(workspace / "made"), promote=BOTH)
    before = registry.list(), registry.events(), registry.aliases()
    with pytest.raises(kind, match=message):
        act(registry, drafts(workspace / "made"))
    assert (registry.list(), registry.events(), registry.aliases()) == before


def test_archived_versions_play_no_part(workspace):
    registry = Registry(workspace / "work")
    registry.register(drafts(workspace / "made"))
    with writing(registry.database) as connection:
        connection.execute(versions_table.update().values(status="archived"))
    with pytest.raises(RefusedError, match="is archived"):
        registry.promote("outcome", "v1.0-town")
    with pytest.raises(sa.exc.IntegrityError, match="status"), writing(registry.database) as connection:
        connection.execute(versions_table.update().values(status="lost"))


def test_events_cannot_be_rewritten(workspace):
    registry = Registry(workspace / "work")
    registry.register(drafts(workspace / "made"))
    for statement in ("DELETE FROM registry_events", "UPDATE registry_events SET actor = 'me'"):
        with (
            pytest.raises(sa.exc.IntegrityError, match="events are only ever added"),
            writing(registry.database) as connection,
        ):
            connection.exec_driver_sql(statement)


@pytest.mark.parametrize("error", [RefusedError("differs by 0.3"), KeyboardInterrupt(), ValueError("odd")])
def test_check_sees_the_kept_file_and_can_refuse_all(workspace, error):
    registry, seen = Registry(workspace / "work"), []

    def check(draft, path):
        seen.append(path)
        assert (
            path.parent == registry.folder
            and path.read_bytes() == draft.file.read_bytes()
            and path.stem == sha256_file(path)
        )
        if draft.model == "outcome":
            raise error

    with pytest.raises(type(error)):
        registry.register(drafts(workspace / "made"), promote=BOTH, check=check)
    assert registry.list() == [] and registry.events() == ()
    assert registry.orphans() == tuple(sorted(seen)) and len(seen) == 2


def test_every_flipped_bit_is_refused(workspace):
    registry = Registry(workspace / "work")
    version = registry.register(drafts(workspace / "made"))[0]
    path, whole = registry.load_file(version), registry.read_file(version)
    path.chmod(0o644)
    for bit in np.random.default_rng(0).choice(len(whole) * 8, 500, replace=False):
        spoilt = bytearray(whole)
        spoilt[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoilt)
        with pytest.raises(IntegrityError, match="is not what was registered"):
            registry.read_file(version)
    for content in (whole[:-1], whole + b"\0", b""):
        path.write_bytes(content)
        with pytest.raises(IntegrityError, match="is not what was registered"):
            registry.load_file(version)
    path.unlink()
    with pytest.raises(IntegrityError, match=r"calling_score v1\.0-town is missing: restore"):
        registry.load_file(version)
    again = registry.register(drafts(workspace / "made"))[0]  # the same content puts the file back
    assert again.digest == version.digest and registry.read_file(version) == whole


def register_often(root: str, made: str, times: int, source: str) -> None:
    for _ in range(times):
        Registry(root).register(drafts(Path(made), source), promote=BOTH)


def test_processes_never_collide_nor_leave_gaps(workspace):
    root, made = str(workspace / "work"), str(workspace / "made")
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=register_often, args=(root, made, 10, source))
        for source in ("town", "town", "town", "hybrid")
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    names = sorted(version.version for version in Registry(root).list("outcome"))
    assert len(names) == 40 and len(set(names)) == 40
    assert {name.split(".")[0] for name in names if name.endswith("town")} == {
        name.split(".")[0] for name in names if name.endswith("town")
    }
    assert sum(name.endswith("town") for name in names) == 30
    assert check_invariants(workspace / "work") == []
    assert not list(Registry(root).orphans())


# Kills itself at the N-th executed line of our code while registering two models over two live ones; a fork for each N.
SWEEP = """
import os, signal, sys, shutil
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_registry_versions import BOTH, Registry, check_invariants, drafts
made, template, work, step = Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5])
Registry(template).register(drafts(made), promote=BOTH)
for path in made.iterdir(): path.write_bytes(path.read_bytes()[::-1])  # new content, new files
point, killed, absent, present, bad = 1, 0, 0, 0, []
while True:
    root = work / str(point)
    shutil.copytree(template, root)
    child = os.fork()
    if child == 0:
        left = [point]
        def trace(frame, event, argument):
            if "calling_ai" not in frame.f_code.co_filename: return None
            if event == "line":
                left[0] -= 1
                if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
            return trace
        sys.settrace(trace)
        Registry(root).register(drafts(made), promote=BOTH)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    versions = Registry(root).list()
    if len(versions) not in (2, 4): bad.append((point, len(versions)))
    wrong = check_invariants(root)
    if wrong: bad.append((point, wrong))
    absent, present = absent + (len(versions) == 2), present + (len(versions) == 4)
    again = Registry(root).register(drafts(made), promote=BOTH)  # the next one goes through as if nothing had happened
    if {item.version for item in again} != {f"v1.{len(versions) // 2}-town"}: bad.append((point, "number"))
    if check_invariants(root): bad.append((point, "again"))
    if any(path.suffix == ".onnx" for path in Registry(root).orphans()): bad.append((point, "orphans"))
    shutil.rmtree(root)
    if os.WIFEXITED(status): break
    killed, point = killed + 1, point + step
print(killed, absent, present, bad)
"""


def test_killed_at_any_line_it_is_all_or_nothing(workspace):
    (workspace / "template").mkdir()
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            SWEEP,
            str(Path(__file__).parent),
            str(workspace / "made"),
            str(workspace / "template"),
            str(workspace / "sweep"),
            "13",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    killed, absent, present, *bad = done.stdout.split(maxsplit=3)
    print(
        f"{killed} kills: {absent} times absent, {present} times present, 0 halves (95 % bound {3 / int(killed):.1%})"
    )
    assert bad == ["[]\n"], done.stdout
    assert int(killed) >= 40 and int(absent) > 10 and int(present) >= 1


LOOP = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_registry_versions import BOTH, Registry, drafts
print("ready", flush=True)
while True:
    made = Registry(sys.argv[2]).register(drafts(Path(sys.argv[3])), promote=BOTH)
    print(*(f"{item.model} {item.version}" for item in made), sep=",", flush=True)
"""


def test_killed_at_random_moments_nothing_acknowledged_is_lost(workspace):
    "Two writers, killed again and again; what they printed must be there."
    rng, acknowledged = np.random.default_rng(3), set()
    for number in range(40):  # on a slow machine more rounds, until something was acknowledged at all
        if number >= 4 and acknowledged:
            break
        writers = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    LOOP,
                    str(Path(__file__).parent),
                    str(workspace / "work"),
                    str(workspace / "made"),
                ],
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        for writer in writers:
            assert writer.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.05, 0.4 + 0.1 * number))
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            lines = [line for line in writer.communicate()[0].splitlines(keepends=True) if line.endswith("\n")]
            acknowledged.update(pair for line in lines for pair in line.strip().split(","))
        found = {f"{version.model} {version.version}" for version in Registry(workspace / "work").list()}
        assert acknowledged <= found
        assert check_invariants(workspace / "work") == []
    assert acknowledged


FULL = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_registry_versions import BOTH, Registry, StorageError, drafts
limit = int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try: print("made", Registry(sys.argv[2]).register(drafts(Path(sys.argv[3])), promote=BOTH)[0].version)
except StorageError as error: print(error)
"""


@pytest.mark.parametrize(
    ("size", "limit", "message"),
    [
        (90_000, 60_000, "exceed the allowed file size"),
        (3000, 20_000, r"database calling_ai\.db failed: the disk is full"),
        (3000, 500_000, "made v1.1"),
    ],
)
def test_full_disk_is_refused_with_a_remedy_and_heals(workspace, size, limit, message):
    registry = Registry(workspace / "work")
    registry.register(drafts(workspace / "made"), promote=BOTH)
    before = registry.list(), registry.events()
    make_files(workspace / "big", size)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            FULL,
            str(Path(__file__).parent),
            str(workspace / "work"),
            str(workspace / "big"),
            str(limit),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert message.replace("\\", "") in done.stdout, done.stdout + done.stderr[-1000:]
    assert check_invariants(workspace / "work") == []
    if not message.startswith("made"):
        assert (registry.list(), registry.events()) == before
        assert registry.register(drafts(workspace / "big"), promote=BOTH)[0].version == "v1.1-town"
    assert not [path for path in registry.orphans() if path.suffix == ".part"]


def test_folder_that_cannot_be_written(workspace):
    (workspace / "work" / "var").mkdir()
    (workspace / "work" / "var" / "models").write_text("in the way")
    with pytest.raises(StorageError, match="writing"):
        Registry(workspace / "work").register(drafts(workspace / "made"))
    assert Registry(workspace / "work").list() == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_is_named(workspace):
    (workspace / "work").chmod(0o555)
    with pytest.raises(StorageError, match="permission denied"):
        Registry(workspace / "work").register(drafts(workspace / "made"))


def test_import_is_light():
    code = (
        "import sys, calling_ai.registry.versions\n"
        "print([name for name in ('pandas', 'torch', 'matplotlib', 'onnxruntime') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_damaged_file_is_replaced_when_its_content_comes_again(workspace):
    registry = Registry(workspace / "work")
    version = registry.register(drafts(workspace / "made"))[0]
    path = registry.load_file(version)
    path.chmod(0o644)
    path.write_bytes(b"damaged")
    assert registry.register(drafts(workspace / "made"))[0].digest == version.digest
    assert registry.load_file(version).read_bytes() == (workspace / "made" / "calling_score.onnx").read_bytes()


def test_disk_that_keeps_something_else_is_noticed(workspace, monkeypatch):
    from calling_ai.registry import versions

    monkeypatch.setattr(versions.shutil, "copyfile", lambda source, target: Path(target).write_bytes(b"something else"))
    with pytest.raises(IntegrityError, match="reads back differently"):
        Registry(workspace / "work").register(drafts(workspace / "made"))
    assert Registry(workspace / "work").list() == []
