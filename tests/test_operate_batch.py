"""Batch scoring: nothing lost, nothing doubled, one version, an output that appears whole; also after kill -9."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calling_ai.core.contract import FEATURE_NAMES
from calling_ai.core.errors import InputError, IntegrityError, NotFoundError, RefusedError
from calling_ai.core.settings import Settings, settings
from calling_ai.operate import batch
from calling_ai.serve.scorer import Scorer


def table(rows: int, seed: int = 0) -> pd.DataFrame:
    """Return random moments with an identifier each, a few values missing."""
    generator = np.random.default_rng(seed)
    values = generator.random((rows, 45)).round(3)
    values[generator.random((rows, 45)) < 0.05] = np.nan
    return pd.DataFrame(values, columns=list(FEATURE_NAMES)).assign(decision_id=np.arange(rows) + 1_000_000 * seed)


@pytest.fixture
def at(workspace: Path) -> Settings:
    """Return the settings of a workspace without models."""
    return settings(workspace)


def test_partitions_change_nothing(at: Settings, tmp_path: Path) -> None:
    frame = table(2_000)
    frame.to_parquet(tmp_path / "in.parquet", row_group_size=170, index=False)
    expected = Scorer.load(root=at.root).score_frame(frame)
    for rows in (1, 170, 500, 100_000):
        result = batch.score_tables(at, tmp_path / "in.parquet", tmp_path / f"{rows}.parquet", rows=rows)
        found = pd.read_parquet(tmp_path / f"{rows}.parquet")
        assert found["decision_id"].tolist() == frame["decision_id"].tolist()
        pd.testing.assert_frame_equal(found[expected.columns].reset_index(drop=True), expected, check_dtype=False)
        assert result["rows"] == 2_000 and sum(result["paths"].values()) == 2_000
        assert result["missing"] == int(frame[list(FEATURE_NAMES)].isna().to_numpy().sum())
    assert not list(tmp_path.glob(".*"))


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12), rows=st.integers(1, 100))
def test_a_cut_covers_every_row_once(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], rows: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "t.parquet"
    frame = pd.DataFrame({"decision_id": np.arange(sum(sizes))})
    import pyarrow as pa

    with pq.ParquetWriter(path, pa.Schema.from_pandas(frame, preserve_index=False)) as writer:
        at = 0
        for size in sizes:
            writer.write_table(pa.Table.from_pandas(frame[at : at + size], preserve_index=False))
            at += size
    parts = batch.cut(path, "t.parquet", rows)
    assert sum(part.rows for part in parts) == sum(sizes)
    assert [part.first_row for part in parts] == np.cumsum([0, *(part.rows for part in parts)])[:-1].tolist()
    groups = [group for part in parts for group in part.groups]
    assert groups == sorted(set(groups))
    assert all(len(part.groups) == 1 or part.rows <= max(rows, max(sizes)) + 40 for part in parts)


def test_a_folder_becomes_a_folder(at: Settings, tmp_path: Path) -> None:
    for index, name in enumerate(("b.parquet", "deep/a.parquet", "deep/er/c.parquet")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        table(100, index).to_parquet(tmp_path / "in" / name, index=False)
    (tmp_path / "in" / "_ignored").mkdir()
    (tmp_path / "in" / "_ignored" / "x.parquet").write_bytes(b"not a table")
    (tmp_path / "in" / "readme.txt").write_text("not a table")
    result = batch.score_tables(at, tmp_path / "in", tmp_path / "out")
    made = sorted(
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()
    )
    assert made == ["b.parquet", "deep/a.parquet", "deep/er/c.parquet"] and result["rows"] == 300
    assert pd.read_parquet(tmp_path / "out" / "deep" / "a.parquet")["decision_id"].min() == 1_000_000
    with pytest.raises(InputError, match="output out exists already"):
        batch.score_tables(at, tmp_path / "in", tmp_path / "out")


def test_finished_parts_are_kept_and_broken_ones_done_again(at: Settings, tmp_path: Path) -> None:
    table(1_000).to_parquet(tmp_path / "in.parquet", row_group_size=100, index=False)
    job = batch.plan(at, tmp_path / "in.parquet", tmp_path / "out.parquet", rows=100)
    for index in (0, 3, 4):
        batch.score_partition(job, index)
    kept, broken = job.part(0).stat().st_mtime_ns, job.part(3)
    broken.write_bytes(broken.read_bytes()[:-20])  # a torn part
    job.part(5).write_bytes(job.part(4).read_bytes())  # a part of another partition in the wrong place
    assert batch.pending(job) == [1, 2, 3, 5, 6, 7, 8, 9]
    done: list[int] = []
    batch.score_tables(
        at, tmp_path / "in.parquet", tmp_path / "out.parquet", rows=100, progress=lambda n, _: done.append(n)
    )
    assert done[0] == 200 and done[-1] == 1_000 and kept
    assert pd.read_parquet(tmp_path / "out.parquet")["decision_id"].tolist() == list(range(1_000))


def test_another_table_or_policy_does_not_meet_old_parts(at: Settings, tmp_path: Path) -> None:
    table(300).to_parquet(tmp_path / "in.parquet", row_group_size=100, index=False)
    job = batch.plan(at, tmp_path / "in.parquet", tmp_path / "out.parquet", rows=100)
    batch.score_partition(job, 1)
    table(300, seed=2).to_parquet(tmp_path / "in.parquet", row_group_size=100, index=False)
    with pytest.raises(RefusedError, match="partitions are not done yet"):
        batch.finish(job)
    other = batch.plan(at, tmp_path / "in.parquet", tmp_path / "out.parquet", rows=100)
    assert other.digest != job.digest and batch.pending(other) == [0, 1, 2]


def test_an_input_that_changes_meanwhile_is_refused(at: Settings, tmp_path: Path) -> None:
    table(200).to_parquet(tmp_path / "in.parquet", row_group_size=100, index=False)
    job = batch.plan(at, tmp_path / "in.parquet", tmp_path / "out.parquet", rows=100)
    for index in batch.pending(job):
        batch.score_partition(job, index)
    table(200, seed=3).to_parquet(tmp_path / "in.parquet", row_group_size=100, index=False)
    with pytest.raises(RefusedError, match="input in.parquet changed while it was scored"):
        batch.finish(job)
    assert not (tmp_path / "out.parquet").exists()


def test_mistakes_have_one_sentence(at: Settings, tmp_path: Path) -> None:
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    (tmp_path / "none").mkdir()
    table(10).assign(mood=1.0).to_parquet(tmp_path / "extra.parquet", index=False)
    table(10)[:0].to_parquet(tmp_path / "empty.parquet", index=False)
    out = tmp_path / "out.parquet"
    for source, kind, words in (
        ("torn.parquet", IntegrityError, "cannot be read as parquet"),
        ("gone.parquet", NotFoundError, "does not exist"),
        ("none", InputError, "holds no .parquet file"),
        ("extra.parquet", InputError, "unknown column mood"),
        ("empty.parquet", InputError, "holds no rows"),
    ):
        target = tmp_path / "folder-out" if source == "none" else out
        with pytest.raises(kind, match=words):
            batch.score_tables(at, tmp_path / source, target)
    bad = table(250)
    bad.loc[203, "user_overall_energy"] = 1.5
    bad.to_parquet(tmp_path / "bad.parquet", row_group_size=50, index=False)
    with pytest.raises(InputError, match="file bad.parquet: row 203, column user_overall_energy: 1.5"):
        batch.score_tables(at, tmp_path / "bad.parquet", out, rows=50)
    assert not out.exists()


COMMAND = "import sys; from calling_ai.cli import main; sys.exit(main(sys.argv[1:]))"


def score(*arguments: str, **more: str) -> subprocess.Popen[str]:
    """Start the command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "score", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | more,
    )


