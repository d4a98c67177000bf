"""Allocation that learns: exact probabilities, floors, late outcomes, replayable draws, honest estimates afterwards."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import integrate, stats
from scipy.special import betaln

from calling_ai.core.errors import InputError, InputTypeError, RefusedError
from calling_ai.experiments.allocation import (
    RULES,
    Bandit,
    Tally,
    adaptive_estimates,
    adaptive_mean,
    bandit_log,
    beta_best,
    epsilon_greedy,
    naive_mean,
    normal_best,
    rehearse,
    tally,
    thompson,
    with_floor,
)

ARMS = ("a", "b", "c")


# ------------------------------------------------------------------------------------------------ exact probabilities


def finite_sum(a: int, b: int, c: int, d: int) -> float:
    """Return P(Beta(c, d) > Beta(a, b)) for whole numbers, by its finite sum."""
    terms = [math.exp(betaln(a + i, b + d) - math.log(d + i) - betaln(1 + i, d) - betaln(a, b)) for i in range(c)]
    return math.fsum(terms)


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 400), st.integers(1, 400))
def test_two_beta_arms_are_exact(a: int, b: int, c: int, d: int) -> None:
    found = beta_best(np.array([a, c]), np.array([b, d]))
    assert_allclose(found[1], finite_sum(a, b, c, d), atol=1e-7)
    assert_allclose(found.sum(), 1, rtol=1e-12)


@pytest.mark.parametrize("good", [(1, 1, 1), (3, 4, 9), (500, 520, 40), (2, 300, 7), (1, 1, 2000)])
def test_three_arms_agree_with_adaptive_quadrature(good: tuple[int, ...]) -> None:
    bad = (2, 30, 9)
    found = beta_best(np.array(good, float), np.array(bad, float))
    for arm in range(3):
        others = [other for other in range(3) if other != arm]

        def density(x: float, arm: int = arm, others: list[int] = others) -> float:
            return stats.beta.pdf(x, good[arm], bad[arm]) * math.prod(
                stats.beta.cdf(x, good[o], bad[o]) for o in others
            )

        points = sorted({stats.beta.mean(g, b) for g, b in zip(good, bad, strict=True)})
        expected = integrate.quad(density, 0, 1, points=points, limit=400)[0]
        assert_allclose(found[arm], expected, atol=1e-6)


@given(st.lists(st.tuples(st.floats(-2, 2), st.floats(0.01, 3)), min_size=2, max_size=5))
def test_normal_arms_add_up_and_follow_a_shift(arms: list[tuple[float, float]]) -> None:
    mean, spread = np.array(arms).T
    found = normal_best(mean, spread)
    assert_allclose(found.sum(), 1, rtol=1e-9)
    assert ((found >= 0) & (found <= 1)).all()
    assert_allclose(normal_best(mean + 7, spread), found, atol=1e-9)
    assert_allclose(normal_best(mean[::-1], spread[::-1])[::-1], found, atol=1e-9)
    far = normal_best(np.append(mean, -100.0), np.append(spread, 0.5))
    assert_allclose(far[:-1], found, atol=1e-5)


def test_many_runs_at_once_equal_one_at_a_time() -> None:
    rng = np.random.default_rng(0)
    good, bad = rng.integers(1, 90, (7, 4)), rng.integers(1, 90, (7, 4))
    assert_allclose(beta_best(good, bad), [beta_best(one, other) for one, other in zip(good, bad)], rtol=1e-12)


# ------------------------------------------------------------------------------------------------------ rules, floors


def known(*pairs: tuple[int, int]) -> Tally:
    """Return a tally from positives and outcomes."""
    good, count = np.array(pairs, float).T
    return Tally(ARMS[: len(pairs)], count, good, good)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=2, max_size=3), st.floats(0, 0.33))
def test_every_arm_keeps_its_floor(pairs: list[tuple[int, int]], floor: float) -> None:
    so_far = known(*((good, good + bad) for good, bad in pairs))
    for found in (thompson(so_far), epsilon_greedy(so_far, 0.2)):
        raised = with_floor(found, floor)
        assert_allclose(raised.sum(), 1, rtol=1e-9)
        assert (raised >= floor - 1e-12).all() and (
            np.argsort(raised, kind="stable") == np.argsort(found, kind="stable")
        ).any()


def test_rules_do_what_they_say() -> None:
    so_far = known((10, 100), (30, 100), (30, 100))
    assert_allclose(epsilon_greedy(so_far, 0.3), [0.1, 0.45, 0.45])
    assert_allclose(epsilon_greedy(known((1, 10), (0, 0)), 0.0), [0, 1]), "an arm without outcomes is tried first"
    assert_allclose(thompson(known((0, 0), (0, 0), (0, 0))), [1 / 3] * 3)
    numbers = Tally(("a", "b"), np.array([50.0, 50.0]), np.array([500.0, 600.0]), np.array([5500.0, 7500.0]))
    expected = stats.norm.cdf((12 - 10) / math.sqrt((110 - 100) / 49 + (150 - 144) / 49))
    assert_allclose(thompson(numbers, shares=False)[1], expected, rtol=1e-9)
    assert_allclose(thompson(Tally(("a", "b"), np.array([1.0, 9]), np.zeros(2), np.zeros(2)), shares=False), [0.5, 0.5])


def test_draws_follow_the_probabilities_and_can_be_replayed() -> None:
    bandit = Bandit("b", "salt", {"a": 1, "b": 2, "c": 3}, floor=0.1)
    users = [f"user {index}" for index in range(20_000)]
    so_far = known((10, 100), (12, 100), (14, 100))
    first = bandit.allocate(users, so_far, 3)
    counts = [(first.arm == arm).sum() for arm in ARMS]
    assert stats.chisquare(counts, [20_000 * first.probabilities[arm] for arm in ARMS]).pvalue > 1e-4
    assert_array_equal(bandit.allocate(users[::-1], so_far, 3).arm[::-1], first.arm)
    assert_allclose(first.share, [first.probabilities[arm] for arm in first.arm])
    other = bandit.allocate(users, so_far, 4)
    table = [[((first.arm == one) & (other.arm == two)).sum() for one in ARMS] for two in ARMS]
    assert stats.chi2_contingency(table).pvalue > 1e-4, "batches are independent draws"


@given(st.lists(st.tuples(st.sampled_from(ARMS), st.floats(0, 1) | st.just(math.nan)), max_size=40), st.randoms())
def test_late_and_shuffled_outcomes_give_the_same_tally(rows: list[tuple[str, float]], random: Any) -> None:
    shuffled = random.sample(rows, len(rows))
    one, other = (tally(ARMS, [arm for arm, _ in order], [value for _, value in order]) for order in (rows, shuffled))
    assert_array_equal(one.count, other.count)
    assert_allclose(one.total, other.total)
    assert one.count.sum() == sum(not math.isnan(value) for _, value in rows)


# -------------------------------------------------------------------------------------------------- honest inference


def test_scores_from_sums_equal_scores_row_by_row() -> None:
    rng = np.random.default_rng(2)
    chances = [dict(zip(ARMS, row, strict=True)) for row in rng.dirichlet([2, 2, 2], 6)]
    batch = np.repeat(np.arange(6), 40)
    arm = np.array([rng.choice(ARMS, p=list(chances[b].values())) for b in batch], dtype=object)
    reward = rng.normal(size=240)
    log = bandit_log(ARMS, batch, arm, reward, chances)
    guess = np.zeros((6, 3))
    for b, k in itertools.product(range(6), range(3)):
        past = batch < b
        mine = past & (arm == ARMS[k])
        guess[b, k] = reward[mine].mean() if mine.any() else (reward[past].mean() if past.any() else 0.0)
    chance = np.array([[item[name] for name in ARMS] for item in chances])

    def score(k: int) -> np.ndarray:
        return guess[batch, k] + (arm == ARMS[k]) / chance[batch, k] * (reward - guess[batch, k])

    for k, control in ((1, None), (2, 0)):
        terms = score(k) - (0 if control is None else score(control))
        level = chance[batch, k] if control is None else 1 / (1 / chance[batch, k] + 1 / chance[batch, control])
        h = np.sqrt(level)
        value = (h * terms).sum() / h.sum()
        error = math.sqrt((h**2 * (terms - value) ** 2).sum()) / h.sum()
        assert_allclose(adaptive_mean(log, k, control), (value, error), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_the_naive_mean_is_biased_and_the_weighted_one_covers(rule: str) -> None:
    cases = {"equal": (0.3, 0.3, 0.3), "one better": (0.25, 0.3, 0.35), "two good": (0.45, 0.5, 0.5)}
    print(f"\n{rule}, 600 bandits each: bias, root mean square error, coverage of nominally 95 % (arms | differences)")
    for case, means in cases.items():
        log = rehearse(dict(zip(ARMS, means, strict=True)), rule=rule, floor=0.05, delay=1, runs=600, seed=5)
        seen = {}
        for name, estimate in (("plain mean", naive_mean), ("weighted AIPW", adaptive_mean)):
            arms = [estimate(log, arm) for arm in range(3)]
            pairs = [estimate(log, arm, 0) for arm in (1, 2)]
            bias = np.mean([value.mean() - mean for (value, _), mean in zip(arms, means, strict=True)])
            error = math.sqrt(
                np.mean([((value - mean) ** 2).mean() for (value, _), mean in zip(arms, means, strict=True)])
            )
            covered = [
                np.mean(np.abs(value - mean) < 1.96 * spread) for (value, spread), mean in zip(arms, means, strict=True)
            ]
            differences = [
                np.mean(np.abs(value - (means[arm] - means[0])) < 1.96 * spread)
                for (value, spread), arm in zip(pairs, (1, 2), strict=True)
            ]
            seen[name] = bias
            rates = (
                " ".join(f"{rate:.3f}" for rate in covered) + " | " + " ".join(f"{rate:.3f}" for rate in differences)
            )
            print(f"  {case:11} {name:14} {bias:+.4f} {error:.4f} {rates}")
            if name == "weighted AIPW":
                assert min(*covered, *differences) > 0.905
        assert seen["plain mean"] < -0.002 and abs(seen["weighted AIPW"]) < 0.75 * abs(seen["plain mean"])


def test_a_bandit_earns_more_than_an_equal_split() -> None:
    truth = {"a": 0.2, "b": 0.25, "c": 0.35}
    earned = {rule: rehearse(truth, rule=rule, runs=300, delay=2) for rule in (*RULES, "equal")}
    means = {rule: log.total.sum() / log.count.sum() for rule, log in earned.items()}
    assert means["thompson"] > means["equal"] + 0.03 and means["epsilon greedy"] > means["equal"] + 0.03
    assert_allclose(means["equal"], np.mean(list(truth.values())), atol=0.003)
    assert (earned["thompson"].probability >= 0.05 - 1e-12).all()
    (
        assert_allclose(earned["thompson"].probability[:, :3], 1 / 3, atol=1e-9),
        "nothing is known in the first three batches",
    )


def test_few_outcomes_are_refused() -> None:
    log = bandit_log(ARMS, [0] * 300, list(ARMS) * 100, [1.0, 0, 1] * 100, [dict.fromkeys(ARMS, 1 / 3)])
    with pytest.raises(
        RefusedError, match="nobody can tell what a is worth: it has 100 outcomes, 100 of them positive"
    ):
        adaptive_estimates(log)
    numbers = bandit_log(ARMS, [0] * 90, list(ARMS) * 30, np.arange(90) / 7, [dict.fromkeys(ARMS, 1 / 3)])
    with pytest.raises(RefusedError, match="at least 40 are needed"):
        adaptive_estimates(numbers)
    assert [item.arm for item in adaptive_estimates(numbers, "b", fewest=10)] == list(ARMS)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: Bandit("b", "s", {"a": 1}), "at least two arms"),
        (lambda: Bandit("b", "", {"a": 1, "b": 2}), "salt of bandit b"),
        (lambda: Bandit("b", "s", {"a": 1, "b": 2}, floor=0.6), "floor is 0.6"),
        (lambda: Bandit("b", "s", {"a": 1, "b": 2}, epsilon=2), "epsilon of bandit b is 2"),
        (lambda: Bandit("b", "s", {"a": 1, "b": 2}, rule="ucb"), "rule of bandit b is 'ucb'"),
        (
            lambda: Bandit("b", "s", {"a": 1, "b": 2}).probabilities(known((0, 1), (0, 1), (0, 1))),
            "known has the arms a, b, c",
        ),
        (lambda: tally(ARMS, ["d"], [1]), "arm is 'd'"),
        (lambda: tally(ARMS, ["a"], [1, 2]), "must agree"),
        (lambda: tally(ARMS, ["a"], [math.inf]), "is infinite"),
        (lambda: thompson(Tally(("a", "b"), np.ones(2), np.array([3.0, 0]), np.array([9.0, 0]))), "outside of"),
        (lambda: epsilon_greedy(known((1, 2), (1, 2)), 1.5), "epsilon is 1.5"),
        (lambda: bandit_log(ARMS, [2], ["a"], [1], [dict.fromkeys(ARMS, 1 / 3)]), "batch reaches from 2"),
        (lambda: bandit_log(ARMS, [0], ["a"], [1], [{"a": 0.5, "b": 0.2, "c": 0.2}]), "add up to 1"),
        (lambda: rehearse({"a": 1.2, "b": 0}), "lie in"),
        (lambda: rehearse({"a": 0.2, "b": 0}, rule="x"), "rule is 'x'"),
        (lambda: adaptive_mean(rehearse({"a": 0.2, "b": 0.1}, runs=2), 0, weights="x"), "weights is 'x'"),
        (lambda: adaptive_estimates(rehearse({"a": 0.2, "b": 0.1}, runs=2)), "log holds 2 runs"),
    ],
)
def test_bad_input_is_refused(call: Any, why: str) -> None:
    with pytest.raises((InputError, InputTypeError), match=why):
        call()
