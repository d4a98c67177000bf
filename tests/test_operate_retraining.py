"""The loop that lives on and trains again: once a period, and resumed where it was killed."""

import ast
import datetime as dt
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from calling_ai.core.settings import Settings, settings
from calling_ai.operate import loop, retraining
from calling_ai.operate.collect import life_name, town_log
from calling_ai.operate.notebooks import NotebookError, run_notebook
from calling_ai.operate.rollout import begin, clock, step
from calling_ai.registry.audit import audit
from calling_ai.registry.versions import Registry
from calling_ai.serve.scorer import replay
from calling_ai.store.database import engine
from calling_ai.store.decisions import DecisionLog
from calling_ai.store.runs import listed

SMALL = """
[town]
people = 150
weeks = 3
further_weeks = 1
[evaluation]
test_weeks = 1
replicates = 60
[training]
epochs = 2
[experiment]
window_days = 2
[rollout]
shadow_decisions = 200
effect = 0.5
[schedules]
lease_seconds = 2
"""


def place(folder: Path, root: Path, text: str = SMALL) -> Settings:
    """Make a workspace with the notebooks of the pipeline."""
    (folder / "nbs").mkdir(parents=True)
    shutil.copytree(root / "nbs" / "pipelines", folder / "nbs" / "pipelines")
    (folder / "settings.ini").write_text(text)
    return settings(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A workspace that was trained once and has lived on for a week; to be copied."""
    workspace = place(tmp_path_factory.mktemp("trained") / "place", root)
    first = retraining.retrain(workspace)
    assert (first.trained, set(first.verdicts.values())) == (("first",), {"first"})
    loop.live_on(workspace)
    return workspace.root


@pytest.fixture
def workspace(trained: Path, tmp_path: Path) -> Settings:
    return settings(shutil.copytree(trained, tmp_path / "copy"))


def in_a_process(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, with the settings of its workspace alone."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CALLING_AI_")}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


def tables(workspace: Settings) -> dict[str, Any]:
    """Return what the database holds, without names that differ from run to run."""
    book = DecisionLog.open(workspace)
    frame = book.joined()
    versions = Registry(workspace.root).list()
    return {
        "decisions": pd.util.hash_pandas_object(frame.drop(columns=["recorded_at"])).sum(),
        "outcomes": book.counts().outcomes,
        "versions": [(item.model, item.version, item.digest, item.status, item.aliases) for item in versions],
        "runs": [(run.kind, run.state) for run in listed(engine(workspace.database_url), "retrain")],
    }


# -------------------------------------------------------------------------------------------------------- the loop


def test_what_was_lived_is_logged_as_an_application_would(workspace: Settings) -> None:
    book = DecisionLog.open(workspace)
    frame, whole = book.joined(), loop.lived(workspace)
    assert whole is not None and len(frame) == len(whole)
    live = frame[frame["release_version"].notna()]
    assert len(live) == int((whole.decisions["record_id"] >= 3 * 10_000_000).sum()) > 100
    assert set(live["path"]) == {"hybrid"} or set(live["path"]) <= {"full", "hybrid", "network"}, set(live["path"])
    row = live.iloc[7]
    again = replay(row, workspace.root)
    assert again.calling_score == pytest.approx(row["calling_score"], abs=1e-9)
    whole_score = whole.decisions["calling_score"].to_numpy()
    assert np.isfinite(whole_score).all() and frame["reason"].isna().mean() > 0.2


def test_killed_between_keeping_and_logging_nothing_is_lost_or_doubled(workspace: Settings, tmp_path: Path) -> None:
    other = settings(shutil.copytree(workspace.root, tmp_path / "other"))
    loop.live_on(other)
    life = life_name(150, workspace.town.seed, loop.town_policy(workspace))
    last, rows = loop._read(loop._stretches(workspace)[-1])
    assert loop._record(workspace, town_log(workspace.root), last, rows, life) == (0, 0)  # it is there already
    calls: list[int] = []

    def dies(*arguments: Any) -> tuple[int, int]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return 0, 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_record", dies)
        with pytest.raises(KeyboardInterrupt):
            loop.live_on(workspace)
    assert loop.lived_weeks(workspace) == 5
    assert DecisionLog.open(workspace).counts().decisions < len(loop.lived(workspace))  # type: ignore[arg-type]
    loop.live_on(workspace)
    loop.live_on(other)
    assert tables(workspace)["decisions"] == tables(other)["decisions"]
    assert tables(workspace)["outcomes"] == tables(other)["outcomes"]


def test_a_rollout_splits_the_people_of_the_town(workspace: Settings) -> None:
    registry = Registry(workspace.root)
    state = begin(workspace, weight=0.2, actor="a test")
    assert state.weight == 0.2 and not state.versions
    loop.live_on(workspace)
    assert step(workspace, clock(workspace)).state == "10 %"
    lived_on = loop.live_on(workspace)
    assert (lived_on.rollout, lived_on.stage) == ("rollout-1", "10 %")
    book = DecisionLog.open(workspace)
    frame, exposed = book.joined(), book.exposed("rollout-1")
    split = frame[frame["experiment"] == "rollout-1"]
    arms = dict(zip(exposed["user_key"], exposed["arm"], strict=True))
    assert len(split) > 100 and {"champion", "challenger"} == set(split["arm"])
    assert (split["arm"] == split["user_key"].map(arms)).all()
    assert set(split[split["arm"] == "challenger"]["weight"].round(6)) >= {0.2}
    assert split[split["arm"] == "champion"]["weight"].max() == 0
    assert [check.name for check in audit(registry) if not check.ok] == []


_COLLECT = """
import os, sys, threading, time, signal
from calling_ai.core.settings import settings
from calling_ai.operate import schedule
workspace, seconds = settings(sys.argv[1]), float(sys.argv[2])
print("ready", flush=True)
if seconds: threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
begun = time.monotonic()
schedule.once(workspace, "collect", lambda key: schedule.collect(workspace, key))
print(time.monotonic() - begun, flush=True)
os._exit(0)
"""


def collect_once(folder: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    return in_a_process(_COLLECT, folder, seconds)


def killed_collects(workspace: Settings, times: int, folder: Path) -> int:
    """Kill a collecting flow at random moments; run again, the log is that of one that was not killed."""
    workspace = settings(shutil.copytree(workspace.root, folder / "from"))
    text = (workspace.root / "settings.ini").read_text()
    (workspace.root / "settings.ini").write_text(text.replace("lease_seconds = 2", "lease_seconds = 1"))
    whole = settings(shutil.copytree(workspace.root, folder / "whole"))
    done = collect_once(whole.root, 0)
    assert done.returncode == 0, done.stderr[-2_000:]
    takes, expected, killed, draw = float(done.stdout.split()[-1]), tables(whole), 0, np.random.default_rng(9)
    for number in range(times):
        copy = settings(shutil.copytree(workspace.root, folder / f"kill-{number}"))
        killed += collect_once(copy.root, float(draw.uniform(0.01, takes))).returncode == -signal.SIGKILL
        time.sleep(1.2)  # until its lease has passed
        again = collect_once(copy.root, 0)
        assert again.returncode == 0, again.stderr[-2_000:]
        found = tables(copy)
        assert {**found, "runs": expected["runs"]} == expected and loop.lived_weeks(copy) == 5, number
        shutil.rmtree(copy.root)
    return killed


@pytest.mark.long
def test_collecting_killed_at_fifty_random_points(workspace: Settings, tmp_path: Path) -> None:
    killed = killed_collects(workspace, 50, tmp_path)
    print(
        f"collecting killed at {killed} random points: the log is that of one clean run (95 % below {3 / killed:.0%})"
    )
    assert killed >= 30


# ------------------------------------------------------------------------------------------------- once, and again


def asks(folder: Path, start: Any, answers: Any) -> None:
    start.wait()
    answers.put(retraining.retrain(settings(folder), now=dt.datetime(2026, 3, 1, tzinfo=dt.UTC)).to_dict())


@pytest.mark.long
def test_asked_four_times_at_once_it_trains_once(root: Path, tmp_path: Path) -> None:
    workspace = place(tmp_path / "place", root, SMALL.replace("lease_seconds = 2", "lease_seconds = 30"))
    clock(workspace)
    context = multiprocessing.get_context("fork")
    start, answers = context.Event(), context.Queue()
    askers = [context.Process(target=asks, args=(workspace.root, start, answers)) for _ in range(4)]
    for process in askers:
        process.start()
    start.set()
    said = [answers.get(timeout=300) for _ in askers]
    for process in askers:
        process.join()
    assert [len(item["trained"]) for item in said].count(1) == 1
    assert sum(len(item["taken"]) for item in said) == 3
    assert [item.version for item in Registry(workspace.root).list()] == ["v1.0-town", "v1.0-town"]


_RETRAIN = """
import os, signal, sys, threading, time
from calling_ai.core.settings import settings
from calling_ai.operate import retraining
seen, target = [], int(sys.argv[2])
def wrap(name, work):
    result = work()
    seen.append(name)
    if len(seen) == target: os.kill(os.getpid(), signal.SIGKILL)
    return result
from datetime import timedelta
workspace = settings(sys.argv[1])
later = retraining.trained_until(workspace) + timedelta(days=37)
seconds, begun = float(sys.argv[3]), time.monotonic()
if seconds: threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
done = retraining.retrain(workspace, now=later, wrap=wrap)
print([done.taken_over, done.skipped, time.monotonic() - begun], flush=True)
os._exit(0)
"""


def run_retraining(folder: Path, target: int, seconds: float = 0.0) -> subprocess.CompletedProcess[str]:
    """Retrain; killed after so many steps, or after so many seconds, unless they are zero."""
    return in_a_process(_RETRAIN, folder, target, seconds)


def killed_and_resumed(workspace: Settings, targets: list[int], folder: Path) -> int:
    """Kill retrainings after some of their steps; run again they end as one that was not killed."""
    whole = settings(shutil.copytree(workspace.root, folder / "whole"))
    assert run_retraining(whole.root, 0).returncode == 0
    expected = tables(whole)
    states = [state for _, state in expected["runs"]]
    assert (states.count("done"), states.count("skipped")) == (2, 4)  # five weeks were missed: the latest is trained
    for target in targets:
        copy = settings(shutil.copytree(workspace.root, folder / f"after-{target}"))
        assert run_retraining(copy.root, target).returncode == -signal.SIGKILL
        time.sleep(2.5)  # until its lease has passed
        done = run_retraining(copy.root, 0)
        assert done.returncode == 0, done.stderr[-2_000:]
        taken_over, *_ = ast.literal_eval(done.stdout)
        assert len(taken_over) >= target - 1, done.stdout
        assert tables(copy) == expected
        assert [check.name for check in audit(Registry(copy.root)) if not check.ok] == []
        shutil.rmtree(copy.root)
    return len(targets)


def test_killed_in_the_middle_it_goes_on_where_it_stopped(workspace: Settings, tmp_path: Path) -> None:
    count = killed_and_resumed(workspace, [5], tmp_path)
    print(f"retrainings killed after a step: {count}, all ended as one that was not killed")


def killed_at_random(workspace: Settings, times: int, folder: Path) -> int:
    """Kill retrainings at random moments; run again they end as one that was not killed."""
    whole = settings(shutil.copytree(workspace.root, folder / "clean"))
    done = run_retraining(whole.root, 0)
    assert done.returncode == 0, done.stderr[-2_000:]
    *_, takes = ast.literal_eval(done.stdout)
    expected, killed, draw = tables(whole), 0, np.random.default_rng(7)
    for number in range(times):
        copy = settings(shutil.copytree(workspace.root, folder / f"random-{number}"))
        killed += run_retraining(copy.root, 0, float(draw.uniform(0.01, takes))).returncode == -signal.SIGKILL
        time.sleep(2.5)  # until its lease has passed
        done = run_retraining(copy.root, 0)
        assert done.returncode == 0, done.stderr[-2_000:]
        assert tables(copy) == expected, number
        assert [check.name for check in audit(Registry(copy.root)) if not check.ok] == []
        shutil.rmtree(copy.root)
    return killed


@pytest.mark.long
def test_killed_at_fifty_random_moments(workspace: Settings, tmp_path: Path) -> None:
    killed = killed_at_random(workspace, 50, tmp_path)
    print(f"retraining killed at {killed} random moments, 0 differ from one clean run (95 % below {3 / killed:.0%})")
    assert killed >= 30


@pytest.mark.long
def test_killed_after_each_step(workspace: Settings, tmp_path: Path) -> None:
    count = killed_and_resumed(workspace, [1, 2, 3, 4, 5, 6, 7], tmp_path)
    print(f"retrainings killed after a step: {count}, all ended as one that was not killed")


@pytest.mark.long
def test_a_failing_notebook_is_told_and_tried_again(workspace: Settings) -> None:
    notebook = workspace.root / "nbs" / "pipelines" / "evaluate.ipynb"
    sound = notebook.read_text()
    broken = json.loads(sound)
    broken["cells"][-1]["source"] = "raise RuntimeError('broken on purpose')"
    notebook.write_text(json.dumps(broken))
    with pytest.raises(NotebookError, match="broken on purpose"):
        retraining.retrain(workspace, "a test")
    [run] = [run for run in listed(engine(workspace.database_url), "retrain") if run.state == "failed"]
    assert "broken on purpose" in str(run.reason)
    notebook.write_text(sound)
    done = retraining.retrain(workspace, "a test")
    assert done.taken_over == ("prepare", "train calling score", "train outcome") and done.versions


# ------------------------------------------------------------------------------------------- limits of a notebook


def notebook(folder: Path, source: str) -> Path:
    cell = {"cell_type": "code", "execution_count": None, "outputs": [], "metadata": {}, "source": source, "id": "b"}
    parameters = {
        **cell,
        "metadata": {"tags": ["parameters"]},
        "source": "record: str = ''  # where the record goes",
        "id": "a",
    }
    path = folder / "limited.ipynb"
    path.write_text(json.dumps({"cells": [parameters, cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def test_a_notebook_may_not_take_more_memory_or_time_than_allowed(tmp_path: Path) -> None:
    greedy = notebook(tmp_path, "held = bytearray(3 * 2**30)")
    with pytest.raises(NotebookError, match="MemoryError"):
        run_notebook(greedy, {}, tmp_path / "out.ipynb", memory_gib=2)
    assert run_notebook(greedy, {}, tmp_path / "out.ipynb").ok
    slow = notebook(tmp_path, "import time; time.sleep(60)")
    with pytest.raises(NotebookError, match="not finished after 8 seconds"):
        run_notebook(slow, {}, tmp_path / "out.ipynb", timeout=8)


def test_nothing_is_left_running() -> None:
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("heartbeat of retrain")]
