"""Rollouts: what stops them, who may change them, and that a killed step has not happened."""

import datetime as dt
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from calling_ai.core.errors import CallingError, NotFoundError, RefusedError
from calling_ai.core.settings import Settings, settings
from calling_ai.experiments.design import Baseline
from calling_ai.experiments.rollout import CHALLENGER, CHAMPION, Plan, Rollout, judge, plan_rollout, simulate_rollouts
from calling_ai.experiments.summaries import Summaries, from_sums
from calling_ai.operate.alerts import open_alerts
from calling_ai.operate.rollout import (
    abort,
    approve,
    begin,
    current,
    example_day,
    example_workspace,
    pause,
    resume,
    step,
)
from calling_ai.registry.audit import audit
from calling_ai.registry.versions import Registry
from calling_ai.serve.live import LiveScorer

MONDAY = dt.datetime(2026, 3, 2, tzinfo=dt.UTC)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose rollout has just reached its first users, to be copied."""
    folder = tmp_path_factory.mktemp("rollout")
    workspace = example_workspace(folder)
    begin(workspace, actor="a test", now=MONDAY)
    midnight = example_day(workspace, MONDAY)
    assert step(workspace, midnight).state == "10 %"
    return folder


@pytest.fixture
def workspace(made: Path, tmp_path: Path) -> Settings:
    return settings(shutil.copytree(made, tmp_path / "copy"))


def days(workspace: Settings, count: int, first: int = 1, **options: Any) -> dt.datetime:
    midnight = MONDAY + dt.timedelta(days=first)
    for _ in range(count):
        midnight = example_day(workspace, midnight, **{"users": 2_500, **options})
    return midnight


def clean(workspace: Settings) -> list[str]:
    return [check.name for check in audit(Registry(workspace.root)) if not check.ok]


# ------------------------------------------------------------------------------------------- what the evidence says


@pytest.mark.parametrize("lift", [-0.30, -0.29])  # nobody, and hardly anybody of those who get it is pleased
def test_a_version_that_pleases_nobody_is_rolled_back(workspace: Settings, lift: float) -> None:
    state = step(workspace, days(workspace, 4, lift=lift))
    assert (state.state, state.verdict) == ("rolled back", "roll back") and "does harm" in state.reasons[0]


def test_a_broken_split_stops_it(workspace: Settings) -> None:
    state = step(workspace, days(workspace, 4, broken=0.3, lift=0.2))
    assert (state.state, state.verdict) == ("ended", "cannot tell") and "split" in state.reasons[0]
    assert Registry(workspace.root).get("outcome").version == "v1.0-town"
    assert [alert.severity for alert in open_alerts(workspace)] == ["warning"]


def test_paused_it_goes_no_further_and_harm_sends_it_back(workspace: Settings) -> None:
    pause(workspace, "ada", "a holiday")
    midnight = days(workspace, 8, lift=0.12)
    state = step(workspace, midnight)
    assert (state.state, state.verdict, state.paused) == ("10 %", "hold", True) and "paused" in state.reasons[-1]
    midnight = days(workspace, 12, first=9, lift=-0.3)
    state = step(workspace, midnight)
    assert (state.state, state.paused) == ("rolled back", True)


def test_resumed_it_goes_on(workspace: Settings) -> None:
    pause(workspace, "ada")
    midnight = days(workspace, 8, lift=0.12)
    assert step(workspace, midnight).state == "10 %"
    resume(workspace, "ada")
    assert step(workspace, midnight).state == "50 %"


def test_a_champion_that_was_changed_ends_it(workspace: Settings) -> None:
    registry = Registry(workspace.root)
    registry.promote("outcome", "v1.1-town", actor="somebody")
    state = step(workspace, days(workspace, 1))
    assert (state.state, state.verdict) == ("ended", "cannot tell") and "changed" in state.reasons[0]
    assert registry.get("outcome").version == "v1.1-town" and clean(workspace) == []


def test_killed_after_its_entry_a_step_is_not_taken_twice_and_what_follows_is_seen_to(workspace: Settings) -> None:
    from calling_ai.operate import rollout as operated

    registry, midnight = Registry(workspace.root), days(workspace, 12, lift=-0.3)

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operated, "_follow", dies)
        with pytest.raises(KeyboardInterrupt):
            step(workspace, midnight, run="rollout/a-night")
    entries = registry.events()
    assert entries[-1].after == "rolled back" and not open_alerts(workspace)  # nobody was told
    state = step(workspace, midnight, run="rollout/a-night")
    assert (state.state, registry.events()) == ("rolled back", entries)
    assert [alert.severity for alert in open_alerts(workspace)] == ["critical"]
    with pytest.raises(NotFoundError, match="no rollout is under way"):
        step(workspace, midnight, run="rollout/the-next-night")


def test_fallbacks_of_the_new_version_send_it_back(workspace: Settings) -> None:
    """The challenger does better, and its networks fail for a tenth of its users."""
    from calling_ai.operate import rollout as operated

    real = operated.DecisionLog.record_frame

    def failing(self: Any, frame: Any) -> Any:
        hurt = (frame["arm"] == CHALLENGER) & (np.random.default_rng(1).random(len(frame)) < 0.1)
        return real(self, frame.assign(network_score=np.where(hurt, np.nan, 0.5)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operated.DecisionLog, "record_frame", failing)
        midnight = days(workspace, 6, lift=0.1)
    state = step(workspace, midnight)
    assert state.state == "rolled back" and "formula_alone" in state.reasons[0]


def test_a_version_that_cannot_be_opened_never_leaves_the_shadow(tmp_path: Path) -> None:
    workspace = example_workspace(tmp_path / "place")
    begin(workspace, now=MONDAY)
    registry = Registry(workspace.root)
    new = registry.get("outcome", "challenger")
    for path in (registry.folder / f"{new.digest}.onnx", *registry.releases.glob("*.onnx")):
        path.chmod(0o644)
        path.write_bytes(b"damaged")
    state = step(workspace, example_day(workspace, MONDAY))
    assert (state.state, state.verdict) == ("rolled back", "roll back") and "could not be opened" in state.reasons[0]


def test_a_weight_alone_is_tried_and_earned(tmp_path: Path) -> None:
    workspace = example_workspace(tmp_path / "place")
    with pytest.raises(RefusedError, match="no calling score is live"):
        begin(workspace, weight=0.2)
    with pytest.raises(CallingError, match="weight is 0.7"):
        begin(workspace, "v1.1-town", 0.7)
    begin(workspace, "v1.1-town", 0.1, now=MONDAY)
    midnight = example_day(workspace, MONDAY)
    state = step(workspace, midnight)
    while not state.is_over:
        midnight = example_day(workspace, midnight, users=2_500, lift=0.12)
        state = step(workspace, midnight)
    live = Registry(workspace.root).live()
    assert (state.state, live.versions["outcome"]) == ("promoted", "v1.1-town")
    assert state.weight == live.weight and state.weight in (0.2, 0.3)  # a step for each stage that showed a gain
    scorer = LiveScorer.load(workspace.root)
    assert scorer.policy.weight == live.weight
    scorer.close()


# --------------------------------------------------------------------------------------------- many, and the killed


def stepping(workspace: Settings, midnight: dt.datetime, start: Any, answers: Any) -> None:
    start.wait()
    try:
        answers.put(step(workspace, midnight, report=False).state)
    except RefusedError as error:
        answers.put(str(error))


def test_of_four_who_step_at_once_one_wins(workspace: Settings) -> None:
    midnight = days(workspace, 8, lift=0.12)
    before = len(Registry(workspace.root).events())
    context = multiprocessing.get_context("fork")
    start, answers = context.Event(), context.Queue()
    stepper = [context.Process(target=stepping, args=(workspace, midnight, start, answers)) for _ in range(4)]
    for process in stepper:
        process.start()
    start.set()
    said = [answers.get(timeout=120) for _ in stepper]
    for process in stepper:
        process.join()
    assert said.count("50 %") >= 1 and current(Registry(workspace.root)).state == "50 %"  # type: ignore[union-attr]
    assert all(word == "50 %" or "changed it at" in word for word in said), said
    moved = [event for event in Registry(workspace.root).events()[before:] if event.before != event.after]
    assert [event.after for event in moved] == ["50 %"] and clean(workspace) == []


def test_a_command_between_look_and_step_is_not_lost(workspace: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    from calling_ai.operate import rollout as operated

    real = operated.summaries_of

    def slowly(*arguments: Any, **options: Any) -> Summaries:
        monkeypatch.setattr(operated, "summaries_of", real)
        pause(workspace, "ada", "in that moment")
        return real(*arguments, **options)

    monkeypatch.setattr(operated, "summaries_of", slowly)
    with pytest.raises(RefusedError, match="ada changed it at"):
        step(workspace, days(workspace, 8, lift=0.12))
    assert current(Registry(workspace.root)).paused  # type: ignore[union-attr]
    abort(workspace, "ada")
    with pytest.raises(CallingError, match="no rollout is under way"):
        approve(workspace)


_STEP = """
import datetime as dt, os, signal, sys
from calling_ai.core.settings import settings
from calling_ai.operate import rollout
workspace, midnight, target, seen = settings(sys.argv[1]), dt.datetime.fromisoformat(sys.argv[2]), int(sys.argv[3]), 0
def watch(frame, event, argument):
    global seen
    if "calling_ai" not in frame.f_code.co_filename and "sqlalchemy" not in frame.f_code.co_filename: return None
    seen += 1
    if seen == target: os.kill(os.getpid(), signal.SIGKILL)
    return watch
