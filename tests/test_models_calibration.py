"""Calibration against scikit-learn, against sums by hand, and by simulation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from calling_ai.core.errors import InputError
from calling_ai.models.calibration import (
    bin_of,
    check_labels,
    expected_calibration_error,
    fit_platt,
    reliability,
    to_logit,
    to_probability,
    wilson,
)


def example(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return logits, labels and weights."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0.3, 1.5, rows)
    return logits, (rng.random(rows) < to_probability(0.6 * logits - 0.4)).astype(float), rng.exponential(1, rows)


@pytest.mark.parametrize("weighted", [False, True])
def test_platt_against_logistic_regression(weighted: bool) -> None:
    from sklearn.linear_model import LogisticRegression

    logits, labels, weights = example(3_000, 3)
    weights = weights / weights.mean() if weighted else np.ones(3_000)
    positives, negatives = weights @ labels, weights @ (1 - labels)
    target = np.where(labels == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    both = np.r_[logits, logits][:, None]  # a soft target is two rows, one of each class
    oracle = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1_000)
    oracle.fit(both, np.r_[np.ones(3_000), np.zeros(3_000)], np.r_[weights * target, weights * (1 - target)])
    expected = [oracle.coef_[0, 0], oracle.intercept_[0]]
    assert_allclose(fit_platt(logits, labels, weights if weighted else None), expected, rtol=1e-4)


def test_platt_is_optimal_and_counts_weights_as_rows() -> None:
    logits, labels, _ = example(500, 5)
    repeats = np.random.default_rng(1).integers(1, 4, 500)
    by_rows = fit_platt(np.repeat(logits, repeats), np.repeat(labels, repeats))
    assert_allclose(fit_platt(logits, labels, repeats), by_rows, atol=0.01)  # up to the smoothing of the targets


def test_platt_undoes_a_shift_and_a_stretch() -> None:
    logits, labels, weights = example(2_000, 7)
    slope, intercept = fit_platt(logits, labels, weights)
    stretched, shifted = fit_platt(3 * logits + 2, labels, weights)
    assert_allclose([stretched * 3, shifted + 2 * stretched], [slope, intercept], atol=1e-6)


@pytest.mark.parametrize(
    "logits", [np.r_[-np.ones(5), np.ones(5)], np.r_[-1e4 * np.ones(5), 1e4 * np.ones(5)], np.zeros(10)]
)
def test_platt_stays_finite_at_the_edges(logits: np.ndarray) -> None:
    slope, intercept = fit_platt(logits, np.r_[np.zeros(5), np.ones(5)])
    assert np.isfinite([slope, intercept]).all()
    assert_allclose(to_probability(slope * logits + intercept).mean(), 0.5, atol=1e-3)


@pytest.mark.parametrize("label", [0, 1])
def test_platt_refuses_a_single_class(label: int) -> None:
    with pytest.raises(InputError, match=f"labels are all {label}"):
        fit_platt(np.arange(5.0), np.full(5, label))
    with pytest.raises(InputError, match=f"labels are all {label}"):  # the other class has no weight
        fit_platt(np.arange(2.0), [0, 1], [1.0 - label, float(label)])


@pytest.mark.parametrize(
    ("values", "labels", "weights", "message"),
    [
        ([], [], None, "values is empty"),
        ([0.1, np.nan], [0, 1], None, "row 1 of values is not finite"),
        ([0.1, 0.2], [0, np.nan], None, "row 1 of labels is nan"),
        ([0.1, 0.2], [0, 1], [1, -1], "weights must be finite"),
        ([0.1, 0.2], [0, 1], [0, 0], "weights must be finite"),
        ([0.1, 0.2], [0], None, "must be equally long"),
    ],
)
def test_rows_that_cannot_be_used(
    values: list[float], labels: list[float], weights: list[float] | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_labels(np.array(values), np.array(labels), None if weights is None else np.array(weights))


def test_calibration_error_by_hand() -> None:
    probability, labels = np.array([0.05, 0.15, 0.15, 0.95, 1.0]), np.array([0, 1, 0, 1, 1])
    expected = (abs(0.05 - 0) * 1 + abs(0.15 - 0.5) * 2 + abs(0.975 - 1) * 2) / 5
    assert_allclose(expected_calibration_error(probability, labels, bins=10), expected, rtol=1e-12)
    weights = np.array([2, 1, 1, 1, 1])
    by_rows = expected_calibration_error(np.repeat(probability, weights), np.repeat(labels, weights), bins=10)
    assert_allclose(expected_calibration_error(probability, labels, weights, bins=10), by_rows, rtol=1e-12)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60), st.integers(1, 20))
def test_calibration_error_is_a_distance(rows: list[tuple[float, bool]], bins: int) -> None:
    probability, labels = np.array([p for p, _ in rows]), np.array([y for _, y in rows], dtype=float)
    error = expected_calibration_error(probability, labels, bins=bins)
    assert abs(probability.mean() - labels.mean()) - 1e-12 <= error <= 1
    assert expected_calibration_error(labels, labels, bins=bins) == 0
    assert ((bin_of(probability, bins) >= 0) & (bin_of(probability, bins) < bins)).all()


def test_logits_and_probabilities_are_inverse() -> None:
    logits = np.linspace(-15, 15, 61)
    assert_allclose(to_logit(to_probability(logits)), logits, rtol=1e-8, atol=1e-8)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        assert_allclose(to_probability(np.array([-1e6, 1e6])), [0, 1])


def test_wilson_against_the_equation_it_solves() -> None:
    share, rows = np.array([0.0, 0.02, 0.5, 1.0]), np.array([7.0, 400, 31, 12])
    z = 1.959963984540054
    for end, inside in zip(wilson(share, rows), ([1, 2, 3], [0, 1, 2]), strict=True):
        assert_allclose(((end - share) ** 2)[inside], (z**2 * end * (1 - end) / rows)[inside], rtol=1e-9)
    lower, upper = wilson(np.array([0.3]), np.array([0.0]))
    assert (lower[0], upper[0]) == (0, 1)


def test_wilson_holds_the_share_itself_to_the_last_bit() -> None:
    """A bar of an error that is negative by rounding cannot be drawn: with 10 rows and no positive it was one."""
    for share in (0.0, 1.0, 1 / 3):
        lower, upper = wilson(np.full(400, share), np.arange(400.0))
        assert (lower <= share).all() and (upper >= share).all()


def test_wilson_covers_the_truth() -> None:
    rng = np.random.default_rng(2)
    for truth, rows in ((0.05, 60), (0.5, 30)):
        lower, upper = wilson(rng.binomial(rows, truth, 20_000) / rows, np.full(20_000, rows))
        assert 0.93 < ((lower <= truth) & (truth <= upper)).mean() < 0.98


def test_reliability_keeps_every_row_and_the_means() -> None:
    logits, labels, weights = example(2_000, 11)
    probability = to_probability(logits).round(2)
    table = reliability(probability, labels, 10)
    assert table.rows.sum() == 2_000 and len(table) == 10
    assert_allclose(table.predicted @ table.rows, probability.sum())
    assert_allclose(table.observed @ table.rows, labels.sum())
    assert (np.diff(table.predicted) > 0).all()
    weighted = reliability(probability, labels, 10, weights)
    assert ((weighted.upper - weighted.lower) > (table.upper - table.lower)).all()  # fewer effective rows
    constant = reliability(np.full(50, 0.5), np.r_[np.ones(20), np.zeros(30)])
    assert len(constant) == 1 and constant.observed[0] == 0.4
