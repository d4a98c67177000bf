"""Importance against what is known in closed form for a linear predictor."""

import warnings

import numpy as np
from numpy.testing import assert_allclose

from calling_ai.core.contract import FEATURE_NAMES
from calling_ai.models.importance import feature_groups, permutation_importance, shap_importance, without

RNG = np.random.default_rng(12)
X = RNG.random((4_000, 45))
WEIGHTS = np.zeros(45)
WEIGHTS[[3, 20, 40]] = 0.3, -0.2, 0.1


def linear(features: np.ndarray) -> np.ndarray:
    """Return a linear prediction, well inside of [0, 1]."""
    return 0.4 + features @ WEIGHTS


def test_shuffling_costs_twice_the_variance_of_a_linear_part() -> None:
    found = permutation_importance(linear, X, linear(X), metric="mean_squared_error", shuffles=5, replicates=50)
    expected = 2 * WEIGHTS**2 * X.var(axis=0)
    assert_allclose([found.worth[name].value for name in FEATURE_NAMES], expected, rtol=0.06, atol=1e-12)
    assert [name for name, item in found.worth.items() if item.lower > 0] == [FEATURE_NAMES[at] for at in (3, 20, 40)]


def test_a_group_costs_what_its_members_cost_together() -> None:
    groups = {"all": FEATURE_NAMES, **feature_groups()}
    found = permutation_importance(
        linear, X, linear(X), groups=groups, metric="mean_squared_error", shuffles=4, replicates=50
    )
    assert_allclose(found.worth["all"].value, 2 * linear(X).var(), rtol=0.05)
    assert found.worth["context"].value == 0 and found.worth["user"].value > found.worth["spot"].value


def test_noise_is_not_found_important() -> None:
    """Intervals by person: of many features that do not matter few are called important."""
    rng = np.random.default_rng(3)
    label = (rng.random(4_000) < linear(X)).astype(float)

    def nosy(features: np.ndarray) -> np.ndarray:
        return np.clip(linear(features) + 0.02 * (features[:, 5:18] - 0.5) @ rng2, 0.01, 0.99)

    rng2 = np.random.default_rng(4).choice([-1.0, 1.0], 13)
    found = permutation_importance(nosy, X, label, np.repeat(np.arange(200), 20), shuffles=2, replicates=200)
    useless = [found.worth[FEATURE_NAMES[at]] for at in range(5, 18)]
    assert sum(item.lower > 0 for item in useless) <= 3


def test_shapley_values_of_a_linear_predictor() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, shares = shap_importance(linear, X[:8], X[100:130])
    assert_allclose(shares, (X[:8] - X[100:130].mean(axis=0)) * WEIGHTS, atol=1e-9)


def test_emptied_features_are_missing_and_the_rest_is_as_it_was() -> None:
    emptied = without(X, ["user_overall_energy"])
    assert np.isnan(emptied[:, 11]).all() and not np.isnan(X).any()
    assert_allclose(np.delete(emptied, 11, axis=1), np.delete(X, 11, axis=1))
