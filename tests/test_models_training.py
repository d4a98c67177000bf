"""Training: repeatable, stops where it should, learns what there is, and refuses what cannot teach."""

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from calling_ai.core.errors import InputError
from calling_ai.core.files import to_json
from calling_ai.models.calibration import expected_calibration_error, to_probability
from calling_ai.models.networks import build, default_spec, predict
from calling_ai.models.training import (
    TrainingOptions,
    balance_classes,
    calibrate,
    check_rows,
    choose_device,
    default_options,
    row_losses,
    shrink_inputs,
    train,
)

Table = tuple[np.ndarray, np.ndarray, np.ndarray]


def moments(rows: int, seed: int, features: int = 45) -> Table:
    """Return features, true probabilities, and labels drawn from them."""
    rng = np.random.default_rng(seed)
    x = rng.beta(2, 2, (rows, features))
    similarity = 1 - np.abs(x[:, :12] - x[:, 12:24]).mean(axis=1)
    probability = to_probability(14 * (similarity - 0.78) + 3 * (x[:, 24] - 0.5))
    return x, probability, (rng.random(rows) < probability).astype(float)


X, P, Y = moments(3_000, 1)
CHECK = moments(1_500, 2)
UNSEEN = moments(6_000, 3)
SPARSE = {"learning_rate": 5e-3, "weight_decay": 0.3, "penalty": 2.0}  # little matters in these rows
QUICK = default_options("outcome", epochs=15, **SPARSE)
OUTCOME, SCORE = default_spec("outcome", dropout=0.1), default_spec("calling_score")


def quick(options: TrainingOptions = QUICK, **changes: object) -> object:
    """Train the outcome model on the small table."""
    return train(OUTCOME, X, Y, (CHECK[0], CHECK[2]), options=options, **changes)  # type: ignore[arg-type]


def weights_digest(network: torch.nn.Module) -> str:
    """Return one digest of all weights and buffers."""
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in network.state_dict().values())).hexdigest()


def test_learns_and_is_calibrated() -> None:
    result = train(OUTCOME, X, Y, (CHECK[0], CHECK[2]), options=default_options("outcome", **SPARSE))
    answers = predict(result.network, UNSEEN[0])
    known = np.abs(answers - UNSEEN[1]).mean()
    assert known < 0.06 < np.abs(Y.mean() - UNSEEN[1]).mean() / 2
    assert expected_calibration_error(answers, UNSEEN[2]) < 0.04
    assert result.rows == 3_000 and result.device in ("cpu", "cuda")
    assert not result.network.training and result.options.batch_size == 64


