"""Evaluation against scikit-learn and against counting pairs; intervals and verdicts by simulation."""

import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from calling_ai.core.errors import InputError
from calling_ai.models import evaluation
from calling_ai.models.calibration import expected_calibration_error, to_probability
from calling_ai.models.evaluation import (
    HIGHER_IS_BETTER,
    auc,
    average_precision,
    call_metrics,
    compare_paired,
    estimate_metrics,
    evaluate,
    log_loss,
    mean_absolute_error,
    mean_squared_error,
    metrics,
    plot_curve,
    plot_metric,
    plot_reliability,
    plot_roc,
    plot_scores,
    positives_in_top,
    roc_curve,
)

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


def example(rows: int = 800, seed: int = 0, ties: bool = True) -> Rows:
    """Return predictions, labels and weights."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.3, rows)
    prediction = to_probability(logits)
    prediction = prediction.round(2) if ties else prediction
    return prediction, (rng.random(rows) < to_probability(0.8 * logits)).astype(int), rng.exponential(1, rows)


def town(people: int, rows: int, seed: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return predictions, labels and people who differ from each other in ways that the prediction does not see."""
    rng = np.random.default_rng(seed)
    person = rng.integers(0, people, rows)
    logits = rng.normal(0, 1, rows)
    return (
        to_probability(logits),
        rng.random(rows) < to_probability(logits + rng.normal(0, spread, people)[person]),
        person,
    )


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_against_scikit_learn(ties: bool, weighted: bool) -> None:
    from sklearn import metrics as oracle

    prediction, label, weight = example(ties=ties)
    weights = weight if weighted else None
    called = prediction >= 0.7
    assert_allclose(auc(prediction, label, weights), oracle.roc_auc_score(label, prediction, sample_weight=weights))
    expected = oracle.average_precision_score(label, prediction, sample_weight=weights)
    assert_allclose(average_precision(prediction, label, weights), expected)
    assert_allclose(log_loss(prediction, label, weights), oracle.log_loss(label, prediction, sample_weight=weights))
    assert_allclose(
        mean_squared_error(prediction, label, weights), np.average((prediction - label) ** 2, weights=weights)
    )
    assert_allclose(
        mean_absolute_error(prediction, label, weights), np.average(abs(prediction - label), weights=weights)
    )
    found = call_metrics(prediction, label, weights=weights)
    assert_allclose(found["precision"], oracle.precision_score(label, called, sample_weight=weights))
    assert_allclose(found["recall"], oracle.recall_score(label, called, sample_weight=weights))
    assert_allclose(found["f1"], oracle.f1_score(label, called, sample_weight=weights))
    assert_allclose(found["accuracy"], oracle.accuracy_score(label, called, sample_weight=weights))
    both = metrics(prediction, label, None, weights)
    assert_allclose(both["expected_calibration_error"], expected_calibration_error(prediction, label, weights))
    others, positives = roc_curve(prediction, label, weights)
    assert_allclose(np.trapezoid(positives, others), both["auc"])


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 3)), min_size=1, max_size=25))
def test_auc_counts_pairs_and_weights_count_rows(rows: list[tuple[int, bool, int]]) -> None:
    prediction = np.array([value / 5 for value, _, _ in rows])
    label, weight = np.array([y for _, y, _ in rows]), np.array([w for _, _, w in rows])
    if not weight.sum():
        return
    repeated = np.repeat(np.arange(len(rows)), weight)
    good, bad = (prediction[repeated][side] for side in (label[repeated], ~label[repeated]))
    pairs = (good[:, None] > bad).sum() + (good[:, None] == bad).sum() / 2
    expected = pairs / (len(good) * len(bad)) if len(good) and len(bad) else np.nan
    assert_allclose(auc(prediction, label, weight), expected)
    by_rows, by_weight = metrics(prediction[repeated], label[repeated]), metrics(prediction, label, None, weight)
    for name in HIGHER_IS_BETTER:
        assert_allclose(by_weight[name], by_rows[name], atol=1e-12, err_msg=name)


