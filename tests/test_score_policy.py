"""The policy against an oracle of the decision rule, and the propensities against simulation."""

import hashlib
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from calling_ai.core.errors import InputError
from calling_ai.core.records import Estimate
from calling_ai.score.policy import WEIGHTS, Decisions, Policy, decide, earned_weight, hybrid_scores, uniforms

NAN = math.nan
WORD = 2**64
GAMMA = 0x9E3779B97F4A7C15


def mix(value: int) -> int:
    """Return one step of SplitMix64 (Steele, Lea, Flood 2014) in plain integers."""
    value = (value + GAMMA) % WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % WORD
    return value ^ (value >> 31)


def uniform(item: int | str, seed: int) -> float:
    """Return the uniform number of one identifier in plain Python."""
    if isinstance(item, str):
        bits = int.from_bytes(hashlib.blake2b(f"{seed}:{item}".encode(), digest_size=8).digest(), "little")
    else:
        bits = mix((item % WORD) ^ mix(seed % WORD))
    return (bits >> 11) / 2**53


def decide_one(
    formula: float,
    network: float,
    probability: float,
    trend: list[float],
    refused: bool,
    item: int | str,
    policy: Policy,
) -> dict[str, Any]:
    """Apply the rule to one row, as a reader of the description would; NaN is a model that gave nothing."""
    weight = 0.0 if math.isnan(network) else policy.weight
    hybrid = formula if weight == 0 else (1 - weight) * formula + weight * network
    emerging, community, cultural, life = [0.0 if math.isnan(part) else part for part in trend]
    boost = min(max(0.30 * emerging + 0.30 * community + 0.20 * cultural + 0.20 * life, -0.1), 0.2)
    boosted = min(max(hybrid * (1 + boost), 0.0), 1.0)
    if math.isnan(probability):
        adjusted, choice = boosted, boosted >= policy.threshold
    else:
        adjusted = boosted * probability
        choice = probability > policy.gate and adjusted >= policy.threshold
    explored = uniform(item, policy.seed) < policy.exploration
    propensity = 1 - policy.exploration if choice else policy.exploration
    return {
        "hybrid": hybrid,
        "boosted": boosted,
        "calling_score": adjusted,
        "weight": weight,
        "called": not refused and choice != explored,
        "propensity": 0.0 if refused else propensity,
        "explored": explored and not refused,
    }


HALF = st.floats(0, 0.5)
UNIT = st.floats(0, 1)
POLICY = st.builds(Policy, weight=HALF, gate=UNIT, threshold=UNIT, exploration=HALF, seed=st.integers(0, 2**63))
ITEM = st.one_of(st.integers(-(2**63), 2**63 - 1))
TREND = st.lists(st.one_of(st.just(NAN), st.floats(-1, 1)), min_size=4, max_size=4)
ROW = st.tuples(UNIT, st.one_of(st.just(NAN), UNIT), st.one_of(st.just(NAN), UNIT), TREND, st.booleans())


def columns(rows: list[tuple]) -> dict[str, np.ndarray]:
    """Return rows of the oracle as the arguments of `decide`."""
    formula, network, probability, trend, refused = zip(*rows)
    return {
        "formula_score": np.array(formula),
        "network_score": np.array(network),
        "outcome_probability": np.array(probability),
        "trend": np.array(trend),
        "refused": np.array(refused),
    }


@given(st.lists(st.tuples(ROW, ITEM), min_size=1, max_size=8), POLICY, st.booleans())
def test_every_row_agrees_with_the_oracle(pairs: list[tuple], policy: Policy, texts: bool) -> None:
    rows, items = [pair[0] for pair in pairs], [f"decision-{pair[1]}" if texts else pair[1] for pair in pairs]
    found = decide(**columns(rows), policy=policy, decision_ids=items)
    for index, (row, item) in enumerate(zip(rows, items)):
        expected = decide_one(*row, item, policy)
        close_call = abs(expected["calling_score"] - policy.threshold) < 1e-12
        for name, value in expected.items():
            got = getattr(found, name)[index]
            if name in ("hybrid", "boosted", "calling_score", "weight"):
                assert_allclose(got, value, rtol=1e-12, atol=1e-15, err_msg=name)
            elif name == "explored" or not close_call:
                assert got == value, name