def test_equal_seeds_give_equal_bits_here_and_elsewhere(tmp_path: Path) -> None:
    torch.manual_seed(99)
    first = quick()
    torch.manual_seed(5)
    assert weights_digest(first.network) == weights_digest(quick().network)  # type: ignore[attr-defined]
    other = quick(default_options("outcome", epochs=15, seed=1, **SPARSE))
    assert weights_digest(first.network) != weights_digest(other.network)  # type: ignore[attr-defined]
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_models_training import quick, weights_digest\n"
        "print(weights_digest(quick().network))"
    )
    here = str(Path(__file__).parent)
    run = subprocess.run(
        [sys.executable, "-c", program, here], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert run.stdout.split()[-1] == weights_digest(first.network)  # type: ignore[attr-defined]


def test_leaves_the_session_as_it_was() -> None:
    torch.set_num_threads(2)
    try:
        torch.manual_seed(1)
        expected = torch.rand(1)
        torch.manual_seed(1)
        quick(default_options("outcome", epochs=1))
        assert torch.equal(torch.rand(1), expected)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_early_stopping_restores_the_best_weights() -> None:
    """Without a penalty this overfits quickly: the best epoch is early, and its weights come back."""
    options = default_options("calling_score", epochs=60, patience=6, penalty=0.0, weight_decay=0.0)
    labels, check = Y, CHECK[2]
    result = train(SCORE, X[:, :39], labels, (CHECK[0][:, :39], check), options=options)
    curve = result.curve
    assert result.best_epoch == int(np.argmin(curve.validation)) + 1
    assert len(curve) == result.best_epoch + 6 < 60
    assert curve.validation[-1] > min(curve.validation) * 1.01
    assert curve.train[-1] < curve.train[0]
    answers = predict(result.network, CHECK[0][:, :39])
    assert_allclose(((answers - check) ** 2).mean(), min(curve.validation), rtol=1e-5)
    assert result.validation_loss == min(curve.validation)


def test_the_validation_loss_is_that_of_probabilities() -> None:
    """The shift by class weights is taken back before the loss is computed."""
    rare = (UNSEEN[2] * (np.random.default_rng(4).random(6_000) < 0.2)).astype(float)
    half = slice(0, 3_000), slice(3_000, 6_000)
    losses = {}
    for class_weights in (True, False):
        options = default_options("outcome", epochs=15, class_weights=class_weights, **SPARSE)
        result = train(OUTCOME, UNSEEN[0][half[0]], rare[half[0]], (UNSEEN[0][half[1]], rare[half[1]]), options=options)
        losses[class_weights] = result.validation_loss
        assert abs(predict(result.network, UNSEEN[0][half[1]]).mean() - rare[half[1]].mean()) < 0.01
        assert abs(float(result.network.slope) - 1) < 0.5
    share = rare.mean()
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert max(losses.values()) < entropy + 0.01
    assert_allclose(losses[True], losses[False], rtol=0.05)


def test_weights_count_as_rows() -> None:
    """A part of the rows that speaks against the rest is ignored when its weight is zero."""
    x = np.vstack([X, X])
    labels, weights = np.r_[Y, 1 - Y], np.r_[np.ones(3_000), np.zeros(3_000)]
    result = train(
        OUTCOME,
        x,
        labels,
        (CHECK[0], CHECK[2]),
        weights=weights,
        options=default_options("outcome", epochs=20, **SPARSE),
    )
    assert np.corrcoef(predict(result.network, UNSEEN[0]), UNSEEN[1])[0, 1] > 0.85
    scaled = [
        weights_digest(quick(default_options("outcome", epochs=2), weights=np.full(3_000, size)).network)  # type: ignore[attr-defined]
        for size in (1.0, 8.0)
    ]
    assert scaled[0] == scaled[1]


def test_validation_weights_decide_when_to_stop_and_how_to_calibrate() -> None:
    weights = np.where(CHECK[2] == 1, 3.0, 1.0)
    result = quick(validation_weights=weights)
    mean = np.average(predict(result.network, CHECK[0]), weights=weights)  # type: ignore[attr-defined]
    assert_allclose(mean, np.average(CHECK[2], weights=weights), atol=2e-3)


@pytest.mark.parametrize("members", [1, 3])
def test_inputs_without_information_lose_their_weights(members: int) -> None:
    x = X.copy()
    x[:, 33] = np.nan  # missing everywhere
    x[:, 44] = 0.3  # the same everywhere
    check = CHECK[0].copy()
    check[:, [33, 44]] = np.random.default_rng(1).random((1_500, 2))  # and not so later
    options = default_options("outcome", epochs=15, **SPARSE)
    result = train(default_spec("outcome", members=members), x, Y, (check, CHECK[2]), options=options)
    lengths = torch.linalg.vector_norm(result.network.weights[0].detach(), dim=-1).reshape(-1, OUTCOME.inputs).numpy()
    assert (lengths[:, [33, 44]] == 0).all()
    assert (lengths[:, [24, 57]] > np.median(lengths)).all()  # proximity and mean similarity
    shaken = UNSEEN[0].copy()
    shaken[:, [33, 44]] = np.nan
    assert_array_equal(predict(result.network, shaken), predict(result.network, UNSEEN[0]))
    assert result.used_inputs <= OUTCOME.inputs - 2


def test_interactions_and_penalty_find_a_sharp_step() -> None:
    """A jump at a mean likeness of 0.74 with noise of 0.1: the plain network is far from the floor, ours near it."""
    x, _, _ = moments(6_000, 8, features=39)
    rng = np.random.default_rng(9)
    called = 1 - np.abs(x[:, :12] - x[:, 12:24]).mean(axis=1) > 0.74
    score = np.clip(0.3 + 0.4 * called + rng.normal(0, 0.1, 6_000), 0, 1)
    result = train(SCORE, x[:4_000], score[:4_000], (x[4_000:5_000], score[4_000:5_000]))
    error = ((predict(result.network, x[5_000:]) - score[5_000:]) ** 2).mean()
    floor = ((0.3 + 0.4 * called - score)[5_000:] ** 2).mean()
    assert error < floor + 0.002


def test_published_records_are_learned_below_the_bar(shared: Path) -> None:
    """Rows of the published training part are held back as unseen records; the other rows train and validate."""
    import pandas as pd

    from calling_ai.core.contract import feature_table

    frame = pd.read_csv(shared / "data" / "hybrid_v1.csv.gz")
    x, y, split = feature_table(frame).values[:, :39], frame["outcome_score"].to_numpy(), frame["split"].to_numpy()
    errors = []
    for seed in (0, 1):
        hidden = (split == "train") & (np.random.default_rng(seed).random(len(y)) < 0.15)
        learn, check = (split == "train") & ~hidden, split == "validation"
        options = default_options("calling_score", seed=seed)
        result = train(SCORE, x[learn], y[learn], (x[check], y[check]), options=options)
        errors.append(((predict(result.network, x[hidden]) - y[hidden]) ** 2).mean())
    assert np.mean(errors) < 0.0205, errors


def test_calibration_twice_is_calibration_once() -> None:
    network = build(OUTCOME, seed=3)
    first = calibrate(network, X, Y)
    assert calibrate(network, X, Y) == first
    assert first[0] >= 0


def test_logits_that_say_the_opposite_are_not_turned_around() -> None:
    result = quick()
    slope, _ = calibrate(result.network, CHECK[0], 1 - CHECK[2])  # type: ignore[attr-defined]
    answers = predict(result.network, CHECK[0])  # type: ignore[attr-defined]
    assert slope == 0 and np.ptp(answers) == 0
    assert_allclose(answers[0], 1 - CHECK[2].mean(), atol=1e-3)


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        ("outcome", lambda x, y: (x[:0], y[:0]), "train: the table is empty"),
        ("outcome", lambda x, y: (x, np.ones_like(y)), "train: all labels are 1"),
        ("outcome", lambda x, y: (x, np.where(np.arange(len(y)) == 7, np.nan, y)), "train: row 7 has the label nan"),
        ("outcome", lambda x, y: (x, y * 0.5), "a label of outcome is 0 or 1"),
        ("calling_score", lambda x, y: (x, y + 0.5), "a label of calling_score is in \\[0, 1\\]"),
        ("calling_score", lambda x, y: (x, y[:-1]), "the numbers must agree"),
        ("calling_score", lambda x, y: (x[:, :12], y), "it must be rows of 39 features"),
        (
            "calling_score",
            lambda x, y: (np.where(np.arange(len(x))[:, None] == 3, np.inf, x), y),
            "row 3 has an infinite feature",
        ),
    ],
)
def test_tables_that_cannot_teach(model: str, change: object, message: str) -> None:
    spec = default_spec(model)
    x, y = change(X[:, : spec.features], Y)  # type: ignore[operator]
    with pytest.raises(InputError, match=message):
        train(spec, x, y, (CHECK[0][:, : spec.features], CHECK[2]))
    with pytest.raises(InputError, match=message.replace("train:", "validation:")):
        train(spec, X[:, : spec.features], Y, (x, y))