@given(st.integers(0, 10_000))
def test_order_of_rows_does_not_matter(seed: int) -> None:
    prediction, label, weight = example(60, seed)
    order = np.random.default_rng(seed).permutation(60)
    first, second = (
        metrics(prediction, label, None, weight),
        metrics(prediction[order], label[order], None, weight[order]),
    )
    for name in HIGHER_IS_BETTER:
        assert_allclose(first[name], second[name], rtol=1e-9, err_msg=name)


def test_share_of_positives_in_the_top() -> None:
    prediction, label = np.linspace(1, 0, 100), np.r_[np.ones(15), np.zeros(85)]
    assert_allclose(positives_in_top(prediction, label), 10 / 15)
    assert_allclose(positives_in_top(prediction, label, top=0.2), 1)
    assert_allclose(positives_in_top(np.zeros(100), label, top=0.3), 0.3)  # a constant finds no more than chance
    with pytest.raises(InputError, match="top is 0"):
        positives_in_top(prediction, label, top=0)


def test_resampling_is_recomputing_on_drawn_rows() -> None:
    """Weighted recomputation gives what copying the rows of the drawn people would give."""
    prediction, label, person = town(30, 400, 2)
    weight = np.random.default_rng(1).exponential(1, 400)
    drawn = evaluation.resample(30, 25, seed=4)
    rows = evaluation.check_outcomes(label, None, person, weight)
    fast = evaluation._resampled(prediction, rows, 0.7, 0.1)(drawn)
    for replicate in range(25):
        copies = np.repeat(np.arange(400), drawn[replicate][person])
        slow = metrics(prediction[copies], label[copies], None, weight[copies])
        for name in HIGHER_IS_BETTER:
            assert_allclose(fast[name][replicate], slow[name], atol=1e-12, err_msg=name)


def test_intervals_cover_the_truth_although_people_differ() -> None:
    """In 200 worlds of 80 people, about 95 % of the intervals hold the truth; those that ignore people hold fewer."""
    watched = ["auc", "log_loss", "mean_squared_error", "precision"]
    truth = metrics(*town(100_000, 400_000, 99, spread=2.5)[:2])
    covered = {"people": dict.fromkeys(watched, 0), "rows": dict.fromkeys(watched, 0)}
    for world in range(200):
        prediction, label, person = town(80, 2_000, world, spread=2.5)
        for by, users in (("people", person), ("rows", None)):
            found = evaluate({"p": prediction}, label, None, users, replicates=120, seed=world)
            for metric in watched:
                covered[by][metric] += found.get("p", metric).lower <= truth[metric] <= found.get("p", metric).upper
    for metric in watched:
        assert 0.88 <= covered["people"][metric] / 200 <= 0.99, (metric, covered)
    assert covered["rows"]["precision"] < 0.8 * covered["people"]["precision"], covered
    assert covered["rows"]["log_loss"] < 0.95 * covered["people"]["log_loss"], covered


def test_calibration_error_interval_takes_the_noise_off() -> None:
    """A perfect probability has an error of noise alone, which the interval reaches below; a real error it holds."""
    rng = np.random.default_rng(3)
    noise, low, held = [], [], []
    for world in range(60):
        prediction = rng.random(1_500)
        for shift in (0.0, 0.1):
            label = rng.random(1_500) < prediction * (1 - shift)
            estimate = evaluate({"p": prediction}, label, replicates=60, seed=world).get(
                "p", "expected_calibration_error"
            )
            assert estimate.lower <= estimate.value <= estimate.upper
            if shift:
                held.append(estimate.lower <= shift / 2 <= estimate.upper)  # the mean of a shift of 10 % of p
            else:
                noise.append(estimate.value)
                low.append(estimate.lower)
    assert np.mean(low) < 0.35 * np.mean(noise)
    assert np.mean(held) > 0.85