@pytest.mark.parametrize(
    ("formula", "probability", "called"),
    [
        (0.70, NAN, True),  # the threshold counts as reached
        (math.nextafter(0.70, 0), NAN, False),
        (1.0, 0.70, False),  # the gate must be exceeded, though the score is 0.70
        (1.0, math.nextafter(0.70, 1), True),
        (0.70, 1.0, True),
        (math.nextafter(0.70, 0), 1.0, False),
        (0.9, 0.75, False),  # 0.675
        (0.95, 0.75, True),  # 0.7125
        (1.0, 0.0, False),
        (0.0, 1.0, False),
    ],
)
def test_the_gate_is_strict_and_the_threshold_inclusive(formula: float, probability: float, called: bool) -> None:
    policy = Policy(exploration=0)
    found = decide(np.array([formula]), None, np.array([probability]), policy=policy, decision_ids=[0])
    assert found.called.tolist() == [called] and found.propensity.tolist() == [float(called)]


def test_a_gate_of_one_refuses_all_and_a_threshold_of_zero_takes_all() -> None:
    ones = np.ones(3)
    assert not decide(ones, ones, ones, policy=Policy(gate=1, exploration=0), decision_ids=[1, 2, 3]).called.any()
    found = decide(np.zeros(3), policy=Policy(threshold=0, exploration=0), decision_ids=[1, 2, 3])
    assert found.called.all()


def test_missing_outputs_fall_back_row_by_row() -> None:
    rng = np.random.default_rng(0)
    formula, network, probability = rng.random((3, 400))
    network[::2], probability[::3] = NAN, NAN
    policy = Policy(weight=0.4)
    found = decide(formula, network, probability, policy=policy, decision_ids=np.arange(400))
    alone = decide(formula, policy=policy, decision_ids=np.arange(400))
    both = np.isnan(network) & np.isnan(probability)
    for name in ("hybrid", "boosted", "calling_score", "weight", "called", "propensity", "explored"):
        assert_array_equal(getattr(found, name)[both], getattr(alone, name)[both], err_msg=name)
    assert_array_equal(found.hybrid[::2], formula[::2])
    assert_array_equal(found.weight, np.where(np.isnan(network), 0, 0.4))
    assert_array_equal(found.calling_score[::3], found.boosted[::3])
    assert_array_equal(alone.hybrid, formula)
    none = np.full(400, NAN)
    empty = decide(formula, none, none, policy=policy, decision_ids=np.arange(400), trend=np.full((400, 4), NAN))
    assert_array_equal(empty.calling_score, alone.calling_score)
    assert_array_equal(empty.called, alone.called)


def test_one_bad_row_changes_no_other() -> None:
    rng = np.random.default_rng(1)
    formula, network, probability = rng.random((3, 1000))
    trend, ids, policy = rng.uniform(-1, 1, (1000, 4)), np.arange(1000), Policy(weight=0.3)
    whole = decide(formula, network, probability, policy=policy, decision_ids=ids, trend=trend)
    for spoilt in (network, probability):
        spoilt[500] = NAN
    trend[500] = NAN
    again = decide(formula, network, probability, policy=policy, decision_ids=ids, trend=trend)
    others = np.arange(1000) != 500
    for name in whole.to_dict():
        assert_array_equal(getattr(again, name)[others], getattr(whole, name)[others], err_msg=name)


