"""Several networks in one graph: what is inside is what comes out, in torch and in the file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from calling_ai.core.errors import InputError
from calling_ai.models.ensembles import errors_by_spread, fit_shares, member_answers, single_member
from calling_ai.models.networks import (
    KNOTS,
    ContractNetwork,
    build,
    default_spec,
    predict,
    predict_spread,
    set_calibration,
    set_curve,
)
from calling_ai.models.training import default_options, train

RNG = np.random.default_rng(2)
X = np.where(RNG.random((400, 45)) < 0.1, np.nan, RNG.random((400, 45)))
Y = (RNG.random(400) < np.nan_to_num(X[:, 24], nan=0.5)).astype(float)


def network_of(model: str = "outcome", **changes: object) -> ContractNetwork:
    """Return a small network with weights, calibration and router that do something."""
    network = build(default_spec(model, hidden=(16, 8), members=3, **changes), seed=4)
    set_calibration(network, 0.8, 0.1)
    if network.spec.routed:
        with torch.no_grad():
            network.router.normal_(generator=torch.Generator().manual_seed(1))
    return network


def test_the_whole_is_made_of_its_members() -> None:
    network = network_of()
    for member in range(3):
        assert_allclose(
            predict(single_member(network, member), X), member_answers(network, X)[member], rtol=1e-5, atol=1e-6
        )
    assert_allclose(predict_spread(network, X), member_answers(network, X).std(axis=0), atol=1e-6)


@given(error=st.lists(st.floats(-1, 1), min_size=2, max_size=6))
def test_the_mean_beats_the_members_by_their_variance(error: list[float]) -> None:
    values = np.array(error)
    assert_allclose(values.mean() ** 2, (values**2).mean() - values.var(), atol=1e-12)


def test_a_router_gives_shares_that_sum_to_one_and_read_the_spot_alone() -> None:
    network = network_of(routed=True)
    rows = torch.tensor(X, dtype=torch.float32)
    with torch.no_grad():
        shares = network.member_shares(network.prepare(rows))
        changed = rows.clone()
        changed[:, :12], changed[:, 24:] = 0.9, 0.1
        same = network.member_shares(network.prepare(changed))
    assert_allclose(shares.sum(dim=0), 1, rtol=1e-6)
    assert_allclose(shares, same, atol=1e-6)
    assert float(shares.std(dim=1).max()) > 0.01


def test_members_specialise_by_kind_of_opportunity() -> None:
    """Two kinds of spots with opposite rules: a routed ensemble learns both, and its members differ by kind."""
    rng = np.random.default_rng(3)
    x = np.full((3_000, 45), 0.5)
    x[:, 24:30] = rng.random((3_000, 6))
    x[:, 12] = rng.integers(0, 2, 3_000)
    y = (rng.random(3_000) < np.where(x[:, 12] > 0.5, x[:, 24], 1 - x[:, 24])).astype(float)
    spec = default_spec("outcome", hidden=(8,), members=2, routed=True, dropout=0.0)
    options = default_options("outcome", epochs=20, learning_rate=0.02, penalty=0.0)
    network = train(spec, x[:2_400], y[:2_400], (x[2_400:], y[2_400:]), options=options).network
    with torch.no_grad():
        shares = network.member_shares(network.prepare(torch.tensor(x, dtype=torch.float32)))[0].numpy()
    kind = x[:, 12] > 0.5
    assert abs(shares[kind].mean() - shares[~kind].mean()) > 0.05
    truth = np.where(kind, x[:, 24], 1 - x[:, 24])
    assert np.corrcoef(predict(network, x), truth)[0, 1] > 0.9


def test_shares_lie_on_the_simplex_and_do_not_lose() -> None:
    network = network_of()

    def loss() -> float:
        stated = predict(network, X)
        return float(-(Y * np.log(stated) + (1 - Y) * np.log(1 - stated)).mean())

    before = loss()
    shares = fit_shares(network, X, Y, steps=200)
    assert (shares >= 0).all() and abs(shares.sum() - 1) < 1e-9
    assert loss() <= before + 1e-3
    with pytest.raises(InputError, match="without a router"):
        fit_shares(network_of(routed=True), X, Y)


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("outcome", {"routed": True}),
        ("outcome", {"isotonic": True}),
        ("calling_score", {"spread": True}),
        ("calling_score", {"isotonic": True, "routed": True}),
    ],
)
def test_files_say_what_networks_say(model: str, changes: dict[str, bool], tmp_path: Path) -> None:
    from calling_ai.models.graph import export, verify

    network = network_of(model, **changes)
    if network.spec.isotonic:
        set_curve(network, np.linspace(0.1, 0.9, KNOTS), np.linspace(0.1, 0.9, KNOTS) ** 2)
    features = X[:, : network.spec.features]
    export(network, tmp_path / "model.onnx")
    assert verify(tmp_path / "model.onnx", network, features).largest <= 1e-5
    if network.spec.spread:
        import onnxruntime

        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        assert [item.name for item in session.get_outputs()] == ["network_score", "spread"]
        answers = session.run(None, {"features": features.astype(np.float32)})
        assert_allclose(answers[1], predict_spread(network, features), atol=1e-5)


def test_the_curve_is_an_interpolation() -> None:
    network = network_of(isotonic=True)
    knots, values = np.array([0.0, 0.3, 0.31, 1.0]), np.array([0.2, 0.2, 0.6, 0.9])
    network_plain = network_of()
    network_plain.load_state_dict(network.state_dict(), strict=False)
    set_curve(network, knots, values)
    assert_allclose(predict(network, X), np.interp(predict(network_plain, X), knots, values), atol=1e-5)


def test_a_curve_learned_in_training_is_in_the_network() -> None:
    spec = default_spec("outcome", hidden=(8,), isotonic=True)
    trained = train(spec, X[:300], Y[:300], (X[300:], Y[300:]), options=default_options("outcome", epochs=2))
    assert float(trained.network.start) != 0 or float(trained.network.bends[0]) != 1
    assert_allclose(predict(trained.network, X[300:]).mean(), Y[300:].mean(), atol=0.05)


def test_same_seed_same_bits_for_an_ensemble() -> None:
    spec = default_spec("outcome", hidden=(8,), members=3, routed=True)

    def answers() -> np.ndarray:
        options = default_options("outcome", epochs=3, seed=7)
        return predict(train(spec, X[:300], Y[:300], (X[300:], Y[300:]), options=options).network, X)

    assert_array_equal(answers(), answers())


def test_errors_by_spread_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    prediction, target, users = rng.random(600), rng.random(600), rng.integers(0, 40, 600)
    spread = rng.random(600)
    found = errors_by_spread(prediction, spread, target, users, groups=3, replicates=50)
    order = np.argsort(spread)
    for group in range(3):
        rows = order[group * 200 : (group + 1) * 200]
        assert_allclose(found.error[group], ((prediction[rows] - target[rows]) ** 2).mean())
        assert found.lower[group] <= found.error[group] <= found.upper[group]
    assert not found.last_above_first.excludes_zero
