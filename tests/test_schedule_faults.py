"""What runs on a schedule, killed at any moment or started twice at once, leaves what one clean run leaves."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from calling_ai.core.settings import Settings
from calling_ai.operate.rollout import begin, example_day, example_workspace, step

KINDS = {"learn": "learn_online", "rollout": "rollout_step", "monitor": "watch", "weekly": "week"}

# One process imports everything once and forks for every run, so that a kill hits the work and not the imports.
_HARNESS = """
import datetime as dt, json, os, random, shutil, signal, sys, threading, time
from pathlib import Path
from calling_ai.core.settings import settings
from calling_ai.operate import monitoring, notebooks, online, overview, reports, rollout, schedule
from calling_ai.registry.audit import audit
from calling_ai.registry.versions import Registry
import nbclient, nbconvert, papermill, sklearn.linear_model, matplotlib.pyplot

root, kind, work, now, kills, folder = sys.argv[1:]
now, folder = dt.datetime.fromisoformat(now), Path(folder)
rollout.clock = online.clock = lambda workspace: now

def run(place, seconds=0.0, gate=None):
    "Run the flow once in a process of its own; return how that ended."
    child = os.fork()
    if child: return child
    if seconds: threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    while gate and not gate.exists(): time.sleep(0.001)
    workspace, code = settings(place), 1
    try:
        ran = schedule.once(workspace, kind, lambda key: getattr(schedule, work)(workspace, key), now)
        code = {"done": 0, "taken": 3}[ran.state]
    except BaseException as error: print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally: os._exit(code)

def ended(child): return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def found(place):
    "Return what is there afterwards, without times and names that differ from run to run."
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        with os.fdopen(reading) as stream: text = stream.read()
        assert ended(child) == 0
        return json.loads(text)
    workspace, told = settings(place), {}
    registry = Registry(place)
    told["audit"] = [check.name for check in audit(registry) if not check.ok]
    told["events"] = [(item.action, item.model, item.subject, item.before, item.after) for item in registry.events()]
    told["versions"] = [(item.model, item.version, item.status, item.aliases) for item in registry.list()]
    from calling_ai.operate.alerts import open_alerts
    told["alerts"] = sorted((item.key, item.severity, item.text) for item in open_alerts(workspace))
    from calling_ai.store.database import engine
    from calling_ai.store.runs import listed
    told["runs"] = [(item.key, item.state) for item in listed(engine(workspace.database_url), kind)]
    told["reports"] = sorted(str(path.relative_to(place)) for path in (place / "reports").rglob("*.html"))
    told["state"] = [item.hex() for item in state(workspace)]
    with os.fdopen(writing, "w") as stream: json.dump(told, stream)
    os._exit(0)

def state(workspace):
    "Return what the next run goes on from."
    import hashlib
    for path in sorted((workspace.var / "online").glob("*.npz")):
        with online.np.load(path) as kept: held = kept["learner"].tobytes() + kept["learned"].tobytes()
        yield hashlib.sha256(held).digest()
    record = monitoring.read_monitored(workspace)
    if not record: return
    told = json.dumps([record["findings"], record.get("drift")], sort_keys=True, default=str)
    yield hashlib.sha256(told.encode()).digest()

def copied(name): return Path(shutil.copytree(root, folder / name))
def agree(place, what):
    there = found(place)
    assert there == clean, (what, [(name, clean[name], there[name]) for name in clean if clean[name] != there[name]])
    shutil.rmtree(place)

whole = copied("whole")
begun = time.monotonic()
assert ended(run(whole)) == 0
takes, clean, draw, killed = time.monotonic() - begun, found(whole), random.Random(kind), 0
place, gate = copied("twice"), folder / "gate"
both = [run(place, gate=gate) for _ in range(2)]
time.sleep(0.2)
gate.touch()
codes = sorted(ended(child) for child in both)
assert codes == [0, 3], codes
agree(place, "started twice")
for number in range(int(kills)):
    place = copied(f"kill-{number}")
    killed += ended(run(place, draw.uniform(0.02, takes))) == -signal.SIGKILL
    time.sleep(1.3)  # until its lease has passed
    again = ended(run(place))
    assert again in (0, 3), again  # 3: it had ended before it was killed
    agree(place, f"killed {number}")
print(json.dumps({"killed": killed, "takes": takes}))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, root: Path) -> tuple[Settings, str]:
    """Make a workspace in which a rollout is in its first stage, with days that nobody has looked at yet."""
    import datetime as dt

    workspace = example_workspace(
        tmp_path_factory.mktemp("faults") / "place", schedules="lease_seconds = 1", online="trust = 0.3"
    )
    shutil.copytree(root / "nbs" / "pipelines", workspace.root / "nbs" / "pipelines")
    now = dt.datetime(2026, 3, 2, tzinfo=dt.UTC)
    begin(workspace, "v1.1-town", actor="a test", now=now)
    for _ in range(3):
        now = example_day(workspace, now)
    assert step(workspace, now).state == "10 %"
    for _ in range(3):
        now = example_day(workspace, now, lift=0.1)
    return workspace, now.isoformat()


def killed(made: tuple[Settings, str], kind: str, kills: int, folder: Path) -> dict[str, float]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CALLING_AI_")}
    command = [sys.executable, "-c", _HARNESS, str(made[0].root), kind, KINDS[kind], made[1], str(kills), str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60 + 40 * kills, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    said = f"{told['killed']} of {kills} killed within {told['takes']:.1f} s, 0 differ"
    print(f"{kind}: started twice at once, one did it; {said}")
    return told


@pytest.mark.parametrize("kind", KINDS)
def test_killed_or_started_twice_it_leaves_what_one_run_leaves(
    made: tuple[Settings, str], kind: str, tmp_path: Path
) -> None:
    assert killed(made, kind, 2, tmp_path)["takes"] > 0


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_fifty_points(made: tuple[Settings, str], kind: str, tmp_path: Path) -> None:
    assert killed(made, kind, 50, tmp_path)["killed"] >= 20