@pytest.mark.slow
def test_kill_9_in_the_middle_loses_and_doubles_nothing(at: Settings, tmp_path: Path) -> None:
    frame = table(40_000)
    frame.to_parquet(tmp_path / "in.parquet", row_group_size=1_000, index=False)
    arguments = ("--input", str(tmp_path / "in.parquet"), "--output", str(tmp_path / "out.parquet"))
    work, kills = tmp_path / ".out.parquet.scoring", 0
    for wanted in (5, 20):
        process = score(*arguments, CALLING_AI_BATCH__ROWS="1000", CALLING_AI_BATCH__WORKERS="2")
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:
            if len(list(work.glob("part-*.parquet"))) >= wanted:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
        process.communicate(timeout=60)
        assert not (tmp_path / "out.parquet").exists() or process.returncode == 0
    process = score(*arguments, "--json", CALLING_AI_BATCH__ROWS="1000")
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert json.loads(out)["rows"] == 40_000 and kills >= 1
    found = pd.read_parquet(tmp_path / "out.parquet")
    assert found["decision_id"].tolist() == frame["decision_id"].tolist()
    expected = Scorer.load(root=at.root).score_frame(frame)
    np.testing.assert_array_equal(found["calling_score"].to_numpy(), expected["calling_score"].to_numpy())
    assert not work.exists()


