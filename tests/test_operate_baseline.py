"""The baseline: figures against scikit-learn, weights against a known truth, targets against their definition."""

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as oracle

from calling_ai.core.errors import InputError
from calling_ai.operate.baseline import INTERACTIONS, SUCCESS, measure, share_of, sufficiency, targets


def made(rows: int = 4_000, seed: int = 0, everybody: bool = False) -> pd.DataFrame:
    """Return a snapshot in which outcomes follow the formula, and only the called have one."""
    rng = np.random.default_rng(seed)
    score = rng.uniform(0.3, 0.9, rows)
    propensity = np.where(score >= 0.7, 0.9, 0.1)
    called = np.ones(rows, bool) if everybody else rng.random(rows) < propensity
    outcome = np.clip(score + rng.normal(0, 0.2, rows), 0, 1)
    return pd.DataFrame(
        {
            "user_key": [f"u{n}" for n in rng.integers(0, 100, rows)],
            "formula_score": score,
            "called": called,
            "outcome_score": np.where(called, outcome, np.nan),
            "action": np.where(outcome >= 0.7, "visit", "reject"),
            "inverse_propensity": 1 / np.where(called, propensity, 1 - propensity),
        }
    )


def test_figures_equal_those_of_scikit_learn() -> None:
    frame = made()
    found = measure(frame, replicates=50)
    rows = frame[frame["outcome_score"].notna()]
    positive, call = rows["outcome_score"] >= 0.7, rows["called"]
    for weights, figures in ((None, found.formula.figures), (rows["inverse_propensity"], found.formula.weighted)):
        expected = {
            "auc": oracle.roc_auc_score(positive, rows["formula_score"], sample_weight=weights),
            "accuracy": oracle.accuracy_score(positive, call, sample_weight=weights),
            "precision": oracle.precision_score(positive, call, sample_weight=weights),
            "recall": oracle.recall_score(positive, call, sample_weight=weights),
            "f1": oracle.f1_score(positive, call, sample_weight=weights),
            "mean_absolute_error": oracle.mean_absolute_error(
                rows["outcome_score"], rows["formula_score"], sample_weight=weights
            ),
            "positive_rate": np.average(positive, weights=weights),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(figures[name].value, value, rtol=1e-9, err_msg=name)
            assert figures[name].lower <= value <= figures[name].upper


def test_weights_speak_about_everybody() -> None:
    """What the called few say, weighted, is what everybody would have said; unweighted it is not."""
    truth = measure(made(15_000, everybody=True), replicates=20).formula.figures["positive_rate"].value
    found = measure(made(15_000), replicates=100).formula
    assert found.weighted["positive_rate"].lower <= truth <= found.weighted["positive_rate"].upper
    assert not found.figures["positive_rate"].lower <= truth <= found.figures["positive_rate"].upper


def test_intervals_respect_that_people_differ() -> None:
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(60), 50)
    flag = rng.random(3_000) < rng.beta(1, 1, 60)[user]
    by_person, by_row = share_of(flag, user), share_of(flag, np.arange(3_000))
    assert (by_person.upper - by_person.lower) > 3 * (by_row.upper - by_row.lower)
    shares = pd.Series(flag).groupby(user).mean()
    np.testing.assert_allclose(by_person.upper - by_person.lower, 2 * 1.96 * shares.std() / np.sqrt(60), rtol=0.2)


def test_enough_data_is_ten_thousand_calls_half_of_them_told() -> None:
    frame = made(30_000, everybody=True)
    assert sufficiency(frame).enough
    assert not sufficiency(frame.head(INTERACTIONS - 1)).enough
    untold = frame.assign(outcome_score=np.where(np.arange(len(frame)) % 5 < 3, np.nan, frame["outcome_score"]))
    assert not sufficiency(untold).enough and "have an outcome" in sufficiency(untold).text


def test_targets_are_the_ranges_above_today() -> None:
    figures = measure(made(), replicates=50).formula.figures
    for item in targets(figures, 100):
        _, low, high = SUCCESS[item.name]
        np.testing.assert_allclose(item.lower, figures[item.name].value * (1 + low))
        np.testing.assert_allclose(item.upper, min(1, figures[item.name].value * (1 + high)))
        assert (item.people is None) == (item.lower > 1)


def test_few_people_are_not_shown() -> None:
    with pytest.raises(InputError, match="fewer than 20 people is not shown"):
        measure(made().query("user_key in ('u1', 'u2')"))
