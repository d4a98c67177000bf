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
from calling_ai.core.errors import CallingError
from calling_ai.core.settings import OnlineSettings, Settings, settings
from calling_ai.models.calibration import to_logit, to_probability
from calling_ai.models.graph import export
from calling_ai.models.networks import build, default_spec
from calling_ai.models.online import MEMORY, Correction, OnlineLearner
from calling_ai.operate.online import BURN_IN, learn, worth_of
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


def test_memory_is_a_fair_sample_of_everything_seen() -> None:
    learner = OnlineLearner(NOTHING)
    for number in range(40):
        base, features, target = stream(512, number)
        features[:, 0] = number / 40  # when it came
        learner.update(base, features, target)
    times = learner.memory[:, 0]
    assert len(times) == MEMORY and abs(times.mean() - 0.4875) < 0.02
    assert np.bincount((times * 40).round().astype(int), minlength=40).min() > 50


def test_what_is_measured_was_never_learned() -> None:
    """With labels that are coin flips nothing can be gained; a learner that peeked would gain."""
    learner = OnlineLearner(NOTHING, OnlineSettings(rate=5e-4, trust=1.0, replay=0))
    gains = []
    for number in range(80):
        base, features, _ = stream(128, number)
        target = (np.random.default_rng(10_000 + number).random(128) < base).astype(float)
        said = learner.update(base, features, target)
        loss = [-(target * np.log(a) + (1 - target) * np.log(1 - a)).mean() for a in (base, said.clip(1e-9, 1 - 1e-9))]
        after = learner.predict(base, features).clip(1e-9, 1 - 1e-9)
        gains.append((loss[0] - loss[1], loss[0] + (target * np.log(after) + (1 - target) * np.log(1 - after)).mean()))
    honest, peeking = np.mean(gains, axis=0)
    assert honest < 0 and peeking > honest + 0.002, (honest, peeking)


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


def fill(workspace: Settings, day: int, rows: int = 400) -> dt.datetime:
    frame = example_decisions(rows, 120, day, MONDAY + dt.timedelta(days=day), 0.9)
    first = frame[FEATURE_NAMES[0]].fillna(0.5).to_numpy()
    positive = np.random.default_rng(day).random(rows) < 0.2 + 0.6 * (first > 0.65)
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
    (root / "settings.ini").write_text("[online]\nbatch = 64\nrate = 0.002\ntrust = 0.2\n")
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
        assert found.change <= 0.2
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


def test_a_damaged_state_is_named(workspace: Settings) -> None:
    learn(workspace, "outcome", now=NOW)
    (workspace.var / "online" / "outcome.npz").write_bytes(b"damaged")
    with pytest.raises(CallingError, match="delete it, and learning begins anew"):
        learn(workspace, "outcome", now=NOW)