def test_verdicts_err_as_rarely_as_they_promise() -> None:
    """Two equally good predictors: a verdict is given in about 5 % of worlds. With a real difference, in most."""
    false, right = 0, 0
    for world in range(150):
        rng = np.random.default_rng(world)
        _, label, person = town(150, 1_500, world)
        logits = np.where(label, 0.7, -0.7)
        one, two, sharp = (to_probability(logits + rng.normal(0, noise, 1_500)) for noise in (2.0, 2.0, 1.2))
        false += compare_paired("auc", one, two, label, person, replicates=100, seed=world).verdict != "cannot tell"
        right += compare_paired("auc", sharp, two, label, person, replicates=100, seed=world).verdict == "better"
    assert false / 150 <= 0.12
    assert right / 150 > 0.9


@pytest.mark.parametrize("metric", list(HIGHER_IS_BETTER))
def test_verdicts_know_which_way_is_better(metric: str) -> None:
    rng = np.random.default_rng(1)
    truth = rng.random(6_000)
    label, person = rng.random(6_000) < truth, rng.integers(0, 400, 6_000)
    bad = 0.15 + 0.7 * rng.random(6_000)
    better = compare_paired(metric, truth, bad, label, person, replicates=100)
    worse = compare_paired(metric, bad, truth, label, person, replicates=100)
    assert (better.verdict, worse.verdict) == ("better", "worse")
    assert_allclose(better.difference.value, -worse.difference.value)
    assert (better.difference.value > 0) == HIGHER_IS_BETTER[metric]
    assert compare_paired(metric, truth, truth, label, person, replicates=50).verdict == "cannot tell"


def test_pairing_is_sharper_than_two_intervals() -> None:
    prediction, label, person = town(200, 3_000, 5)
    noisy = to_probability(np.log(prediction / (1 - prediction)) + np.random.default_rng(1).normal(0, 0.5, 3_000))
    result = compare_paired("auc", prediction, noisy, label, person)
    width = result.difference.upper - result.difference.lower
    assert width < (result.challenger.upper - result.challenger.lower) * 0.8
    assert result.challenger.lower < result.champion.upper
    same = evaluate({"a": prediction, "b": noisy}, label, None, person)
    assert (result.challenger, result.champion) == (same.get("a", "auc"), same.get("b", "auc"))


def test_few_people_cannot_tell_and_one_has_no_interval() -> None:
    prediction, label, _ = example(400)
    few = compare_paired("auc", prediction, np.full(400, 0.5), label, np.arange(400) % 15)
    assert few.verdict == "cannot tell" and few.people == 15 and few.difference.excludes_zero
    one = evaluate({"p": prediction}, label, None, np.zeros(400)).get("p", "auc")
    assert np.isfinite(one.value) and np.isnan([one.lower, one.upper]).all()
    assert compare_paired("auc", prediction, 1 - prediction, label, np.zeros(400)).verdict == "cannot tell"


def test_what_is_not_defined_is_nan_and_shown_as_a_dash() -> None:
    result = evaluate({"p": np.full(60, 0.4)}, np.ones(60), replicates=30)
    assert np.isnan(result.get("p", "auc").value) and np.isnan(result.get("p", "precision").value)
    assert "<td>–</td>" in result._repr_html_()
    assert result.get("p", "recall").value == 0


def test_models_are_judged_by_their_label() -> None:
    rng = np.random.default_rng(2)
    score = rng.choice([0.2, 0.5, 0.7, 0.9], 500)
    prediction = np.clip(score + rng.normal(0, 0.2, 500), 0, 1)
    found = estimate_metrics("calling_score", prediction, score, rng.integers(0, 50, 500), replicates=50)
    assert_allclose(found["auc"].value, auc(prediction, score >= 0.7))
    assert_allclose(found["mean_squared_error"].value, np.mean((prediction - score) ** 2))
    assert "log_loss" not in found
    assert "log_loss" in estimate_metrics("outcome", prediction, score >= 0.7, replicates=50)
    with pytest.raises(InputError, match="a label is 0 or 1"):
        estimate_metrics("outcome", prediction, score)
    with pytest.raises(InputError, match="model is 'magic'"):
        estimate_metrics("magic", prediction, score)


