"""Whatever breaks, a valid request is scored: by the last good release, then by the formula; and it heals."""

import dataclasses
import hashlib
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from serving import POLICY, Place, moments
from test_models_graph_release import NAMES, network

from calling_ai.core.errors import IntegrityError, NotFoundError
from calling_ai.models.graph import release_bytes
from calling_ai.serve import scorer as module
from calling_ai.serve.releases import Memory, open_release
from calling_ai.serve.scorer import Scorer

HERE = Path(__file__).parent


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << (at % 8))]) + data[at + 1 :]


def write(path: Path, data: bytes) -> None:
    if path.exists():
        path.chmod(0o644)
    path.write_bytes(data)


def greedy(model: str) -> bytes:
    "Return a network that asks for more memory than there is."
    made = onnx.load_model_from_string(network(model, 3))
    for name, shape in (("row", (1, 40_000)), ("column", (40_000, 1))):
        made.graph.initializer.append(numpy_helper.from_array(np.zeros(shape, "float32"), name))
    extra = [
        helper.make_node("ReduceMean", ["features"], ["small"], keepdims=0),
        helper.make_node("Add", ["row", "small"], ["line"]),  # not known before it runs
        helper.make_node("Add", ["line", "column"], ["pairs"]),  # 6.4 GB
        helper.make_node("ReduceMax", ["pairs"], ["largest"], keepdims=0),
        helper.make_node("Add", ["logit", "largest"], ["moved"]),
    ]
    last = made.graph.node[-1]
    last.input[0] = "moved"
    nodes = [*list(made.graph.node)[:-1], *extra, last]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    return made.SerializeToString()


def slow(model: str, times: int) -> bytes:
    "Return a network that multiplies a large matrix many times before it answers as before."
    made = onnx.load_model_from_string(network(model, 3))
    made.graph.initializer.append(numpy_helper.from_array(np.zeros((1024, 1024), "float32"), "wide"))
    made.graph.initializer.append(
        numpy_helper.from_array(np.zeros((39 if model == "calling_score" else 45, 1024), "float32"), "in")
    )
    made.graph.initializer.append(numpy_helper.from_array(np.zeros((1024, 1), "float32"), "out"))
    nodes, name = [helper.make_node("MatMul", ["filled", "in"], ["step0"])], "step0"
    for place in range(times):
        nodes.append(helper.make_node("MatMul", [name, "wide"], [f"product{place}"]))
        nodes.append(helper.make_node("Sigmoid", [f"product{place}"], [f"step{place + 1}"]))
        name = f"step{place + 1}"
    nodes += [
        helper.make_node("MatMul", [name, "out"], ["nothing"]),
        helper.make_node("Add", ["logit", "nothing"], ["moved"]),
    ]
    last = made.graph.node[-1]
    last.input[0] = "moved"
    kept = [*list(made.graph.node)[:-1], *nodes, last]
    del made.graph.node[:]
    made.graph.node.extend(kept)
    return made.SerializeToString()


def with_opset(data: bytes, opset: int) -> bytes:
    model = onnx.load_model_from_string(data)
    model.opset_import[0].version = opset
    return model.SerializeToString()


def renamed(data: bytes) -> bytes:
    model = onnx.load_model_from_string(data)
    model.graph.output[0].name = model.graph.node[-1].output[0] = "another"
    return model.SerializeToString()


def negative(model: str) -> bytes:
    "Return a network whose logarithm is never a number."
    made = onnx.load_model_from_string(network(model, 3, "Log"))
    tensor = next(item for item in made.graph.initializer if item.name == "weights")
    tensor.CopyFrom(numpy_helper.from_array(-np.ones(tuple(tensor.dims), "float32"), "weights"))
    return made.SerializeToString()