def test_one_row_equals_the_batch_in_every_bit() -> None:
    rng = np.random.default_rng(2)
    formula, network, probability = rng.random((3, 500))
    trend, policy = rng.uniform(-0.4, 0.4, (500, 4)), Policy(weight=0.3, exploration=0.2)
    batch = decide(formula, network, probability, policy=policy, decision_ids=np.arange(500), trend=trend)
    for index in range(500):
        row = slice(index, index + 1)
        one = decide(
            formula[row], network[row], probability[row], policy=policy, decision_ids=[index], trend=trend[row]
        )
        for name, values in batch.to_dict().items():
            assert getattr(one, name)[0] == values[index], name


def test_the_weight_moves_the_hybrid_between_formula_and_network() -> None:
    formula, network = np.array([0.2, 0.8]), np.array([0.6, 0.6])
    assert_array_equal(hybrid_scores(formula, network).hybrid, formula)
    assert_allclose(hybrid_scores(formula, network, weight=0.5).hybrid, [0.4, 0.7], rtol=1e-15)
    assert_allclose(hybrid_scores(formula, network, weight=0.3).hybrid, [0.32, 0.74], rtol=1e-15)


def test_trends_by_hand() -> None:
    trend = np.array([[1, 1, 1, 1], [-1, -1, -1, -1], [0.1, 0.2, 0.3, -0.4], [NAN] * 4])
    found = hybrid_scores(np.full(4, 0.9), trend=trend)
    assert_allclose(found.boosted, [1.0, 0.81, 0.963, 0.9], rtol=1e-14)


# Chances of a false alarm: each bound below is 4.9 standard errors, about one in a million, and the seeds are fixed.
WIDE = 4.9


@pytest.mark.parametrize("exploration", [0.0, 0.02, 0.25, 0.5])
@pytest.mark.parametrize("texts", [False, True])
def test_propensities_are_the_true_probabilities_of_a_call(exploration: float, texts: bool) -> None:
    rows = 50_000 if texts else 400_000
    ids: Any = [f"decision-{index}" for index in range(rows)] if texts else np.arange(rows)
    scores = np.random.default_rng(3).random(rows)
    policy = Policy(threshold=0.6, exploration=exploration, seed=11)
    found = decide(scores, policy=policy, decision_ids=ids)
    chosen = scores >= 0.6
    for group, expected in ((chosen, 1 - exploration), (~chosen, exploration)):
        assert set(np.unique(found.propensity[group])) == {expected}
        error = math.sqrt(expected * (1 - expected) / group.sum())
        assert abs(found.called[group].mean() - expected) <= WIDE * error
    assert_array_equal(found.explored, found.called != chosen)
    # Weighting by the propensity gives back the value of the opposite policy: what the log is kept for.
    if 0 < exploration < 0.5:
        worth = np.where(found.called, 1.0, 0.0) * (~chosen)
        estimate = (worth / found.propensity).mean()
        assert abs(estimate - (~chosen).mean()) < WIDE * (worth / found.propensity).std() / math.sqrt(rows)


def test_exploration_is_independent_over_seeds_and_neighbours() -> None:
    ids = np.arange(200_000)
    first, second = uniforms(ids, 0), uniforms(ids, 1)
    bound = WIDE / math.sqrt(len(ids))
    for left, right in ((first, second), (first[1:], first[:-1]), (first[2:], first[:-2]), (second[64:], second[:-64])):
        assert abs(np.corrcoef(left, right)[0, 1]) < bound


@pytest.mark.parametrize("start", [0, -100_000, 2**40, 2**62])
@pytest.mark.parametrize("seed", [0, 1, 2026])
def test_numbers_are_uniform(start: int, seed: int) -> None:
    counts = np.bincount((uniforms(np.arange(start, start + 200_000), seed) * 256).astype(int), minlength=256)
    statistic = ((counts - 200_000 / 256) ** 2 / (200_000 / 256)).sum()
    assert abs(statistic - 255) < WIDE * math.sqrt(2 * 255), "chi-square with 255 degrees of freedom"
    assert len(counts) == 256


# Outputs of SplitMix64 as published with its reference implementation (S. Vigna, splitmix64.c) and in test suites.
PUBLISHED = {
    0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B],
    1234567: [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ],
}


