"""Networks: what is inside the graph, held against numpy; missing is neutral; a row alone is the row in a batch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose, assert_array_equal

from calling_ai.core.contract import FEATURE_NAMES, NEUTRAL, fill_neutral
from calling_ai.core.errors import InputError
from calling_ai.models.networks import (
    DERIVED,
    GROUP_MEANS,
    ContractNetwork,
    NetworkSpec,
    build,
    default_spec,
    fit_scaling,
    predict,
    reference_spec,
    set_calibration,
)

torch.set_num_threads(1)


def trained_like(model: str, members: int = 1, seed: int = 0) -> ContractNetwork:
    """Return a network with everything that training sets: scaling, weights, calibration."""
    network = build(default_spec(model, members=members), seed)
    sample = np.random.default_rng(seed).beta(2, 2, (400, network.spec.features))
    fit_scaling(network, torch.tensor(sample, dtype=torch.float32))
    set_calibration(network, 0.7, -0.2)
    return network


NETWORKS = [trained_like("calling_score"), trained_like("outcome"), trained_like("outcome", members=3)]


def rows_of(features: int) -> st.SearchStrategy[np.ndarray]:
    """Return a strategy for tables with missing values and values at the borders."""
    value = st.one_of(st.just(math.nan), st.sampled_from([0.0, 1.0]), st.floats(0, 1, width=32))
    return hnp.arrays(
        np.float32, st.tuples(st.integers(1, 12), st.just(features)), elements=value, fill=st.just(math.nan)
    )


def by_numpy(network: ContractNetwork, features: np.ndarray) -> np.ndarray:
    """Return the output computed in float64 by numpy, from the description of the network."""
    state = {name: value.numpy().astype(float) for name, value in network.state_dict().items()}
    x = np.clip(fill_neutral(features.astype(float)), 0, 1)
    similarity = 1 - np.abs(x[:, :12] - x[:, 12:24])
    means = [part.mean(axis=1) for part in (similarity, x[:, 24:34], x[:, 34:39])]
    inputs = (np.column_stack([x, similarity, *means]) - state["centre"]) / state["scale"]
    logits = []
    for member in range(network.spec.members):
        hidden = inputs
        for layer in range(len(network.weights)):
            weight, bias = state[f"weights.{layer}"], state[f"biases.{layer}"]
            if network.spec.members > 1:
                weight, bias = weight[member], bias[member, 0]
            hidden = hidden @ weight + bias
            if layer < len(network.weights) - 1:
                hidden = np.maximum(hidden, 0)
        logits.append(hidden[:, 0])
    return 1 / (1 + np.exp(-(state["slope"] * np.mean(logits, axis=0) + state["intercept"])))


@pytest.mark.parametrize("network", NETWORKS, ids=["score", "outcome", "three members"])
def test_forward_is_what_the_description_says(network: ContractNetwork) -> None:
    rng = np.random.default_rng(4)
    features = rng.random((300, network.spec.features))
    features[rng.random(features.shape) < 0.2] = np.nan
    assert_allclose(predict(network, features), by_numpy(network, features), atol=2e-6)


@pytest.mark.parametrize("network", NETWORKS, ids=["score", "outcome", "three members"])
@settings(max_examples=25)
@given(data=st.data())
def test_missing_is_neutral_and_company_does_not_matter(network: ContractNetwork, data: st.DataObject) -> None:
    features = data.draw(rows_of(network.spec.features))
    answers = predict(network, features)
    assert_array_equal(answers, predict(network, fill_neutral(features)))
    order = np.random.default_rng(len(features)).permutation(len(features))
    assert_allclose(predict(network, features[order]), answers[order], atol=1e-6, rtol=0)
    for row in range(len(features)):
        assert_allclose(predict(network, features[row : row + 1]), answers[row : row + 1], atol=1e-6, rtol=0)


@settings(max_examples=25)
@given(hnp.arrays(np.float32, (3, 45), elements=st.floats(allow_nan=True, allow_infinity=True, width=32)))
def test_absurd_numbers_give_the_answer_of_the_border(features: np.ndarray) -> None:
    clipped = np.where(np.isnan(features), np.nan, np.clip(features, 0, 1))
    answers = predict(NETWORKS[1], features)
    assert np.isfinite(answers).all()
    assert_array_equal(answers, predict(NETWORKS[1], clipped))


def test_members_are_separate_networks_in_one_graph() -> None:
    together = NETWORKS[2]
    features = np.random.default_rng(1).random((50, 45)).astype(np.float32)
    singles = []
    for member in range(3):
        alone = build(default_spec("outcome"), 0)
        with torch.no_grad():
            for name in ("weights", "biases"):
                for mine, theirs in zip(getattr(alone, name), getattr(together, name), strict=True):
                    mine.copy_(theirs[member].reshape(mine.shape))
            for name in ("centre", "scale", "constant", "varies"):
                getattr(alone, name).copy_(getattr(together, name))
        singles.append(predict(alone, features, raw=True))
    assert np.std(singles, axis=0).min() > 0
    assert_allclose(predict(together, features, raw=True), np.mean(singles, axis=0), atol=1e-5)


def test_scaling_against_numpy_and_constant_columns() -> None:
    rng = np.random.default_rng(8)
    features = rng.beta(2, 3, (70_000, 39)).astype(np.float32)
    features[:, 30] = np.nan  # missing everywhere
    features[:, 31] = 0.25  # the same everywhere
    network = build(default_spec("calling_score", emphasis=2.0))
    fit_scaling(network, torch.tensor(features))
    x = fill_neutral(features.astype(float))
    similarity = 1 - np.abs(x[:, :12] - x[:, 12:24])
    inputs = np.column_stack([x, similarity, similarity.mean(1), x[:, 24:34].mean(1), x[:, 34:39].mean(1)])
    spread = inputs.std(axis=0)
    spread[[30, 31]] = 1
    spread[-GROUP_MEANS:] /= 2
    assert_allclose(network.centre.numpy(), inputs.mean(axis=0), atol=1e-6)
    assert_allclose(network.scale.numpy(), spread, rtol=1e-4)
    assert set(np.flatnonzero(~network.varies.numpy())) == {30, 31}
    changed = features[:50].copy()
    changed[:, [30, 31]] = rng.random((50, 2))
    assert_array_equal(predict(network, changed), predict(network, features[:50]))
    changed[:, 32] = 1 - changed[:, 32]
    assert np.abs(predict(network, changed) - predict(network, features[:50])).max() > 1e-4


def test_the_reference_sees_features_only() -> None:
    spec = reference_spec("calling_score")
    assert (spec.interactions, spec.inputs, spec.hidden) == (False, 39, (128, 64))
    network = build(spec, seed=2)
    x = torch.rand(5, 39)
    assert torch.equal(network.derive(x), x)
    assert len(DERIVED) == default_spec("outcome").inputs - 45


def test_sizes_are_those_of_the_published_networks() -> None:
    shapes = {
        model: [tuple(weight.shape) for weight in build(default_spec(model)).weights]
        for model in ("calling_score", "outcome")
    }
    assert [shape[1] for shape in shapes["calling_score"]] == [128, 64, 1]
    assert [shape[1] for shape in shapes["outcome"]] == [128, 64, 32, 1]
    assert_array_equal(build(default_spec("outcome")).neutral.numpy(), NEUTRAL.astype(np.float32))
    assert len(FEATURE_NAMES) == default_spec("outcome").features


def test_seeds_name_networks_and_leave_the_session_alone() -> None:
    torch.manual_seed(123)
    first = torch.rand(1)
    torch.manual_seed(123)
    one, same, other = (build(default_spec("calling_score"), seed) for seed in (5, 5, 6))
    assert torch.equal(torch.rand(1), first)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.weights[0], other.weights[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "magic"}, "model is 'magic'"),
        ({"features": 12}, "features is 12"),
        ({"hidden": ()}, "hidden is \\(\\)"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"emphasis": 0.0}, "emphasis is 0.0"),
        ({"members": 0}, "members is 0"),
    ],
)
def test_specifications_that_make_no_sense(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        NetworkSpec(**{"model": "calling_score", "features": 39, "hidden": (128, 64), **changes})  # type: ignore[arg-type]


def test_predict_keeps_the_mode_and_accepts_nothing() -> None:
    network = build(NetworkSpec("calling_score", 39, (8,), dropout=0.5)).train()
    features = np.full((4, 39), 0.4)
    assert_array_equal(predict(network, features), predict(network, features))
    assert network.training
    assert predict(network, features[:0]).shape == (0,)
    with pytest.raises(InputError, match="reads rows of 39 features"):
        predict(network, np.zeros((2, 45)))
    with pytest.raises(InputError, match="must be finite"):
        set_calibration(network, 1.0, math.inf)