@pytest.mark.parametrize("weights", [np.zeros(3_000), np.full(3_000, np.nan), -np.ones(3_000), np.full(3_000, np.inf)])
def test_weights_that_make_no_sense(weights: np.ndarray) -> None:
    with pytest.raises(InputError, match="weights must be finite"):
        check_rows(OUTCOME, X, Y, weights)


def test_tiny_tables_train() -> None:
    result = train(OUTCOME, X[:12], Y[:12], (X[12:40], Y[12:40]), options=default_options("outcome", epochs=3))
    assert np.isfinite(predict(result.network, X)).all() and result.options.batch_size == 12
    constant = train(SCORE, np.full((30, 39), np.nan), np.full(30, 0.6), (X[:30, :39], np.full(30, 0.6)))
    assert_allclose(predict(constant.network, X[:5, :39]), 0.6, atol=0.01)


def test_balance_and_its_shift_agree() -> None:
    rng = np.random.default_rng(2)
    labels, weights = torch.tensor(rng.random(5_000) < 0.2).float(), torch.tensor(rng.exponential(1, 5_000)).float()
    balanced, shift = balance_classes(labels, weights)
    assert_allclose(float((balanced * labels).sum()), float((balanced * (1 - labels)).sum()), rtol=1e-4)
    assert_allclose(to_probability(np.array(shift)), np.average(labels, weights=weights), rtol=1e-5)
    assert_allclose(float(balanced.sum()), float(weights.sum()), rtol=1e-5)


def test_the_proximal_step_solves_its_problem() -> None:
    """It minimises |v - w|^2 / 2 + length |v| over v: no other point does better."""
    rng = np.random.default_rng(6)
    weight = torch.tensor(rng.normal(0, 1, (2, 5, 4))).float()
    shrunk = weight.clone()
    shrink_inputs(shrunk, 1.5, exempt=1)
    assert torch.equal(shrunk[:, -1], weight[:, -1])
    for before, after in zip(weight[:, :-1].reshape(-1, 4), shrunk[:, :-1].reshape(-1, 4), strict=True):

        def cost(point: torch.Tensor, origin: torch.Tensor = before) -> float:
            return float((point - origin).square().sum() / 2 + 1.5 * point.norm())

        assert all(cost(after) <= cost(after + 0.05 * torch.tensor(rng.normal(0, 1, 4)).float()) for _ in range(20))


def test_losses_against_numpy() -> None:
    logits, labels = np.array([-3.0, 0.2, 40.0]), np.array([0.0, 1.0, 0.0])
    p = to_probability(logits)
    both = [
        row_losses(model, torch.tensor(logits), torch.tensor(labels)).numpy() for model in ("calling_score", "outcome")
    ]
    assert_allclose(both[0], (p - labels) ** 2, rtol=1e-12)
    assert_allclose(both[1], np.logaddexp(0, logits) - labels * logits, rtol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"patience": 0}, "patience is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": 2.0}, "learning_rate is 2.0"),
        ({"penalty": -1.0}, "penalty is -1.0"),
        ({"device": "abacus"}, "device is 'abacus'"),
    ],
)
def test_options_that_make_no_sense(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        default_options("outcome", **changes)


def test_device() -> None:
    assert choose_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        assert choose_device("auto").type == "cpu"
        with pytest.raises(InputError, match="no such device"):
            choose_device("cuda")


def test_a_result_can_be_written() -> None:
    written = json.loads(to_json(quick(default_options("outcome", epochs=2))))
    assert written["spec"]["model"] == "outcome" and len(written["curve"]["validation"]) == 2
    assert "network" not in written