@pytest.mark.parametrize("start", PUBLISHED)
def test_integers_follow_the_published_splitmix64(start: int) -> None:
    states = [(start + step * GAMMA) % WORD for step in range(5)]
    assert [mix(state) for state in states] == PUBLISHED[start], "the oracle itself follows the publication"
    for seed in (0, 7):
        # An identifier is first joined with the mixed seed; take that away to feed the published states.
        ids = np.array([state ^ mix(seed) for state in states], dtype=np.uint64)
        assert uniforms(ids, seed).tolist() == [(output >> 11) / 2**53 for output in PUBLISHED[start]]


@given(st.lists(ITEM, min_size=1, max_size=20), st.integers(0, 2**64 - 1))
def test_integers_agree_with_plain_python(items: list[int], seed: int) -> None:
    found = uniforms(items, seed)
    assert found.tolist() == [uniform(item, seed) for item in items]
    assert ((found >= 0) & (found < 1)).all()


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"))


@given(st.lists(TEXT, min_size=1, max_size=20), st.integers(0, 2**63))
def test_texts_agree_with_plain_python(items: list[str], seed: int) -> None:
    expected = [uniform(item, seed) for item in items]
    assert uniforms(items, seed).tolist() == expected
    assert uniforms(np.array(items, dtype=object), seed).tolist() == expected


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint32, np.uint64])
def test_the_width_of_an_integer_does_not_matter(dtype: Any) -> None:
    assert uniforms(np.arange(100, dtype=dtype)).tolist() == [uniform(index, 0) for index in range(100)]


@pytest.mark.parametrize("ids", [[1.0, 2.0], [1.0, NAN], [True, False], [None, "a"]], ids=str)
def test_identifiers_are_integers_or_texts(ids: Any) -> None:
    """A column of integers that a join has turned into floats must not get other numbers in silence."""
    with pytest.raises(InputError, match="integers or texts"):
        uniforms(ids)


def test_numbers_that_no_machine_may_change() -> None:
    """Frozen values: logs written today must replay in ten years."""
    assert uniforms([0, 1, -1, 2**62], 0).tolist() == [uniform(item, 0) for item in (0, 1, -1, 2**62)]
    assert uniforms([0, 1], 0).tolist() == [0.6524484863740322, 0.03401170130434639]
    assert uniforms(["a", "decision-1"], 5).tolist() == [0.3422947664716969, 0.5530078504542856]


def test_a_replay_gives_every_decision_again_in_any_order() -> None:
    rng = np.random.default_rng(4)
    formula, network, probability = rng.random((3, 5000))
    policy, ids = Policy(weight=0.3, threshold=0.3, gate=0.3, exploration=0.1, seed=5), rng.permutation(10**6)[:5000]
    first = decide(formula, network, probability, policy=policy, decision_ids=ids)
    order = rng.permutation(5000)
    again = decide(formula[order], network[order], probability[order], policy=policy, decision_ids=ids[order])
    for name, values in first.to_dict().items():
        assert_array_equal(getattr(again, name), values[order], err_msg=name)
    other = decide(formula, network, probability, policy=Policy(**{**policy.to_dict(), "seed": 6}), decision_ids=ids)
    assert (other.explored != first.explored).any()


def test_a_user_who_refused_is_never_called() -> None:
    rows = 20_000
    refused = np.random.default_rng(6).random(rows) < 0.3
    policy = Policy(threshold=0.5, exploration=0.5)
    scores = np.random.default_rng(7).random(rows)
    found = decide(scores, policy=policy, decision_ids=np.arange(rows), refused=refused)
    free = decide(scores, policy=policy, decision_ids=np.arange(rows))
    assert not found.called[refused].any() and not found.explored[refused].any()
    assert (found.propensity[refused] == 0).all()
    for name in ("called", "explored", "propensity", "calling_score"):
        assert_array_equal(getattr(found, name)[~refused], getattr(free, name)[~refused])
    assert found.called[~refused].any()


