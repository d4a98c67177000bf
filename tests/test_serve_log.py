"""Decisions are written down whole, stay in their arm when they fall back, and can be computed again bit by bit."""

import dataclasses
import datetime as dt

import numpy as np
import pandas as pd
import pytest
from serving import Place, moments
from test_models_graph_release import NAMES, network

from calling_ai.core.contract import FEATURE_NAMES
from calling_ai.core.errors import InputError
from calling_ai.models.graph import release_bytes
from calling_ai.score.policy import Policy, uniforms
from calling_ai.score.release import Dials
from calling_ai.serve.releases import Graph, Opened
from calling_ai.serve.scorer import Scorer, replay
from calling_ai.store.decisions import DecisionLog
from calling_ai.store.identity import pseudonym
from calling_ai.store.writer import LogWriter

SECRET = b"a secret of at least sixteen"
POLICY = Policy(weight=0.4, gate=0.45, threshold=0.3, exploration=0.25, seed=11)
NUMBERS = ["formula_score", "vibe_compatibility", "connection", "life_betterment", "context_factor", "timing_factor"]
NUMBERS += [
    "network_score",
    "outcome_probability",
    "hybrid_score",
    "boosted_score",
    "weight",
    "calling_score",
    "called",
]
NUMBERS += ["propensity", "explored", "confidence"]


@pytest.fixture
def log(tmp_path):
    with LogWriter(DecisionLog(f"sqlite:///{tmp_path / 'log.db'}", SECRET), folder=tmp_path / "spill") as writer:
        yield writer


def say(scorer: Scorer, rows: int, seed: int = 0, **more) -> None:
    for index, row in enumerate(moments(rows, seed)):
        sent = {name: number for name, number in zip(FEATURE_NAMES, row.tolist()) if number == number}
        scorer.score(sent, user_id=f"user-{seed}-{index}", opportunity_id="cafe", **more)


def same(row: pd.Series, again) -> None:
    for name in NUMBERS:
        got = again.terms[name] if name in again.terms and not hasattr(again, name) else getattr(again, name)
        want = None if pd.isna(row[name]) else row[name]
        assert got == want, (name, got, want)
    assert (again.path, again.release) == (
        row["path"],
        None if pd.isna(row["release_version"]) else row["release_version"],
    )


def test_every_way_is_logged_stays_in_its_arm_and_replays(tmp_path, log):
    place = Place(tmp_path / "here")
    good = place.train(1)
    about = {"root": place.root, "policy": POLICY, "log": log, "refresh_seconds": 3600}
    scorer = Scorer.load(**about, experiment="networks", arm="treatment", stage="50")
    say(scorer, 15, 1)
    say(scorer, 5, 2, arm="control")
    second = place.train(2, release=False)
    scorer.refresh()
    say(scorer, 10, 3)  # in parts
    for path in place.files(second):
        path.rename(path.with_suffix(".away"))
    fallen = Scorer.load(**about, experiment="networks", arm="treatment", stage="50")
    say(fallen, 10, 4)  # last good release
    say(Scorer.formula_only(POLICY, log=log, experiment="networks", arm="treatment", stage="50"), 10, 5)

    def broken(*_):
        raise MemoryError

    scorer._live = dataclasses.replace(scorer._live, ask=broken, spare=None)
    say(scorer, 10, 6)
    for path in place.root.rglob("*.away"):
        path.rename(path.with_suffix(".onnx"))
    assert log.flush()
    kept = log.log.decisions()
    assert len(kept) == 60 and set(kept["experiment"]) == {"networks"} and set(kept["stage"]) == {"50"}
    assert kept["arm"].value_counts().to_dict() == {"treatment": 55, "control": 5}
    ways = kept.groupby(["path", kept["reason"].fillna("-"), kept["release_version"].notna()]).size()
    assert ways.to_dict() == {
        ("network", "-", True): 20,
        ("network", "no release of these versions", False): 10,
        ("network", f"{place_reason(kept)}; last good release", True): 10,
        ("formula", "no model wanted", False): 10,
        ("formula", "scoring failed with MemoryError", False): 10,
    }
    for _, row in kept.iterrows():
        same(row, replay(row, root=place.root))
    assert kept["explored"].any() and not kept["explored"].all()
    np.testing.assert_array_equal(kept["explored"], uniforms(kept["id"].tolist(), 11) < 0.25)
    users = {f"user-{seed}-{index}" for seed, rows in enumerate((15, 5, 10, 10, 10, 10), 1) for index in range(rows)}
    assert set(kept["user_key"]) == {pseudonym(user, SECRET) for user in users}
    assert (kept["latency_us"] > 0).all() and kept["id"].is_unique
    assert b"user-1-" not in (tmp_path / "log.db").read_bytes()
    assert good["outcome"].version == "v1.0-town"


def place_reason(kept: pd.DataFrame) -> str:
    found = [reason for reason in kept["reason"].dropna() if reason.endswith("last good release")]
    assert "is missing" in found[0]
    return found[0].removesuffix("; last good release")