# What can be wrong with the files of a new champion: each takes what is there and says what lies there instead.
HARMS = {
    "missing": lambda data, kind: None,
    "one bit": lambda data, kind: flip(data, len(data) // 3),
    "cut short": lambda data, kind: data[: len(data) // 2],
    "another file": lambda data, kind: network("outcome", 77) if kind != "release" else release_bytes(),
}
# What can be wrong although it is exactly what was registered.
REGISTERED = {
    "opset": lambda data, kind: with_opset(data, 99),
    "interface": lambda data, kind: renamed(data) if kind in NAMES else network("calling_score", 3),
    "no number": lambda data, kind: negative(kind) if kind in NAMES else release_bytes(negative("calling_score")),
    "memory": lambda data, kind: greedy(kind) if kind in NAMES else release_bytes(greedy("calling_score")),
}


def spoilt(place: Place, cause: str, seed: int) -> tuple[dict, dict[Path, bytes]]:
    "Promote a champion of which no file is usable; return it and what its files must be."
    if cause in HARMS:
        versions = place.train(seed)
        whole = {path: path.read_bytes() for path in place.files(versions)}
        for path, data in whole.items():
            kind = "release" if path.parent == place.registry.releases else "calling_score"
            harmed = HARMS[cause](data, kind)
            path.unlink() if harmed is None else write(path, harmed)
        return versions, whole
    from calling_ai.registry.versions import VersionDraft

    drafts = []
    for model in NAMES:
        path = place.scratch / f"bad-{model}.onnx"
        path.write_bytes(REGISTERED[cause](network(model, seed), model))
        drafts.append(VersionDraft(model, "town", path))
    versions = {item.model: item for item in place.registry.register(drafts, dict.fromkeys(NAMES, "champion"))}
    whole = release_bytes(*(network(model, seed) for model in NAMES))
    place.compose(versions, REGISTERED[cause](whole, "release"))
    return versions, {}


def drill(root: Path, cause: str, trials: int) -> list[float]:
    "Break and repair champions; return the milliseconds until the first score each time."
    place, values, taken = Place(root), moments(3), []
    good = place.train(1)
    scorer = Scorer.load(root=root, policy=POLICY, refresh_seconds=3600)
    for trial in range(trials):
        assert scorer.score_array(values).release == place.registry.release(good).digest
        bad, whole = spoilt(place, cause, 100 + trial)
        assert scorer.refresh() or scorer._live.why, "the change was not seen"
        begun = time.perf_counter()
        scored = scorer.score_array(values[:1])
        taken.append((time.perf_counter() - begun) * 1e3)
        for found in (scored, scorer.score_array(values)):
            assert found.release == place.registry.release(good).digest, "the last good release answers"
            assert found.why.endswith("last good release") and place.wrong(found, found.features) == 0
        fresh = Scorer.load(root=root, policy=POLICY, refresh_seconds=3600).score_array(values)
        assert fresh.release == scored.release and place.wrong(fresh, values) == 0, "a new process finds it too"
        told_before = dict(scorer.counts.failures)
        scorer.refresh()
        assert sum(scorer.counts.failures.values()) - sum(told_before.values()) <= 1
        for path, data in whole.items():
            write(path, data)
        if not whole:  # what was registered is bad: the registry is repaired by going back
            place.promote(good)
        scorer.refresh()
        healed = scorer.score_array(values)
        assert healed.why is None and healed.path.tolist() == ["network"] * 3 and place.wrong(healed, values) == 0
        if whole:
            assert healed.versions == {model: item.version for model, item in bad.items()}
            place.promote(good)
            scorer.refresh()
    return taken


def drill_apart(root: Path, cause: str, trials: int) -> list[float]:
    "The same in a process of its own that may use two gigabytes more than it has."
    code = (
        "import json, resource, sys\nfrom pathlib import Path\nsys.path.insert(0, sys.argv[1])\n"
        "from test_serve_faults import drill\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 2**30,) * 2)\n"
        "print(json.dumps(drill(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))))"
    )
    command = [sys.executable, "-c", code, str(HERE), str(root), cause, str(trials)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("cause", [*HARMS, *REGISTERED])
def test_a_broken_champion_leads_to_the_last_good_release_and_heals(tmp_path, cause):
    taken = (drill_apart if cause == "memory" else drill)(tmp_path, cause, 4)
    print(f"{cause}: 4 trials, 0 failed, first score within {max(taken):.1f} ms")


@pytest.mark.long
@pytest.mark.parametrize("cause", [*HARMS, *REGISTERED])
def test_a_broken_champion_a_hundred_times(tmp_path, cause):
    taken = (drill_apart if cause == "memory" else drill)(tmp_path, cause, 100)
    print(f"{cause}: 100 trials, 0 failed (below {3 / 100:.0%} with 95 % confidence), first score median "
          f"{np.median(taken):.2f} ms, worst {max(taken):.2f} ms")  # fmt: skip


def test_a_release_alone_that_breaks_is_answered_by_its_parts(tmp_path):
    place, values = Place(tmp_path), moments(5)
    place.train(1)
    second = place.train(2)
    file = place.files(second)[-1]
    whole = file.read_bytes()
    for harm in HARMS.values():
        data = harm(whole, "release")
        file.unlink() if data is None else write(file, data)
        scored = Scorer.load(root=tmp_path, policy=POLICY, refresh_seconds=3600).score_array(values)
        assert scored.release is None and scored.why.startswith("release ") and place.wrong(scored, values) == 0
        assert scored.versions == {model: item.version for model, item in second.items()}
        write(file, whole)
    assert Scorer.load(root=tmp_path, policy=POLICY).score_array(values).why is None


def test_a_release_that_was_rolled_back_never_stands_in(tmp_path):
    place, values = Place(tmp_path), moments(4)
    first = place.train(1)
    scorer = Scorer.load(root=tmp_path, policy=POLICY, refresh_seconds=3600)
    second = place.train(2)
    assert scorer.refresh() and scorer.versions == {model: item.version for model, item in second.items()}
    for path in place.files(first):
        path.unlink()  # what is wanted after the rollback cannot be opened
    place.promote(first)
    scorer.refresh()
    for found in (scorer, Scorer.load(root=tmp_path, policy=POLICY, refresh_seconds=3600)):
        scored = found.score_array(values)
        assert scored.release is None and not scored.versions and set(scored.path) == {"formula"}
        assert place.wrong(scored, values) == 0 and "is missing" in scored.reason[0]


def test_without_anything_remembered_it_is_the_formula(tmp_path):
    place, values = Place(tmp_path), moments(4)
    versions = place.train(1)
    for path in place.files(versions):
        write(path, b"nonsense")
    scored = Scorer.load(root=tmp_path, policy=POLICY).score_array(values)
    assert set(scored.path) == {"formula"} and "is not what was registered" in scored.reason[0]
    assert place.wrong(scored, values) == 0
    with pytest.raises(IntegrityError, match="is not what was registered"):
        Scorer.load(root=tmp_path, strict=True)


def test_registry_away_goes_on_with_what_was_live(tmp_path):
    place, values = Place(tmp_path), moments(4)
    place.train(1)
    scorer = Scorer.load(root=tmp_path, policy=POLICY, refresh_seconds=3600)
    database = tmp_path / "var" / "calling_ai.db"
    held = database.read_bytes()
    database.write_bytes(b"not a database" * 500)
    assert not scorer.refresh() and scorer.score_array(values).why is None
    assert scorer.counts.failures == {"database calling_ai.db failed": 1}
    scored = Scorer.load(root=tmp_path, policy=POLICY).score_array(values)
    assert scored.why == "database calling_ai.db failed; last good release" and place.wrong(scored, values) == 0
    # what is remembered is read by the guard when nobody vouches for it
    memory = Memory(scorer._source.found)
    stranger = release_bytes(network("calling_score", 9)).replace(b"Sigmoid", b"NonZero")
    name = hashlib.sha256(stranger).hexdigest()
    (memory.folder / f"{name}.onnx").write_bytes(stranger)
    entry = {"key": "x", "digest": name, "size": len(stranger), "versions": {}}
    memory.keep(None, [entry])
    scored = Scorer.load(root=tmp_path, policy=POLICY).score_array(values)
    assert set(scored.path) == {"formula"} and scored.reason[0] == "database calling_ai.db failed"
    database.write_bytes(held)
    assert Scorer.load(root=tmp_path, policy=POLICY).score_array(values).why is None


def test_a_hidden_change_of_memory_is_no_way_in(tmp_path):
    """Whoever may write beside the releases cannot have another file served while the database answers."""
    place, values = Place(tmp_path), moments(4)
    place.train(1)
    Scorer.load(root=tmp_path, policy=POLICY)
    memory = tmp_path / "var" / "releases" / "live.json"
    other = release_bytes(network("calling_score", 5), network("outcome", 5))
    name = hashlib.sha256(other).hexdigest()
    (memory.parent / f"{name}.onnx").write_bytes(other)
    held = json.loads(memory.read_text())
    held["wanted"]["release"] = {"digest": name, "size": len(other)}
    memory.write_text(json.dumps(held))
    scored = Scorer.load(root=tmp_path, policy=POLICY).score_array(values)
    assert scored.release != name and place.wrong(scored, values) == 0


@pytest.mark.parametrize("stage", ["live", "fresh"])
def test_too_slow_is_answered_in_time_and_rests(tmp_path, stage):
    from calling_ai.registry.versions import VersionDraft

    place, values = Place(tmp_path), moments(2)
    good = place.train(1)
    budget = {"refresh_seconds": 3600, "budget_seconds": 0.004}
    scorer = Scorer.load(root=tmp_path, policy=POLICY, **budget)
    drafts = []
    for model in NAMES:
        path = place.scratch / f"slow-{model}.onnx"
        path.write_bytes(slow(model, 150))
        drafts.append(VersionDraft(model, "town", path))
    versions = {item.model: item for item in place.registry.register(drafts, dict.fromkeys(NAMES, "champion"))}
    place.compose(versions)
    if stage == "live":
        scorer.score_array(values)
        assert scorer.refresh()
    else:
        scorer = Scorer.load(root=tmp_path, policy=POLICY, **budget)
    ways = [scorer.score_array(values) for _ in range(6)]
    for scored in ways:
        assert place.wrong(scored, values) == 0
        if stage == "live":
            assert scored.release == place.registry.release(good).digest and scored.why.endswith(
                "4 ms; last good release"
            )
        else:
            assert set(scored.path) == {"formula"} and scored.reason[0].endswith("took longer than 4 ms")
    health = scorer._live.health
    assert health.failures == 3 and health.rests_until > time.monotonic(), "after three it rests"
    place.promote(good)
    assert scorer.refresh() and scorer.score_array(values).why is None


def test_a_failing_engine_is_replaced_while_it_runs(tmp_path):
    place, values = Place(tmp_path), moments(3)
    good = place.train(1)
    scorer = Scorer.load(root=tmp_path, policy=POLICY, refresh_seconds=0.2)
    place.train(2)
    assert scorer.refresh()

    def broken(*_):
        raise MemoryError

    live = scorer._live
    scorer._live = dataclasses.replace(live, ask=broken)
    scored = scorer.score_array(values)
    assert scored.release == place.registry.release(good).digest and place.wrong(scored, values) == 0
    assert scored.why == f"release {live.release[:12]} failed with MemoryError; last good release"
    for _ in range(3):
        scorer.score_array(values)
    until = time.monotonic() + 20
    while scorer.score_array(values).why is not None and time.monotonic() < until:
        time.sleep(0.05)
    assert scorer.score_array(values).release == live.release, "it healed by itself"
    scorer.close()


def test_one_event_for_each_process_version_and_cause(tmp_path, caplog):
    place = Place(tmp_path)
    place.train(1)
    module._told.clear()
    caplog.set_level(logging.WARNING, "calling_ai.serve")
    scorer = Scorer.load(root=tmp_path, policy=POLICY, refresh_seconds=3600)

    def broken(*_):
        raise ZeroDivisionError

    scorer._live = dataclasses.replace(scorer._live, ask=broken)
    for _ in range(50):
        assert scorer.score({}).path == "formula"
    assert len(caplog.records) == 1 and "failed with ZeroDivisionError" in caplog.text
    counts = scorer.counts
    assert counts.by_path == {"formula": 50} and list(counts.by_reason.values()) == [50]
    assert list(counts.failures.values()) == [50]


@pytest.mark.parametrize("trials", [300, pytest.param(5_000, marks=pytest.mark.long)])
def test_every_change_of_a_file_is_refused_before_it_is_parsed(tmp_path, trials, monkeypatch):
    place = Place(tmp_path)
    versions = place.train(1)
    kept = place.registry.release(versions)
    file, rng = place.registry.releases / f"{kept.digest}.onnx", np.random.default_rng(0)
    whole = file.read_bytes()
    entry = {"digest": kept.digest, "size": kept.size}
    opened = []
    monkeypatch.setattr("calling_ai.serve.releases.open_session", lambda data, name: opened.append(name))
    others = [whole + b"\0", whole[:-1], b"", whole[1:] + whole[:1], release_bytes()]
    for trial in range(trials):
        write(file, others[trial] if trial < len(others) else flip(whole, int(rng.integers(len(whole)))))
        with pytest.raises(IntegrityError, match="is not what was registered"):
            open_release(file.parent, entry, {})
    assert not opened
    print(f"{trials} changes, 0 accepted (below {3 / trials:.2%} with 95 % confidence)")


def rollbacks(place: Place, scorer: Scorer, changes: int, threads: int = 8) -> tuple[int, int, int]:
    "Change champions while threads score; return scores, wrong ones, and pairs of versions seen."
    pairs = [place.train(seed, promote=seed == 1) for seed in (1, 2, 3)]
    values, stop = moments(64, 5), threading.Event()
    counted, wrong, seen = [0] * threads, [], set()

    def work(index: int) -> None:
        rng = np.random.default_rng(index)
        while not stop.is_set():
            row = int(rng.integers(len(values)))
            try:
                scored = scorer.score_array(values[row : row + 1])
                if place.wrong(scored, values[row : row + 1]):
                    wrong.append((row, dict(scored.versions), scored.why))
            except Exception as error:
                wrong.append((row, repr(error)))
            seen.add(tuple(sorted(scored.versions.items())))
            counted[index] += 1
            time.sleep(0.002)  # the champions have to change meanwhile

    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for change in range(changes):
        place.promote(pairs[(change + 1) % 3])
        scorer.refresh()
    stop.set()
    for worker in workers:
        worker.join()
    assert not wrong, wrong[:3]
    return sum(counted), len(wrong), len(seen)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [60, pytest.param(1_000, marks=pytest.mark.long)])
def test_champions_change_under_eight_threads(tmp_path, changes):
    place = Place(tmp_path)
    scorer = Scorer.load(root=tmp_path, policy=POLICY, refresh_seconds=0.05)
    scored, wrong, seen = rollbacks(place, scorer, changes)
    scorer.close()
    assert scored > changes and seen >= 3
    print(
        f"{changes} changes, {scored:,} scores in 8 threads, {wrong} wrong (below {3 / scored:.2%}), {seen} pairs seen"
    )


def test_a_child_after_a_fork_goes_on(tmp_path):
    place, values = Place(tmp_path), moments(4)
    place.train(1)
    scorer = Scorer.load(root=tmp_path, policy=POLICY, refresh_seconds=0.05, budget_seconds=5.0)
    expected = scorer.score_array(values).answer
    assert scorer._watched and scorer._pool is not None
    inside, outside = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            fine = bool((scorer.score_array(values).answer == expected).all())
            second = place.train(2)
            until = time.monotonic() + 30
            while scorer.versions["outcome"] != second["outcome"].version and time.monotonic() < until:
                scorer.score_array(values)
                time.sleep(0.02)
            fine = fine and place.wrong(scorer.score_array(values), values) == 0
            os.write(outside, f"{int(fine)} {scorer.versions['outcome']}".encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(inside, 100).decode() == "1 v1.1-town"
    until = time.monotonic() + 30
    while scorer.versions["outcome"] != "v1.1-town" and time.monotonic() < until:
        time.sleep(0.02)
    assert scorer.versions["outcome"] == "v1.1-town", "the parent sees it as well"
    scorer.close()


WORKER = """
import sys, time
sys.path.insert(0, sys.argv[2])
from calling_ai.serve.scorer import Scorer
scorer = Scorer.load(root=sys.argv[1], refresh_seconds=0.2)
last = None
while True:
    release = scorer.score({}).release
    if release != last: print(time.time(), release, flush=True)
    last = release
    time.sleep(0.005)
"""


def fleet(root: Path, processes: int, drills: int) -> tuple[list[float], list[float]]:
    "Promote and roll back while processes score; return seconds until all had changed, and of the rollback itself."
    place = Place(root)
    good, bad = place.train(1), place.train(2)
    names = {which: place.registry.release(versions).digest for which, versions in (("good", good), ("bad", bad))}
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(root), str(HERE)], stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    lines: list[list[str]] = [[] for _ in workers]
    for worker, kept in zip(workers, lines):
        threading.Thread(target=lambda w=worker, k=kept: k.extend(iter(w.stdout.readline, "")), daemon=True).start()
    took, wrote = [], []

    def wait_for(name: str) -> float:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            if all(kept and kept[-1].split()[1] == names[name] for kept in lines):
                return max(float(kept[-1].split()[0]) for kept in lines)
            time.sleep(0.01)
        raise AssertionError(f"not all processes serve the {name} release: {[kept[-1:] for kept in lines]}")

    try:
        wait_for("bad")
        for _ in range(drills):
            begun = time.perf_counter()
            place.registry.promote("calling_score", good["calling_score"].version, actor="rollback")
            wrote.append(time.perf_counter() - begun)
            place.promote(good)
            at = time.time()
            took.append(wait_for("good") - at)
            counted = [len(kept) for kept in lines]
            time.sleep(0.3)
            assert counted == [len(kept) for kept in lines], "somebody went back to the bad one"
            place.promote(bad)
            wait_for("bad")
    finally:
        for worker in workers:
            worker.send_signal(signal.SIGKILL)
            worker.wait()
    return took, wrote


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "drills"), [(3, 3), pytest.param(8, 100, marks=pytest.mark.long)])
def test_a_rollback_reaches_every_process(tmp_path, processes, drills):
    took, wrote = fleet(tmp_path, processes, drills)
    assert max(took) < 10
    print(f"{drills} drills, {processes} processes looking every 0.2 s: all changed within {max(took):.2f} s; "
          f"one transaction took {np.median(wrote) * 1e3:.0f} ms (median)")  # fmt: skip


