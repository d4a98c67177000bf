"""The simulator against the analysis of real tables, and with it the figures B26 and B27, at a bounded count."""

import math

import numpy as np
import pytest
from numpy.testing import assert_allclose
from statsmodels.stats.proportion import proportion_confint

from calling_ai.core.errors import InputError
from calling_ai.experiments.inference import compare
from calling_ai.experiments.sequential import Spending
from calling_ai.experiments.simulate import (
    Scenario,
    error_grid,
    error_table,
    every_user,
    power_row,
    promotions,
    rate_of,
    rollbacks,
    rollouts,
    shown,
)
from calling_ai.experiments.summaries import Cell, from_sums

ALPHA = 0.025


@pytest.mark.parametrize(("yes", "runs"), [(0, 50), (3, 200), (200, 200), (137, 300)])
def test_bounds_of_a_rate(yes: int, runs: int) -> None:
    found = rate_of(np.arange(runs) < yes, 0.99)
    lower, upper = proportion_confint(yes, runs, alpha=0.02, method="beta")
    assert_allclose([found.lower, found.upper], [lower, upper], rtol=1e-9)


@pytest.mark.parametrize("metric", ["proportion", "heavy"])
def test_the_simulated_score_is_that_of_the_analysis(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Record what one simulated experiment drew, and compare it as an analyst would."""
    import calling_ai.experiments.simulate as module

    drawn: list[np.ndarray] = []
    original = module._draw

    def recorded(*arguments: object) -> np.ndarray:
        drawn.append(original(*arguments)[:, 0])
        return original_of(drawn)

    def original_of(found: list[np.ndarray]) -> np.ndarray:
        return found[-1][:, None]

    monkeypatch.setattr(module, "_draw", recorded)
    scenario = Scenario(metric, 0.2, baseline="drift", stages=((0.2, 2), (0.5, 3)), users=800, looks=4)
    paths = rollouts(scenario, 1, seed=5)
    sums: dict[Cell, np.ndarray] = {}
    for index, (n, total, squares) in enumerate(drawn):
        look = index // 2
        cell = Cell(
            "treatment" if index % 2 else "control", "10 %" if look < 8 else "50 %", f"2026-01-0{look // 4 + 1}"
        )
        sums[cell] = sums.get(cell, np.zeros(3)) + np.array([n, total, squares])
    table = from_sums(
        ("y",), list(sums), [row[0] for row in sums.values()], [[row[1]] for row in sums.values()],
        [[[row[2]]] for row in sums.values()],
    )  # fmt: skip
    found = compare(table, "y", method="z")
    assert_allclose(paths.effect[-1, 0], found.effect, rtol=1e-9)
    assert paths.error[-1, 0] >= found.error * (1 - 1e-9)
    assert_allclose(paths.error[-1, 0], found.error, rtol=0.2)


@pytest.mark.parametrize("baseline", ["flat", "drift", "step"])
@pytest.mark.parametrize("late", [False, True])
def test_scores_are_standard_and_have_independent_increments(baseline: str, late: bool) -> None:
    paths = rollouts(Scenario(rate=0.2, baseline=baseline, late=late), 1_500, seed=1)
    for look in (40, 100, 170):
        assert abs(paths.z[look].mean()) < 4 / math.sqrt(1_500) and abs(paths.z[look].std() - 1) < 0.08
    step = paths.score[170] - paths.score[100]
    assert abs(np.corrcoef(step, paths.score[100])[0, 1]) < 4 / math.sqrt(1_500)


def test_the_same_seed_is_the_same_table() -> None:
    one, two = (rollouts(Scenario(late=True), 300, seed=9) for _ in range(2))
    assert (one.score == two.score).all() and (rollouts(Scenario(late=True), 300, seed=8).score != one.score).any()


@pytest.mark.slow
def test_false_promotions_stay_below_three_per_cent() -> None:
    """B26 at a bounded count: four metrics in the hardest world, 20 and 200 looks, 1,000 experiments a cell."""
    rows = error_table(error_grid(late=(True,), baselines=("step",)), 1_000, (20, 200), ALPHA, seed=21)
    print(shown(rows).to_string())
    assert len(rows) == 8
    for row in rows:
        assert row["promoted"].lower <= ALPHA, row  # a cell that promotes more than allowed would show
        assert row["rolled_back"].lower <= ALPHA, row
        assert row["pooled"].share > 0.4, row
    for looks in (20, 200):
        together = sum(row["promoted"].count for row in rows if row["looks"] == looks) / (4 * 1_000)
        assert together <= 0.030, together


@pytest.mark.slow
def test_power_harm_and_coverage() -> None:
    """B27 at a bounded count."""
    row = power_row(Scenario(rate=0.1, effect=0.057, stages=((0.1, 4), (0.5, 16))), 4_000, seed=31)
    print(shown([row]).T.to_string())
    assert row["ratio"] >= 0.97
    assert row["covered"].upper >= 0.945 and row["covered"].share >= 0.94
    assert abs(row["too_high"].share - 0.5) <= 0.03
    early = power_row(
        Scenario(rate=0.1, effect=0.09, stages=((0.5, 20),), users=3_000), 4_000, spending=Spending("pocock"), seed=32
    )
    assert early["sample"] < 0.6 and early["covered"].share >= 0.94
    caught = rollbacks(rollouts(Scenario(effect=-0.25, baseline="step", late=True), 1_000, seed=33), 20)
    assert rate_of(caught.stopped).lower >= 0.90


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "rate", "ramp"), [("proportion", 0.01, True), ("heavy", 0.0, True), ("clustered", 0.0, False)]
)
def test_a_look_after_every_user(metric: str, rate: float, ramp: bool) -> None:
    """The share of experiments without an effect that are ever rejected is at most alpha."""
    found = every_user(metric, rate, runs=200, ramp=ramp, seed=41)
    print(metric, rate, ramp, found)
    assert found.lower <= 0.05 and found.share <= 0.075


def test_outcomes_are_not_users() -> None:
    assert every_user("clustered", runs=30, users=2_000, rows=True).lower > 0.05


def test_the_sequence_watches_nothing_before_it_may_speak() -> None:
    paths = rollouts(Scenario(rate=0.005, stages=((0.1, 2), (0.5, 2)), users=500), 200, seed=2)
    assert not paths.ready.any() and not promotions(paths).stopped.any() and not rollbacks(paths).stopped.any()


@pytest.mark.long
def test_all_of_b26() -> None:
    rows = error_table(error_grid(), 10_000, (20, 200), ALPHA, seed=1)
    print(shown(rows).to_string())
    assert max(row["promoted"].share for row in rows) <= 0.030


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Scenario("magic"), "metric is 'magic'"),
        (lambda: Scenario(baseline="wave"), "baseline is 'wave'"),
        (lambda: Scenario(rate=0.0), "rate and growth are positive"),
        (lambda: Scenario(rate=0.7, baseline="step"), "a proportion is at most 1"),
        (lambda: Scenario(effect=-1.0), "an effect is above -1"),
        (lambda: Scenario(stages=()), "each has a share"),
        (lambda: Scenario(stages=((0.0, 3),)), "each has a share"),
        (lambda: Scenario(users=5), "each look needs a user"),
        (lambda: rollouts(Scenario(), 0), "runs is 0"),
        (lambda: promotions(rollouts(Scenario(), 5), 500), "looks is 500"),
        (lambda: power_row(Scenario(effect=0.1, baseline="drift"), 50), "only where the baseline is flat"),
        (lambda: every_user("magic"), "metric is 'magic'"),
        (lambda: rate_of(np.zeros(0)), "happened is empty"),
    ],
)
def test_bad_input_is_one_clear_sentence(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