sys.settrace(watch)
state = rollout.step(workspace, midnight)
sys.settrace(None)
print(state.state, seen)
"""


def run_step(workspace: Settings, midnight: dt.datetime, target: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _STEP, str(workspace.root), midnight.isoformat(), str(target)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def killed_steps(ready: Settings, midnight: dt.datetime, wanted: str, times: int, folder: Path) -> int:
    """Kill a step at evenly spread points; afterwards all is clean, and the next step completes the work."""
    whole = settings(shutil.copytree(ready.root, folder / "whole"))
    done = run_step(whole, midnight, 0)
    assert done.returncode == 0, done.stderr[-2_000:]
    state, points = done.stdout.rsplit(maxsplit=1)
    assert state == wanted
    killed, draw = 0, random.Random(7)
    for number in range(times):
        place = settings(shutil.copytree(ready.root, folder / f"kill-{number}"))
        target = 1 + int((number + draw.random()) / times * int(points))
        answer = run_step(place, midnight, target)
        killed += answer.returncode == -signal.SIGKILL
        assert clean(place) == [], f"after a kill at point {target}"
        champions = [item for item in Registry(place.root).list("outcome") if "champion" in item.aliases]
        assert len(champions) == 1
        now = current(Registry(place.root))
        assert now is not None and now.state in ("50 %", wanted)
        if not now.is_over:
            now = step(place, midnight)
        assert now.state == wanted
        assert clean(place) == []
        shutil.rmtree(place.root)
    return killed


@pytest.fixture(scope="module")
def before_the_end(made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, dt.datetime]:
    """A rollout whose next step makes its version the champion."""
    place = settings(shutil.copytree(made, tmp_path_factory.mktemp("ready") / "copy"))
    midnight, first = days(place, 6, lift=0.12), 7
    while step(place, midnight).state != "50 %":
        midnight, first = days(place, 1, first=first, lift=0.12), first + 1
    return place, days(place, 5, first=first, lift=0.12)


def test_killed_in_the_middle_of_a_promotion(before_the_end: tuple[Settings, dt.datetime], tmp_path: Path) -> None:
    killed = killed_steps(*before_the_end, "promoted", 5, tmp_path)
    print(f"rollout steps killed at {killed} points: 0 halves (95 % below {3 / killed:.0%})")
    assert killed >= 4


@pytest.mark.long
def test_killed_a_hundred_times(before_the_end: tuple[Settings, dt.datetime], tmp_path: Path) -> None:
    killed = killed_steps(*before_the_end, "promoted", 100, tmp_path)
    print(f"rollout steps killed at {killed} points: 0 halves (95 % below {3 / killed:.1%})")


def test_a_scorer_that_runs_follows_within_its_time(workspace: Settings) -> None:
    live = LiveScorer.load(workspace.root, refresh_seconds=0.05)
    assert live.rollout is not None and live.score({"user_id": "ada lovelace"}).path
    abort(workspace, "ada")
    until = time.monotonic() + 20
    while live.rollout is not None and time.monotonic() < until:
        live.score({})
        time.sleep(0.02)
    assert live.rollout is None
    live.close()


def test_a_database_that_is_away_keeps_what_was_known(workspace: Settings) -> None:
    live = LiveScorer.load(workspace.root)
    file = workspace.var / "calling_ai.db"
    arms = [live.arm_of(f"user {number}") for number in range(100)]
    file.rename(file.with_suffix(".away"))
    file.write_bytes(b"no database")
    live.refresh()
    assert [live.arm_of(f"user {number}") for number in range(100)] == arms
    assert any("rollout could not be read" in why for why in live.counts.failures)
    live.close()


# --------------------------------------------------------------------------------------- the judgement, on its own


def table(planned: Plan, stages: list[tuple[str, int, int, float]], days_each: int = 1) -> Summaries:
    """Return summaries of users who say yes or no: stage, users a day, days, effect."""
    rng, cells, sums = np.random.default_rng(3), [], []
    day = MONDAY.date()
    for stage, users, lasting, effect in stages:
        share = (planned.protocol.experiment.stage(stage).shares or {})[CHALLENGER]
        for _ in range(lasting):
            for arm, n, rate in (
                (CHAMPION, round(users * (1 - share)), 0.3),
                (CHALLENGER, round(users * share), 0.3 + effect),
            ):
                yes = float(rng.binomial(n, rate))
                cells.append((arm, stage, day.isoformat()))
                sums.append((n, yes))
            day += dt.timedelta(days=days_each)
    from calling_ai.experiments.summaries import Cell

    counts = np.array([n for n, _ in sums], dtype=float)
    total = np.array([[yes] for _, yes in sums])
    return from_sums(
        ("positive",), [Cell(*cell) for cell in cells], counts, total, total[:, :, None], arms=(CHAMPION, CHALLENGER)
    )


PLANNED = plan_rollout("rollout-1", Baseline(0.30, 0.46), guardrails=())


def test_the_planned_users_used_up_end_it() -> None:
    found = judge(table(PLANNED, [("10 %", 5_000, 3, 0.0), ("50 %", 20_000, 6, 0.0)]), PLANNED, "50 %")
    assert (found.verdict, found.to) == ("cannot tell", "nobody") and "used up" in found.reasons[0]


def test_days_that_are_over_end_it() -> None:
    short = replace(PLANNED, days=10)
    found = judge(table(short, [("10 %", 2_000, 4, 0.0)], days_each=5), short, "10 %")
    assert (found.verdict, found.to) == ("cannot tell", "nobody") and "16 days" in " ".join(found.reasons)


def test_a_gain_waits_for_its_minimum() -> None:
    found = judge(table(PLANNED, [("10 %", 2_000, 3, 0.15)]), PLANNED, "10 %")
    assert (found.verdict, found.to) == ("hold", None) and "are needed" in found.reasons[0]


@given(effect=st.floats(-0.2, 0.2), users=st.integers(100, 5_000), lasting=st.integers(1, 12))
@budget(max_examples=40, deadline=None)
def test_a_judgement_is_always_one_of_four_and_never_skips_a_stage(effect: float, users: int, lasting: int) -> None:
    found = judge(table(PLANNED, [("10 %", users, lasting, effect)]), PLANNED, "10 %")
    assert found.verdict in ("advance", "hold", "roll back", "cannot tell")
    assert found.to in (None, "50 %", "nobody") and found.reasons
    assert (found.to == "50 %") == (found.verdict == "advance")
    state = Rollout("rollout-1", "10 %", {}, {}, planned=PLANNED, reasons=found.reasons)
    assert Rollout.from_dict(state.to_dict()) == state


def real_rollout(effect: float, seed: int, users: int = 5_000) -> str:
    """Run one rollout day by day through the judgement itself, and return how it ended."""
    rng, stage, day = np.random.default_rng(seed), "10 %", MONDAY.date()
    cells: list[Any] = []
    sums: list[tuple[int, float]] = []
    from calling_ai.experiments.summaries import Cell

    for _ in range(PLANNED.days):
        share = (PLANNED.protocol.experiment.stage(stage).shares or {})[CHALLENGER]
        treated = int(rng.binomial(users, share))
        for arm, n, rate in ((CHAMPION, users - treated, 0.3), (CHALLENGER, treated, 0.3 + effect)):
            cells.append(Cell(arm, stage, day.isoformat()))
            sums.append((n, float(rng.binomial(n, rate))))
        counts, total = np.array([n for n, _ in sums], dtype=float), np.array([[yes] for _, yes in sums])
        found = judge(
            from_sums(("positive",), cells, counts, total, total[:, :, None], arms=(CHAMPION, CHALLENGER)),
            PLANNED,
            stage,
        )
        if found.to == "everybody":
            return "promoted"
        if found.to == "nobody":
            return "rolled back" if found.verdict == "roll back" else "ended"
        stage, day = found.to or stage, day + dt.timedelta(days=1)
    return "ended"


@pytest.mark.parametrize(
    ("effect", "end", "least"), [(0.0, "ended", 0.8), (-0.05, "rolled back", 1.0), (0.05, "promoted", 1.0)]
)
def test_the_judgement_itself_ends_rollouts_as_the_simulation_does(effect: float, end: str, least: float) -> None:
    runs = 12 if effect == 0 else 8
    real = [real_rollout(effect, seed) for seed in range(runs)]
    fast = simulate_rollouts(PLANNED, 0.30, effect, runs=2_000)
    print(f"effect {effect:+.2f}: {real.count(end)} of {runs} {end}, {fast.rate(end)} in the simulation")
    assert real.count(end) >= least * runs and fast.rate(end).share >= least