def test_loading_a_champion_again_needs_no_database_library(tmp_path):
    place = Place(tmp_path)
    versions = place.train(1)
    Scorer.load(root=tmp_path)
    code = (
        "import sys\nfrom calling_ai.serve.scorer import Scorer\n"
        "scorer = Scorer.load(root=sys.argv[1])\nprint(scorer.release)\n"
        "heavy = ('pandas', 'torch', 'matplotlib', 'scipy', 'prefect', 'onnx', 'sqlalchemy', 'IPython', 'narwhals')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{place.registry.release(versions).digest}\n[]\n"


def test_no_code_is_unpickled_on_the_way_to_a_score(tmp_path):
    place = Place(tmp_path)
    place.train(1)
    code = (
        "import sys\nseen = []\n"
        "sys.addaudithook(lambda event, _: seen.append(event) if event == 'pickle.find_class' else None)\n"
        "from calling_ai.serve.scorer import Scorer\n"
        "scorer = Scorer.load(root=sys.argv[1])\nscorer.score({'user_overall_energy': 0.5})\n"
        "scorer.refresh()\nprint(seen)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_unknown_names_are_errors_and_named_versions_stay(tmp_path):
    place, values = Place(tmp_path), moments(3)
    place.train(1)
    named = Scorer.load("v1.0-town", root=tmp_path, policy=POLICY, refresh_seconds=3600)
    place.train(2)
    assert not named.refresh() or named.versions["outcome"] == "v1.0-town"
    assert named.versions["outcome"] == "v1.0-town" and place.wrong(named.score_array(values), values) == 0
    with pytest.raises(NotFoundError, match="no model has the version v8.0-town"):
        Scorer.load("v8.0-town", root=tmp_path)


def test_a_folder_that_may_not_be_written_is_no_reason_to_stop(tmp_path):
    place, values = Place(tmp_path), moments(3)
    place.train(1)
    memory = tmp_path / "var" / "releases" / "live.json"
    memory.unlink(missing_ok=True)
    memory.mkdir()
    scored = Scorer.load(root=tmp_path, policy=POLICY).score_array(values)
    assert scored.why is None and place.wrong(scored, values) == 0


def test_the_marker_sees_every_change(tmp_path):
    place = Place(tmp_path)
    place.train(1)
    scorer = Scorer.load(root=tmp_path, policy=POLICY, refresh_seconds=3600)
    assert not scorer.refresh()
    with sqlite3.connect(tmp_path / "var" / "calling_ai.db") as connection:
        before = connection.execute("SELECT max(number) FROM registry_events").fetchone()[0]
    place.train(2, release=False)
    assert scorer.refresh() and scorer.release is None and scorer._source.wanted.marker > before
    assert scorer.score({}).reason == "no release of these versions"
    place.compose({model: place.registry.get(model) for model in NAMES})
    assert scorer.refresh() and scorer.release is not None and scorer.score({}).reason is None