def test_equal_seeds_and_text_users() -> None:
    prediction, label, person = town(40, 300, 3)
    text = np.array([f"user {index}" for index in person], dtype=object)
    first, second = (evaluate({"p": prediction}, label, None, text, replicates=40, seed=seed) for seed in (1, 1))
    assert first == second and first.people == len(np.unique(person))
    assert first != evaluate({"p": prediction}, label, None, text, replicates=40, seed=2)
    assert first.to_frame()["metric"].tolist() == list(HIGHER_IS_BETTER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive": np.array([])}, "positive is empty"),
        ({"positive": np.array([0.0, np.nan, 1.0])}, "row 1 of positive is nan"),
        ({"score": np.array([0.1, 0.2])}, "score has shape"),
        ({"score": np.array([0.1, 0.2, 1.2])}, "row 2 of score is 1.2"),
        ({"users": np.array([1, 2])}, "users has shape"),
        ({"weights": np.array([1.0, np.nan, 1.0])}, "weights must be finite"),
        ({"predictions": {"p": np.array([0.1, 0.2])}}, "p has shape"),
        ({"predictions": {"p": np.array([0.1, 0.2, np.nan])}}, "row 2 of p is nan"),
        ({"predictions": {}}, "predictions is empty"),
        ({"replicates": 3}, "replicates is 3"),
    ],
)
def test_rows_that_cannot_be_evaluated(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"predictions": {"p": np.array([0.1, 0.5, 0.9])}, "positive": np.array([0, 1, 1])}
    with pytest.raises(InputError, match=message):
        evaluate(**(arguments | change))  # type: ignore[arg-type]


def test_unknown_names() -> None:
    prediction, label, _ = example(50)
    with pytest.raises(InputError, match="metric is 'magic'"):
        compare_paired("magic", prediction, prediction, label)
    with pytest.raises(InputError, match="there is no 'auc' of 'q'"):
        evaluate({"p": prediction}, label, replicates=20).get("q", "auc")


def test_sixty_thousand_rows_take_seconds() -> None:
    prediction, label, person = town(2_000, 60_000, 1)
    begun = time.perf_counter()
    evaluate({"p": prediction}, label, None, person, replicates=500)
    assert time.perf_counter() - begun < 20  # about three on a quiet machine


def test_pictures_show_intervals_and_labels() -> None:
    from types import SimpleNamespace

    from matplotlib import pyplot

    prediction, label, _ = example(400)
    result = evaluate({"formula": prediction**2, "network": prediction}, label, replicates=30)
    fig, axes = pyplot.subplots(1, 5)
    plot_roc(axes[0], {"formula": prediction**2, "network": prediction}, label, result)
    plot_reliability(axes[1], prediction, label)
    plot_metric(axes[2], result, "log_loss")
    plot_curve(axes[3], SimpleNamespace(train=(0.5, 0.4), validation=(0.6, 0.7)))
    plot_scores(axes[4], prediction, label)
    fig.canvas.draw()
    for ax in axes:
        assert ax.get_xlabel()
    assert str(result.get("network", "auc")) in axes[0].get_legend().get_texts()[1].get_text()
    assert "95" in axes[2].get_xlabel() and [text.get_text() for text in axes[2].get_yticklabels()] == [
        "formula",
        "network",
    ]
    pyplot.close(fig)


def test_light_to_import() -> None:
    heavy = {"torch", "pandas", "matplotlib.pyplot", "sklearn", "scipy"}
    program = f"import sys, calling_ai.models.evaluation; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