@pytest.mark.parametrize(
    ("name", "bad"),
    [(name, bad) for name in ("weight", "gate", "threshold", "exploration") for bad in (-0.01, 1.01, NAN, math.inf)]
    + [("weight", 0.51), ("exploration", 0.51)],
)
def test_a_policy_outside_its_rules_is_refused(name: str, bad: float) -> None:
    with pytest.raises(InputError, match=rf"{name} is .*: it must lie in \[0, "):
        Policy(**{name: bad})


def test_a_policy_takes_the_ends_of_its_ranges() -> None:
    Policy(0, 0, 0, 0)
    Policy(0.5, 1, 1, 0.5)
    assert Policy().to_dict() == {"weight": 0.0, "gate": 0.70, "threshold": 0.70, "exploration": 0.02, "seed": 0}


def test_a_seed_that_cannot_seed_is_refused_when_the_policy_is_made() -> None:
    with pytest.raises(InputError, match="seed is -1"):
        Policy(seed=-1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("decision_ids", [1]),
        ("network_score", np.array([0.5])),
        ("outcome_probability", np.array([0.5])),
        ("trend", np.zeros((1, 4))),
        ("refused", np.array([True])),
        ("network_score", np.zeros(3)),
    ],
    ids=str,
)
def test_lengths_must_agree(name: str, value: Any) -> None:
    given: dict[str, Any] = {"decision_ids": [1, 2], name: value}
    with pytest.raises(InputError, match=name):
        decide(np.array([0.5, 0.6]), policy=Policy(), **given)


def test_no_rows_give_no_decisions() -> None:
    found = decide(np.array([]), policy=Policy(), decision_ids=np.array([], dtype=int))
    assert isinstance(found, Decisions) and len(found) == 0
    assert len(decide(np.array([]), policy=Policy(), decision_ids=[])) == 0
    assert uniforms([]).shape == (0,)


def test_nothing_is_changed() -> None:
    formula, network, probability = np.random.default_rng(8).random((3, 50))
    network[3] = NAN
    refused = np.zeros(50, dtype=bool)
    before = [formula.copy(), network.copy(), probability.copy(), refused.copy()]
    decide(formula, network, probability, policy=Policy(weight=0.3), decision_ids=np.arange(50), refused=refused)
    for now, then in zip((formula, network, probability, refused), before):
        assert_array_equal(now, then)


def test_a_million_rows_in_one_call() -> None:
    rows = 1_000_000
    formula, network, probability = np.random.default_rng(9).random((3, rows))
    network[::7], probability[::11] = NAN, NAN
    policy = Policy(weight=0.3, gate=0.5, threshold=0.3)
    found = decide(formula, network, probability, policy=policy, decision_ids=np.arange(rows))
    assert len(found) == rows and np.isfinite(found.calling_score).all()
    assert found.calling_score.min() >= 0 and found.calling_score.max() <= 1
    for index in np.random.default_rng(10).integers(0, rows, 300):
        row = (formula[index], network[index], probability[index], [NAN] * 4, False)
        expected = decide_one(*row, int(index), policy)
        assert_allclose(found.calling_score[index], expected["calling_score"], rtol=1e-12)
        assert (found.called[index], found.explored[index]) == (expected["called"], expected["explored"])
    assert "1,000,000" in found._repr_html_()


@given(
    weight=st.floats(0, 0.5),
    ends=st.lists(st.floats(-1, 1), min_size=2, max_size=2).map(sorted),
)
def test_a_weight_moves_one_step_and_only_on_evidence(weight: float, ends: list[float]) -> None:
    gain = Estimate(sum(ends) / 2, *ends)
    found = earned_weight(weight, gain)
    assert found in WEIGHTS and abs(found - weight) <= 0.1 + 1e-9
    if ends[0] > 0:
        assert found > weight or weight >= 0.5 - 1e-9
    elif ends[1] < 0:
        assert found < weight or weight <= 1e-9
    else:
        assert found <= weight + 1e-9
    assert earned_weight(weight, None) <= weight + 1e-9