def test_tables_are_logged_and_replay_from_records(tmp_path, log):
    place = Place(tmp_path / "here")
    place.train(3)
    scorer = Scorer.load(root=place.root, policy=POLICY, log=log, refresh_seconds=3600)
    frame = pd.DataFrame(moments(40, 2), columns=list(FEATURE_NAMES))
    rng = np.random.default_rng(0)
    frame["trend_emerging"], frame["assessment_risk"] = rng.uniform(-1, 1, 40), rng.random(40)
    frame["user_id"], frame["opportunity_id"] = [f"u{i % 7}" for i in range(40)], "list"
    moment = dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC)
    scored = scorer.score_frame(frame, refused=rng.random(40) < 0.2, decided_at=moment, arm=["a", "b"] * 20)
    assert log.flush()
    kept = log.log.decisions()
    assert len(kept) == 40 and kept["user_key"].nunique() == 7 and kept["refused"].any()
    assert sorted(kept["calling_score"]) == sorted(scored["calling_score"]) and set(kept["arm"]) == {"a", "b"}
    for identifier in kept["id"]:
        record = log.log.decision(identifier)
        same(pd.Series(record.to_dict()), replay(record, root=place.root))


def test_weights_by_confidence_replay(tmp_path, log):
    place = Place(tmp_path / "here")
    versions = place.train(1, release=False)
    parts = [network(model, 1) for model in NAMES]
    names = {model: item.version for model, item in versions.items()}
    place.compose(
        versions, release_bytes(*parts, POLICY, dials=Dials(0.4, confidence_factors=(0.3, 1.0, 1.2)), metadata=names)
    )
    scorer = Scorer.load(root=place.root, policy=POLICY, log=log, refresh_seconds=3600)
    say(scorer, 60, 8)
    assert log.flush()
    kept = log.log.decisions()
    assert kept["weight"].round(6).nunique() == 3 and kept["confidence"].nunique() == 3
    assert kept.groupby("confidence")["weight"].mean().round(2).to_dict() == {"low": 0.12, "medium": 0.4, "high": 0.48}
    for _, row in kept.iterrows():
        same(row, replay(row, root=place.root))


def test_a_log_wants_to_know_for_whom_and_refuses_no_score(tmp_path, log):
    scorer = Scorer.formula_only(log=log)
    with pytest.raises(InputError, match="user_id is missing"):
        scorer.score({})
    with pytest.raises(InputError, match="opportunity_id is missing"):
        scorer.score({"user_id": "a"})
    with pytest.raises(InputError, match="user_key has 2 items: there are 3 moments"):
        scorer.score_array(moments(3), user_ids=["a", "b"], opportunity_ids="cafe")
    given = "019a0000-0000-7000-8000-000000000001"
    score = scorer.score({"user_id": "a", "opportunity_id": "cafe", "decision_id": given})
    assert score.decision_id == given
    log.close()
    score = scorer.score({"user_id": "a", "opportunity_id": "cafe"})
    assert 0 <= score.calling_score <= 1
    assert scorer.counts.failures == {"a decision was not logged (writer is closed)": 1}


@pytest.mark.parametrize("scores", [400, pytest.param(10_000, marks=pytest.mark.long)])
def test_a_database_that_is_away_stops_no_score(tmp_path, scores):
    import sqlite3
    import time

    file = tmp_path / "log.db"
    log = LogWriter(DecisionLog(f"sqlite:///{file}", SECRET), folder=tmp_path / "spill", flush_seconds=0.05)
    scorer = Scorer(
        {}, {}, POLICY, opened=Opened(Graph(release_bytes(*(network(model, 1) for model in NAMES)))), log=log
    )
    sent = {"user_overall_energy": 0.7}
    ids: list[str] = []

    def serve(count: int) -> np.ndarray:
        took = np.empty(count)
        for index in range(count):
            begun = time.perf_counter()
            score = scorer.score(sent, user_id=index, opportunity_id="cafe")
            took[index] = time.perf_counter() - begun
            ids.append(score.decision_id)
        return took

    there = serve(scores)
    assert log.flush()
    thief = sqlite3.connect(file, isolation_level=None)
    thief.execute("BEGIN EXCLUSIVE")
    away = serve(scores)
    thief.execute("ROLLBACK")
    thief.close()
    assert log.flush(120)
    log.close()
    with sqlite3.connect(file) as connection:
        kept = [row[0] for row in connection.execute("SELECT id FROM decisions ORDER BY rowid")]
    assert kept == ids, "all there, in order, none doubled"
    assert scorer.counts.failures == {} and scorer.counts.scored == 2 * scores
    there99, away99 = np.percentile(there, 99) * 1e3, np.percentile(away, 99) * 1e3
    figures = f"p99 {away99:.2f} ms, {away99 / there99:.2f} x normal"
    print(f"{scores:,} scores with the database away: 0 failed (below {3 / scores:.2%}); {figures}")