@pytest.mark.slow
def test_a_dask_worker_killed_in_the_middle_loses_and_doubles_nothing(at: Settings, tmp_path: Path) -> None:
    """The partitions of the flow, on a real cluster of processes, one of which is killed with some in its hands."""
    distributed = pytest.importorskip("distributed")
    frame = table(40_000)
    frame.to_parquet(tmp_path / "in.parquet", row_group_size=1_000, index=False)
    job = batch.plan(at, tmp_path / "in.parquet", tmp_path / "out.parquet", rows=1_000)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs="CRITICAL"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        futures = [client.submit(batch.score_partition, job, index, pure=False) for index in batch.pending(job)]
        until = time.monotonic() + 60
        while len(batch.pending(job)) > 35 and time.monotonic() < until:
            time.sleep(0.01)
        victim = next(iter(cluster.workers.values()))
        os.kill(victim.pid, signal.SIGKILL)
        counts = client.gather(futures)
    assert sorted(count["index"] for count in counts) == list(range(40))
    assert batch.finish(job)["rows"] == 40_000
    found = pd.read_parquet(tmp_path / "out.parquet")
    assert found["decision_id"].tolist() == frame["decision_id"].tolist()
    np.testing.assert_array_equal(found["calling_score"], Scorer.load(root=at.root).score_frame(frame)["calling_score"])


@pytest.mark.slow
def test_the_flow_scores_like_the_command_line(at: Settings, root: Path, tmp_path: Path) -> None:
    table(3_000).to_parquet(tmp_path / "in.parquet", row_group_size=500, index=False)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    command = [sys.executable, str(root / "flows" / "score.py"), "--input", "in.parquet", "--output", "flow.parquet"]
    environment = clean | {"PREFECT_HOME": str(tmp_path / "prefect"), "CALLING_AI_BATCH__ROWS": "1000"}
    environment |= {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "400"}  # the machine may be busy
    made = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert made.returncode == 0, made.stderr[-2000:]
    batch.score_tables(at, tmp_path / "in.parquet", tmp_path / "command.parquet")
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "flow.parquet"), pd.read_parquet(tmp_path / "command.parquet")
    )
    refused = subprocess.run(
        command, cwd=tmp_path, env=environment | {"CALLING_AI_BATCH__RUNNER": "spark"}, capture_output=True, text=True
    )
    assert refused.returncode != 0 and "[batch] runner is 'spark': it must be threads or dask" in refused.stderr
