"""Online learning: bounded, once, test before train, worth watched, and gone when it does harm."""

import datetime as dt
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from calling_ai.core.contract import FEATURE_NAMES
from calling_ai.core.errors import CallingError, RefusedError
from calling_ai.core.files import locked
from calling_ai.core.settings import OnlineSettings, Settings, settings
from calling_ai.models.calibration import to_logit, to_probability
from calling_ai.models.graph import export
from calling_ai.models.networks import build, default_spec
from calling_ai.models.online import MEMORY, Correction, OnlineLearner
from calling_ai.operate.alerts import open_alerts
from calling_ai.operate.online import BURN_IN, learn, worth_of
from calling_ai.registry.audit import audit
from calling_ai.registry.versions import Registry, VersionDraft
from calling_ai.serve.scorer import Scorer
from calling_ai.store.decisions import DecisionLog, example_decisions

MONDAY = dt.datetime(2026, 3, 2, tzinfo=dt.UTC)
NOTHING = Correction.none(np.random.default_rng(0).random((500, 45)))


def stream(rows: int, seed: int, moved: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    features, base = rng.random((rows, 45)), rng.uniform(0.1, 0.9, rows)
    chance = to_probability(to_logit(base) + moved * (features[:, 0] - 0.5))
    return base, features, (rng.random(rows) < chance).astype(float)


# ------------------------------------------------------------------------------------------------------ the learner


@given(
    trust=st.floats(0.001, 0.3),
    rate=st.floats(1e-5, 0.05),
    moved=st.floats(-8, 8),
    size=st.integers(1, 300),
    replay=st.floats(0, 6),
)
@budget(max_examples=30, deadline=None)
def test_the_trust_is_never_exceeded(trust: float, rate: float, moved: float, size: int, replay: float) -> None:
    learner = OnlineLearner(NOTHING, OnlineSettings(trust=trust, rate=rate, replay=replay))
    for number in range(6):
        learner.update(*stream(size, number, moved))
        assert learner.change() <= trust + 1e-12
        assert len(learner.memory) <= MEMORY and np.isfinite(learner.correction.weights).all()
    assert learner.seen == 6 * size


def test_memory_is_what_came_last() -> None:
    learner = OnlineLearner(NOTHING)
    for number in range(10):
        base, features, target = stream(512, number)
        features[:, 0] = number / 10  # when it came
        learner.update(base, features, target)
    assert len(learner.memory) == MEMORY and set(learner.memory[:, 0].round(3)) == {0.8, 0.9}


def log_loss(answer: np.ndarray, target: np.ndarray) -> float:
    answer = answer.clip(1e-9, 1 - 1e-9)
    return float(-(target * np.log(answer) + (1 - target) * np.log(1 - answer)).mean())


def lived(moved: float, batches: int, first: int, learner: OnlineLearner, rows: int = 64) -> list[float]:
    """Return what the corrected answers of each batch lose less than those of the network."""
    gained = []
    for number in range(first, first + batches):
        base, features, target = stream(rows, number, moved)
        gained.append(log_loss(base, target) - log_loss(learner.update(base, features, target), target))
    return gained


def test_beside_an_exact_network_it_costs_next_to_nothing_and_is_not_called_worse() -> None:
    """Nothing can be gained here: the best there is to learn is to leave everything as it is."""
    cost, worse = [], 0
    for seed in range(20):
        gained = lived(0.0, 120, 1_000 * seed, OnlineLearner(NOTHING))
        cost.append(-float(np.mean(gained)))
        worse += any(worth_of([-x for x in gained[:n]], n).verdict == "worse" for n in range(BURN_IN, 120, 4))
    print(f"beside an exact network: {np.mean(cost):.5f} log loss a row lost, called worse in {worse} of 20 streams")
    assert np.mean(cost) < 0.002 and worse <= 3


def test_after_a_change_it_has_half_of_what_can_be_gained_within_twenty_batches() -> None:
    base, features, target = stream(50_000, 10**6, 4.0)
    best = log_loss(base, target) - log_loss(to_probability(to_logit(base) + 4.0 * (features[:, 0] - 0.5)), target)
    parts = []
    for seed in range(10):
        learner = OnlineLearner(NOTHING)
        lived(0.0, 60, 1_000 * seed, learner)
        lived(4.0, 20, 1_000 * seed + 500, learner)
        parts.append((log_loss(base, target) - log_loss(learner.predict(base, features), target)) / best)
    print(f"20 batches of 64 after a change: {np.mean(parts):.0%} of the gain (least {min(parts):.0%} of 10)")
    assert min(parts) > 0.5


def test_what_is_measured_was_never_learned() -> None:
    """With labels that are coin flips nothing can be gained; a learner that peeked would gain."""
    learner = OnlineLearner(NOTHING, OnlineSettings(rate=0.4, trust=1.0, replay=0))
    gains = []
    for number in range(80):
        base, features, _ = stream(128, number)
        target = (np.random.default_rng(10_000 + number).random(128) < base).astype(float)
        said = learner.update(base, features, target)
        plain, after = log_loss(base, target), learner.predict(base, features)
        gains.append((plain - log_loss(said, target), plain - log_loss(after, target)))
    honest, peeking = np.mean(gains, axis=0)
    assert honest < 0 < peeking - honest, (honest, peeking)


def test_two_learners_on_the_same_rows_are_bit_equal_also_across_a_restart() -> None:
    one, other = (OnlineLearner(NOTHING, OnlineSettings(rate=0.01)) for _ in range(2))
    for number in range(12):
        rows = stream(100, number, 2.0)
        one.update(*rows)
        other = OnlineLearner.restore(other.state(), OnlineSettings(rate=0.01))
        other.update(*rows)
    assert one.state() == other.state()


def test_a_correction_that_changes_nothing_is_rarely_called_worse() -> None:
    rng = np.random.default_rng(3)
    wrong = 0
    for _ in range(300):
        values = rng.standard_t(5, 300) * 0.01
        wrong += any(worth_of(values[:n].tolist(), n).verdict == "worse" for n in range(BURN_IN, 300, 4))
    print(f"called worse without harm: {wrong} of 300 streams, 72 looks each (budget 2.5 %)")
    assert wrong <= 15


# -------------------------------------------------------------------------------------------------- in a workspace


def fill(workspace: Settings, day: int, rows: int = 400, low: float = 0.2, high: float = 0.8) -> dt.datetime:
    """Fill a day with calls; the chance of a positive outcome is low, or high where the first feature is."""
    frame = example_decisions(rows, 120, day, MONDAY + dt.timedelta(days=day), 0.9)
    first = frame[FEATURE_NAMES[0]].fillna(0.5).to_numpy()
    positive = np.random.default_rng(day).random(rows) < np.where(first > 0.65, high, low)
    book = DecisionLog.open(workspace)
    book.record_frame(frame)
    book.record_outcomes(
        pd.DataFrame(
            {
                "id": "o-" + frame["id"],
                "decision_id": frame["id"],
                "outcome_type": np.where(positive, "positive", "neutral").astype(object),
                "outcome_score": np.where(positive, 0.9, 0.5),
                "action": "visit",
                "happened_at": frame["decided_at"] + pd.Timedelta(minutes=5),
                "received_at": frame["decided_at"] + pd.Timedelta(minutes=9),
            }
        )
    )
    return MONDAY + dt.timedelta(days=day + 1)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("online")
    (root / "settings.ini").write_text("[online]\ntrust = 0.3\n")
    workspace, registry = settings(root), Registry(root)
    for model in ("outcome", "calling_score"):
        export(build(default_spec(model), seed=1), root / f"{model}.onnx")
        registry.register([VersionDraft(model, "town", root / f"{model}.onnx")], promote={model: "champion"})
    for day in range(5):
        fill(workspace, day)
    return root


@pytest.fixture
def workspace(filled: Path, tmp_path: Path) -> Settings:
    return settings(shutil.copytree(filled, tmp_path / "copy"))


NOW = MONDAY + dt.timedelta(days=5)


def kept(workspace: Settings) -> bytes:
    with np.load(workspace.var / "online" / "outcome.npz") as state:
        return state["learner"].tobytes() + state["about"].tobytes()


def test_in_pieces_it_learns_what_it_learns_at_once(workspace: Settings, tmp_path: Path) -> None:
    other = settings(shutil.copytree(workspace.root, tmp_path / "other"))
    whole = learn(workspace, "outcome", now=NOW)
    pieces = [learn(other, "outcome", now=MONDAY + dt.timedelta(days=5)) for _ in range(3)]
    assert whole.rows == sum(piece.rows for piece in pieces) == 1_984 and pieces[1].rows == 0
    assert kept(workspace) == kept(other) and whole.waiting == 16


_LEARN = """
import datetime as dt, os, signal, sys
from calling_ai.core.settings import settings
from calling_ai.operate import online
seen, target, real = [], int(sys.argv[2]), online.OnlineLearner.update
def update(self, *rows):
    said = real(self, *rows)
    seen.append(1)
    if len(seen) == target: os.kill(os.getpid(), signal.SIGKILL)
    return said
online.OnlineLearner.update = update
online.learn(settings(sys.argv[1]), "outcome", now=dt.datetime.fromisoformat(sys.argv[3]))
"""


def test_killed_in_the_middle_it_learns_everything_once(workspace: Settings, tmp_path: Path) -> None:
    whole = settings(shutil.copytree(workspace.root, tmp_path / "whole"))
    learn(whole, "outcome", now=NOW)
    command = [sys.executable, "-c", _LEARN, str(workspace.root), "17", NOW.isoformat()]
    done = subprocess.run(command, capture_output=True, timeout=120, env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    learn(workspace, "outcome", now=NOW)
    assert kept(workspace) == kept(whole)


def test_a_published_state_serves_like_any_version(workspace: Settings) -> None:
    for model in ("outcome", "calling_score"):
        found = learn(workspace, model, publish=True, now=NOW)
        assert found.change <= 0.3
    registry = Registry(workspace.root)
    found = learn(workspace, "outcome", publish=True, now=NOW)
    assert found.published is not None and registry.get("outcome", found.published).parent == "v1.0-town"
    registry.promote("outcome", found.published, actor="a test")
    frame = example_decisions(50, 10, 3)[list(FEATURE_NAMES)]
    scorer = Scorer.load(root=workspace.root)
    assert scorer.versions["outcome"] == found.published
    assert scorer.score_frame(frame)["outcome_probability"].notna().all()
    with pytest.raises(CallingError, match="was learned online"):
        from calling_ai.operate.reproduce import reproduce

        reproduce(workspace, found.published, "outcome")


def test_a_new_champion_begins_a_new_correction(workspace: Settings, tmp_path: Path) -> None:
    learn(workspace, "outcome", now=NOW)
    registry = Registry(workspace.root)
    export(build(default_spec("outcome"), seed=9), tmp_path / "new.onnx")
    registry.register([VersionDraft("outcome", "town", tmp_path / "new.onnx")], promote={"outcome": "champion"})
    later = fill(workspace, 5)
    found = learn(workspace, "outcome", now=later)
    assert found.base == "v1.1-town" and found.rows <= 400 and found.worth.batches <= 400 // 64


def test_a_live_state_that_does_harm_is_gone_soon(workspace: Settings) -> None:
    registry = Registry(workspace.root)
    found = learn(workspace, "outcome", publish=True, now=NOW)
    assert found.published is not None and found.live is None
    registry.promote("outcome", found.published, actor="a test")
    for day in range(5, 15):  # the world turns around
        found = learn(workspace, "outcome", now=fill(workspace, day, 128, low=0.8, high=0.2))
        if found.fell_back:
            break
        assert found.live is not None and registry.get("outcome").version != "v1.0-town"
    batches = 2 * (day - 4)
    print(f"fell back after {batches} batches of 64")
    assert batches <= 16 and registry.get("outcome").version == "v1.0-town" and found.worth.verdict != "worse"
    [alert] = [item for item in open_alerts(workspace) if item.key == "online:outcome"]
    assert "fell back" in alert.title and alert.severity == "warning"
    [event] = [
        item for item in registry.events() if item.action == "online" and item.evidence["worse"] != "the correction"
    ]
    assert event.evidence["worth"]["verdict"] == "worse"
    assert [check.name for check in audit(registry) if not check.ok] == []


_FALL = """
import datetime as dt, os, signal, sys
from calling_ai.core.settings import settings
from calling_ai.operate import online
online._save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
online.learn(settings(sys.argv[1]), "outcome", now=dt.datetime.fromisoformat(sys.argv[2]))
"""


def test_killed_between_falling_back_and_keeping_it_falls_back_once(workspace: Settings) -> None:
    registry = Registry(workspace.root)
    found = learn(workspace, "outcome", publish=True, now=NOW)
    assert found.published is not None
    registry.promote("outcome", found.published, actor="a test")
    for day in range(5, 10):
        now = fill(workspace, day, low=0.8, high=0.2)
    command = [sys.executable, "-c", _FALL, str(workspace.root), now.isoformat()]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, timeout=120, env=os.environ, check=False)
        assert done.returncode == -signal.SIGKILL
    after = [(item.action, item.subject, item.after) for item in registry.events()]
    assert registry.get("outcome").version == "v1.0-town"
    learn(workspace, "outcome", now=now)
    assert [(item.action, item.subject, item.after) for item in registry.events()] == after
    backs = [item for item in registry.events() if item.action == "online" and item.after.startswith("fell back")]
    assert len(backs) == 1


def test_one_process_learns_at_a_time(workspace: Settings) -> None:
    with locked(workspace.var / "online" / "outcome.lock", "a test"), pytest.raises(RefusedError, match="under way"):
        learn(workspace, "outcome", now=NOW)
    assert learn(workspace, "outcome", now=NOW).rows == 1_984


def test_what_comes_late_is_learned_and_what_is_corrected_is_not_learned_again(workspace: Settings) -> None:
    assert learn(workspace, "outcome", now=NOW).waiting == 16
    book = DecisionLog.open(workspace)
    frame = example_decisions(100, 50, 77, MONDAY + dt.timedelta(days=3), 0.9)
    book.record_frame(frame)

    def told(rows: pd.DataFrame, name: str, score: float, **more: object) -> pd.DataFrame:
        moments = {"happened_at": rows["decided_at"] + pd.Timedelta(minutes=5)}
        moments["received_at"] = rows["decided_at"] + pd.Timedelta(minutes=9)
        table = {"id": name + rows["id"], "decision_id": rows["id"], "outcome_type": "positive", "outcome_score": score}
        return pd.DataFrame({**table, "action": "visit", **moments, **more})

    book.record_outcomes(told(frame, "late-", 0.9))  # received on day 3, in the log only now
    found = learn(workspace, "outcome", now=NOW)
    assert (found.rows, found.waiting) == (64, 52)
    known = book.joined(as_of=NOW).dropna(subset=["outcome_score"]).tail(200)
    again = told(known, "again-", 0.95, corrects=known["outcome_id"]).assign(received_at=NOW)
    book.record_outcomes(again)
    found = learn(workspace, "outcome", now=NOW + dt.timedelta(hours=1))
    assert (found.rows, found.waiting) == (0, 52)


@pytest.mark.parametrize("told", [True, False])
def test_what_a_model_was_trained_on_is_not_learned_as_new(workspace: Settings, tmp_path: Path, told: bool) -> None:
    registry, until = Registry(workspace.root), MONDAY + dt.timedelta(days=3)
    export(build(default_spec("outcome"), seed=9), tmp_path / "new.onnx")
    parameters = {"trained_until": until.isoformat()} if told else {}
    draft = VersionDraft("outcome", "town", tmp_path / "new.onnx", snapshot_digest="0" * 64, parameters=parameters)
    [version] = registry.register([draft], promote={"outcome": "champion"})
    assert version.trained_until == (until if told else version.created_at)
    found = learn(workspace, "outcome", now=NOW)  # it was made long after the log of this test
    assert found.rows + found.waiting == (800 if told else 0)


def test_a_world_that_moves_too_far_asks_for_a_training(workspace: Settings) -> None:
    (workspace.root / "settings.ini").write_text("[online]\ntrust = 0.01\n")
    tight = settings(workspace.root)
    assert learn(tight, "outcome", now=NOW).limited
    [alert] = open_alerts(tight)
    assert alert.key == "online:outcome:limit" and "retrain --now" in str(alert.command)
    (workspace.root / "settings.ini").write_text("[online]\ntrust = 0.9\n")
    wide = settings(workspace.root)
    assert not learn(wide, "outcome", now=fill(wide, 5)).limited and not open_alerts(wide)


def test_a_damaged_state_is_named(workspace: Settings) -> None:
    learn(workspace, "outcome", now=NOW)
    (workspace.var / "online" / "outcome.npz").write_bytes(b"damaged")
    with pytest.raises(CallingError, match="delete it, and learning begins anew"):
        learn(workspace, "outcome", now=NOW)
