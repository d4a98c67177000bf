"""Scheduled for real: a Prefect server, every flow each minute, a kill in the middle, and the database away."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from calling_ai.core.settings import Settings, settings
from calling_ai.operate import loop
from calling_ai.operate.alerts import open_alerts
from calling_ai.operate.rollout import current
from calling_ai.registry.audit import audit
from calling_ai.registry.versions import Registry
from calling_ai.store.database import engine
from calling_ai.store.decisions import DecisionLog
from calling_ai.store.runs import Run, listed

TEXT = """
[store]
url = {url}
attribution_days = 3
[town]
people = 300
weeks = 3
further_weeks = 1
[evaluation]
test_weeks = 1
replicates = 60
[training]
epochs = 3
[experiment]
window_days = 2
[rollout]
shadow_decisions = 300
effect = 0.5
[retraining]
days = 14
samples = 1000000
[schedules]
collect = * * * * *
retrain = * * * * *
learn = * * * * *
rollout = * * * * *
monitor = * * * * *
weekly = * * * * *
lease_seconds = 10
"""
LEFT_OUT = ("CALLING_AI_", "PREFECT_")


def environment(**more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(LEFT_OUT)}
    return clean | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | more


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def runs(workspace: Settings, kind: str | None = None) -> list[Run]:
    """Return what is known of the runs; nothing while the database is away."""
    with contextlib.suppress(Exception):
        return listed(engine(workspace.database_url), kind)
    return []


def done(workspace: Settings, kind: str) -> int:
    return sum(run.state == "done" for run in runs(workspace, kind))


def wait(until: Any, seconds: float, what: str) -> Any:
    """Wait until something is there."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = until()
        if found:
            return found
        time.sleep(0.5)
    raise AssertionError(f"after {seconds:g} seconds: {what}")


@pytest.mark.long
def test_several_cycles_by_themselves(postgresql: Any, root: Path, tmp_path: Path) -> None:
    url = postgresql.new()
    folder = tmp_path / "place"
    (folder / "nbs").mkdir(parents=True)
    shutil.copytree(root / "nbs" / "pipelines", folder / "nbs" / "pipelines")
    shutil.copytree(root / "flows", folder / "flows")
    (folder / "settings.ini").write_text(TEXT.format(url=url))
    workspace, port, begun = settings(folder), free_port(), time.monotonic()
    log = (tmp_path / "schedule.log").open("wb")
    command = [sys.executable, "flows/schedule.py", "--port", str(port)]
    schedule = subprocess.Popen(
        command, cwd=folder, env=environment(PREFECT_HOME=str(tmp_path / "prefect")), stdout=log, stderr=log
    )
    try:
        wait(lambda: done(workspace, "retrain") >= 1 and done(workspace, "collect") >= 1, 420, "no first training")
        # one process is killed in the middle of a retraining
        wait(lambda: any(run.state == "running" for run in runs(workspace, "retrain")[:1]), 420, "no second training")
        time.sleep(8)
        [running] = [run for run in runs(workspace, "retrain") if run.state == "running"]
        os.kill(int(running.owner.split(":")[1]), signal.SIGKILL)
        killed = running.key
        wait(lambda: any(r.key == killed and r.state == "done" for r in runs(workspace)), 420, f"{killed} not taken up")
        [taken_up] = [run for run in runs(workspace, "retrain") if run.key == killed]
        assert taken_up.attempt == 2
        # the database is away for more than a minute
        name = url.partition("?")[0].rpartition("/")[2]
        engine(workspace.database_url).dispose()
        postgresql.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        postgresql.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        time.sleep(75)
        postgresql.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        before = {kind: done(workspace, kind) for kind in ("collect", "rollout", "monitor")}
        wait(
            lambda: all(done(workspace, kind) >= count + 2 for kind, count in before.items()), 420, "nothing came back"
        )
        third = done(workspace, "retrain")
        wait(lambda: done(workspace, "retrain") >= third + 1, 420, "no training after the database came back")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5) as answer:
            assert answer.status == 200
    finally:
        schedule.send_signal(signal.SIGTERM)
        schedule.wait(120)
        log.close()
        shutil.copy(tmp_path / "schedule.log", Path(os.environ.get("SCHEDULE_LOG", os.devnull)))
    counts = {kind: done(workspace, kind) for kind in ("collect", "retrain", "learn", "rollout", "monitor", "weekly")}
    registry = Registry(folder)
    assert [check.name for check in audit(registry) if not check.ok] == []
    for model in ("calling_score", "outcome"):
        assert sum("champion" in item.aliases for item in registry.list(model)) == 1
    whole = loop.lived(workspace)
    assert whole is not None
    book = DecisionLog.open(workspace)
    kept = {path.name for path in (folder / "var" / "town").iterdir() if path.name.startswith("weeks-")}
    with engine(workspace.database_url).connect() as connection:
        doubled = connection.scalar(sa.text("SELECT count(*) - count(DISTINCT id) FROM decisions"))
    assert doubled == 0 and len(whole) - book.counts().decisions in (
        0,
        len(loop._read(folder / "var" / "town" / max(kept))[0]),
    )
    for page in ("index.html", "monitor/index.html"):
        assert (folder / "reports" / page).is_file()
    state = current(registry)
    minutes = (time.monotonic() - begun) / 60
    print(
        f"{minutes:.1f} minutes: {json.dumps(counts)}, one killed and taken up, database away for 75 s; "
        f"{len(registry.list())} versions, rollout {state.name + ' ' + state.state if state else 'none'}, "
        f"open alerts {[alert.key for alert in open_alerts(workspace)]}"
    )
