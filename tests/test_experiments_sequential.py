"""Group sequential designs against published tables, the multivariate normal distribution, and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.stats import multivariate_normal, norm

from calling_ai.core.errors import InputError
from calling_ai.experiments.sequential import (
    Spending,
    crossing,
    exact_boundary,
    futility_boundary,
    peeking_error,
    plan,
    repeated_interval,
    sequential_pvalue,
    spending_boundary,
    stagewise_tail,
    stopped,
)

FAMILIES = ("obrien_fleming", "pocock", "hwang_shih_decani", "power")
# at least a hundredth of the maximum between two looks, as many as six of them
times = st.lists(st.integers(1, 100), min_size=1, max_size=6, unique=True).map(
    lambda found: np.array(sorted(found)) / max(found)
)


@pytest.mark.parametrize(
    ("looks", "error"), [(1, 0.05), (2, 0.0831), (3, 0.1073), (4, 0.1262), (5, 0.1417), (10, 0.1934)]
)
def test_peeking(looks: int, error: float) -> None:
    assert_allclose(peeking_error(looks), error, atol=5e-5)


@pytest.mark.parametrize(
    ("family", "published"),
    [("pocock", [2.1783, 2.2895, 2.3613, 2.4132]), ("obrien_fleming", [1.9774, 2.0040, 2.0243, 2.0401])],
)
def test_exact_boundaries(family: str, published: list[float]) -> None:
    found = [exact_boundary(looks, family=family) for looks in (2, 3, 4, 5)]
    assert_allclose([bound[-1] for bound in found], published, atol=5e-5)
    for looks, bound in zip((2, 3, 4, 5), found, strict=True):
        shape = np.ones(looks) if family == "pocock" else np.sqrt(looks / np.arange(1, looks + 1))
        assert_allclose(bound, bound[-1] * shape, rtol=1e-12)
        assert_allclose(crossing(np.arange(1, looks + 1), bound, -bound).total, 0.05, rtol=1e-9)


def test_exact_boundaries_with_many_looks() -> None:
    for looks, pocock, fleming in ((10, 2.555, 2.087), (20, 2.672, 2.126)):
        found = [exact_boundary(looks, family=family)[-1] for family in ("pocock", "obrien_fleming")]
        assert_allclose(found, [pocock, fleming], atol=6e-4)


@pytest.mark.parametrize(
    ("spending", "alternative", "alpha", "published"),
    [
        (Spending(), "two-sided", 0.05, [2.9626, 1.9686]),
        (Spending(), "two-sided", 0.05, [3.7103, 2.5114, 1.9930]),
        (Spending(), "two-sided", 0.05, [4.3326, 2.9631, 2.3590, 2.0141]),
        (Spending(), "two-sided", 0.05, [4.8769, 3.3570, 2.6803, 2.2898, 2.0310]),
        (Spending("pocock"), "two-sided", 0.05, [2.4380, 2.4268, 2.4102, 2.3966, 2.3860]),
        (Spending("hwang_shih_decani", -4.0), "greater", 0.025, [3.2527, 2.9860, 2.6917, 2.3737, 2.0253]),
    ],
)
def test_spending_boundaries(spending: Spending, alternative: str, alpha: float, published: list[float]) -> None:
    looks = np.arange(1, len(published) + 1) / len(published)
    assert_allclose(spending_boundary(looks, alpha, spending, alternative), published, atol=6e-5)


def by_the_normal_distribution(info: np.ndarray, upper: np.ndarray, lower: np.ndarray, drift: float) -> float:
    """Return the probability to stay inside of all bounds."""
    correlation = np.sqrt(np.minimum.outer(info, info) / np.maximum.outer(info, info))
    law = multivariate_normal(drift * np.sqrt(info), correlation, allow_singular=True)
    return float(law.cdf(upper, lower_limit=lower, rng=np.random.default_rng(0)))


@given(times=times, drift=st.floats(-3, 4), data=st.data())
def test_the_recursion_against_the_multivariate_normal_distribution(
    times: np.ndarray, drift: float, data: st.DataObject
) -> None:
    upper = np.array(data.draw(st.lists(st.floats(0.5, 4), min_size=len(times), max_size=len(times))))
    lower = np.array(data.draw(st.lists(st.floats(-4, 0.4), min_size=len(times), max_size=len(times))))
    found = crossing(times, upper, lower, drift)
    assert_allclose(1 - found.total, by_the_normal_distribution(times, upper, lower, drift), atol=3e-4)
    mirrored = crossing(times, -lower, -upper, -drift)
    assert_allclose([mirrored.upper, mirrored.lower], [found.lower, found.upper], atol=1e-11)


@given(
    times=times,
    family=st.sampled_from(FAMILIES),
    alpha=st.floats(0.001, 0.3),
    sides=st.sampled_from(["two-sided", "greater", "less"]),
)
def test_all_of_alpha_is_spent_and_not_more(times: np.ndarray, family: str, alpha: float, sides: str) -> None:
    spending = Spending(family)
    bound = spending_boundary(times, alpha, spending, sides)
    found = crossing(times, bound, -bound if sides == "two-sided" else None)
    assert_allclose(found.total, alpha, rtol=1e-7)
    side = alpha / (2 if sides == "two-sided" else 1)
    assert_allclose(np.cumsum(found.upper), spending.spent(times, side), rtol=1e-6, atol=1e-12)


@given(times=times, over=st.floats(1.0, 3.0), stretch=st.floats(0.3, 3.0))
def test_over_running_unplanned_looks_and_another_clock(times: np.ndarray, over: float, stretch: float) -> None:
    """The maximum is passed, further looks follow, and information grows in its own way: alpha stays what it was."""
    fractions = np.r_[times[:-1], over, over + 0.5]
    information = fractions**stretch
    bound = spending_boundary(fractions, 0.025, alternative="greater", information=information)
    assert bound[-1] == math.inf  # all was spent at the look before
    assert_allclose(crossing(information, bound).total, 0.025, rtol=1e-7)


@given(times=times)
def test_the_last_look_may_come_early(times: np.ndarray) -> None:
    bound = spending_boundary(0.6 * times, 0.05, final=True)
    assert_allclose(crossing(0.6 * times, bound, -bound).total, 0.05, rtol=1e-7)
    assert bound[-1] < spending_boundary(0.6 * times, 0.05)[-1]


def test_looks_that_add_nothing_cannot_stop() -> None:
    times = [0.3, 0.3, 0.30001, 0.6, 1.0]
    bound = spending_boundary(times, 0.025, alternative="greater")
    assert np.isinf(bound[1:3]).all() and np.isfinite(bound[[0, 3, 4]]).all()
    assert_allclose(bound[[0, 3, 4]], spending_boundary([0.3, 0.6, 1.0], 0.025, alternative="greater"), rtol=1e-9)
    assert_allclose(crossing(times, bound).total, 0.025, rtol=1e-9)


def test_many_looks_are_exact() -> None:
    looks = np.arange(1, 201) / 200
    bound = spending_boundary(looks, 0.025, alternative="greater")
    assert_allclose(crossing(looks, bound).total, 0.025, rtol=1e-8)
    paths = np.cumsum(np.random.default_rng(1).normal(0, 200**-0.5, (20_000, 200)), axis=1) / np.sqrt(looks)
    share = (paths >= bound).any(axis=1).mean()
    assert abs(share - 0.025) < 3 * math.sqrt(0.025 * 0.975 / 20_000)


@given(shape=st.floats(-0.3, 0.7), looks=st.integers(1, 8))
def test_wang_and_tsiatis(shape: float, looks: int) -> None:
    bound = exact_boundary(looks, 0.05, shape)
    assert_allclose(bound / bound[-1], (np.arange(1, looks + 1) / looks) ** (shape - 0.5), rtol=1e-9)
    assert_allclose(crossing(np.arange(1, looks + 1), bound, -bound).total, 0.05, rtol=1e-8)


def test_plans_against_published_inflation_and_against_the_default_of_a_known_package() -> None:
    published = {
        ("pocock", 0.8): 1.228,
        ("pocock", 0.9): 1.206,
        ("obrien_fleming", 0.8): 1.028,
        ("obrien_fleming", 0.9): 1.026,
    }
    for (family, power), inflation in published.items():
        assert_allclose(plan(5, 0.05, power, family, "two-sided").inflation, inflation, atol=1.5e-3)
    made = plan(3, 0.025, 0.9, Spending("hwang_shih_decani", -4.0), futility=Spending("hwang_shih_decani", -2.0))
    assert made.futility is not None
    assert_allclose(
        [made.inflation, *made.upper, *made.futility],
        [1.07, 3.0107, 2.5465, 1.9992, -0.2387, 0.9411, 1.9992],
        atol=1e-3,
    )


@pytest.mark.parametrize("looks", [2, 5, 20])
@pytest.mark.parametrize("alternative", ["two-sided", "greater"])
def test_a_plan_keeps_its_word(looks: int, alternative: str) -> None:
    made = plan(looks, 0.05, 0.8, alternative=alternative)
    assert_allclose(made.power_at(1.0), 0.8, rtol=1e-6)
    assert_allclose(made.power_at(0.0), 0.025 if alternative == "two-sided" else 0.05, rtol=1e-6)
    assert 1 <= made.inflation < 1.08 and made.expected_planned < 1 and made.expected_null <= made.inflation
    paths = np.cumsum(
        np.random.default_rng(2).normal(made.drift / looks, looks**-0.5, (20_000, looks)), axis=1
    ) / np.sqrt(made.fractions)
    crossed = paths >= made.upper if alternative == "greater" else np.abs(paths) >= made.upper
    ends = np.where(crossed.any(axis=1), crossed.argmax(axis=1), looks - 1)
    assert_allclose(made.inflation * made.fractions[ends].mean(), made.expected_planned, rtol=0.01)


def test_futility_is_not_binding() -> None:
    made = plan(4, futility=Spending("hwang_shih_decani", -2.0))
    assert made.futility is not None
    ignored = crossing(made.fractions, made.upper)
    heeded = crossing(made.fractions, made.upper, made.futility)
    assert_allclose(ignored.total, 0.025, rtol=1e-8)
    assert heeded.upper.sum() < 0.025
    assert_allclose(heeded.total, 1.0, rtol=1e-8)  # the bounds meet: everybody is told
    bound = futility_boundary(made.fractions, made.upper, made.drift, 0.1)
    assert_allclose(bound, made.futility, atol=1e-6)
    assert made.expected_null < plan(4).expected_null


def test_after_one_look_nothing_is_adjusted() -> None:
    found = stopped([0.3], [0.1], [1.96])
    assert_allclose(
        [found.effect.value, found.effect.lower, found.effect.upper],
        [0.3, 0.3 - 1.959964 * 0.1, 0.3 + 1.959964 * 0.1],
        rtol=1e-6,
    )
    assert_allclose(found.pvalue, 2 * norm.sf(3), rtol=1e-9)


def test_stages_are_ordered() -> None:
    """Leaving earlier is more extreme, and within a look a higher value is."""
    info, upper = np.arange(1, 4) / 3, np.array([3.0, 2.5, 2.0])
    first = stagewise_tail(np.array([3.0, 4.0]), info[:1], upper[:1])
    second = stagewise_tail(np.array([2.5, 3.0]), info[:2], upper[:2])
    last = stagewise_tail(np.array([1.0, 2.0]), info, upper)
    ordered = [first[1], first[0], second[1], second[0], last[1], last[0]]
    assert ordered == sorted(ordered)
    assert_allclose([first[0], second[0], last[1]], np.cumsum(crossing(info, upper).upper), rtol=1e-9)


@pytest.mark.parametrize("drift", [0.0, 1.5, 3.0])
def test_the_tail_at_the_truth_is_uniform(drift: float) -> None:
    """So intervals cover at their level and estimates are median-unbiased, whenever the experiment stopped."""
    info, rng = np.array([0.2, 0.5, 0.7, 1.0]), np.random.default_rng(7)
    upper = spending_boundary(info, 0.05, Spending("pocock"))
    steps = np.diff(info, prepend=0)
    z = np.cumsum(rng.normal(drift * steps, np.sqrt(steps), (8_000, 4)), axis=1) / np.sqrt(info)
    crossed = np.abs(z) >= upper
    ends = np.where(crossed.any(axis=1), crossed.argmax(axis=1), 3)
    tail = np.zeros(len(z))
    for look in range(4):
        tail[ends == look] = stagewise_tail(
            z[ends == look, look], info[: look + 1], upper[: look + 1], -upper[: look + 1], drift
        )
    for level in (0.025, 0.25, 0.5, 0.9, 0.975):
        assert abs((tail <= level).mean() - level) < 4 * math.sqrt(level * (1 - level) / len(tail))


def test_looks_that_add_nothing_change_no_tail() -> None:
    bound = [3.0, math.inf, math.inf, 2.2]
    one = stagewise_tail(2.0, [0.4, 0.4, 0.40001, 1.0], bound)
    assert_allclose(one, stagewise_tail(2.0, [0.4, 1.0], [3.0, 2.2]), rtol=1e-9)
    assert_allclose(
        stagewise_tail(2.0, [0.5, 1.0, 1.0], [3.0, 2.2, math.inf]), stagewise_tail(2.0, [0.5, 1.0], [3.0, 2.2])
    )


def test_the_interval_inverts_the_tail() -> None:
    bound = spending_boundary([0.3, 0.7], 0.05)
    found = stopped([0.2, 0.31], [0.15, 0.1], bound)
    info = 1 / np.array([0.15, 0.1]) ** 2
    for end, level in ((found.effect.lower, 0.025), (found.effect.value, 0.5), (found.effect.upper, 0.975)):
        assert_allclose(stagewise_tail(3.1, info, bound, -bound, end), level, rtol=1e-6)
    mirrored = stopped([-0.2, -0.31], [0.15, 0.1], bound)
    assert_allclose(
        [-mirrored.effect.upper, -mirrored.effect.value, -mirrored.effect.lower],
        [found.effect.lower, found.effect.value, found.effect.upper],
        rtol=1e-6,
    )
    assert (found.crossed, mirrored.crossed) == ("upper", "lower")
    assert_allclose(mirrored.pvalue, found.pvalue, rtol=1e-6)


def test_less_mirrors_greater() -> None:
    up, down = (
        stopped([0.2, 0.3], [0.12, 0.1], [4.0, 2.0], "greater"),
        stopped([-0.2, -0.3], [0.12, 0.1], [4.0, 2.0], "less"),
    )
    assert_allclose(
        [down.pvalue, -down.effect.upper, -down.effect.lower], [up.pvalue, up.effect.lower, up.effect.upper], rtol=1e-9
    )
    assert (up.crossed, down.crossed) == ("upper", "lower")


def test_an_enormous_effect_has_an_interval() -> None:
    found = stopped([15.0, 7.0], [1.0, 0.7], [20.0, 2.5])
    assert np.isfinite([found.effect.lower, found.effect.value, found.effect.upper]).all() and found.pvalue < 1e-10


@settings(max_examples=20)
@given(times=times, seed=st.integers(0, 10_000), alpha=st.floats(0.001, 0.2))
def test_the_sequential_pvalue_and_the_bound_agree(times: np.ndarray, seed: int, alpha: float) -> None:
    z = np.random.default_rng(seed).normal(1.5, 1.2, len(times))
    crossed = bool((z >= spending_boundary(times, alpha, alternative="greater")).any())
    pvalue = sequential_pvalue(z, times)
    assert crossed == (pvalue <= alpha) or abs(pvalue / alpha - 1) < 1e-4
    if len(times) > 1:
        assert sequential_pvalue(z, times) <= sequential_pvalue(z[:-1], times[:-1]) * (1 + 1e-4)  # it can only fall


def test_the_sequential_pvalue_is_one() -> None:
    """Under no effect it is below any level at most that often, over all looks."""
    looks, rng = np.arange(1, 5) / 4, np.random.default_rng(3)
    z = np.cumsum(rng.normal(0, 0.5, (100, 4)), axis=1) / np.sqrt(looks)
    pvalues = np.array([sequential_pvalue(row, looks, Spending("pocock")) for row in z])
    assert (pvalues <= 0.1).mean() <= 0.1 + 3 * math.sqrt(0.09 / 100)
    assert (pvalues <= 0.5).mean() <= 0.5 + 3 * math.sqrt(0.25 / 100)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: crossing([], 2.0), "information is empty"),
        (lambda: crossing([1, math.nan], 2.0), "positive and finite"),
        (lambda: crossing([0, 1], 2.0), "positive and finite"),
        (lambda: crossing([1, 0.5], 2.0), "information falls from 1 to 0.5 at look 2"),
        (lambda: crossing([1, 2], [2.0]), "upper has 1 bounds for 2 looks"),
        (lambda: crossing([1, 2], [2.0, math.nan]), "upper is missing at look 2"),
        (lambda: crossing([1, 2], 2.0, [3.0, 0.0]), "lower exceeds upper at look 1"),
        (lambda: crossing([1], 2.0, drift=math.inf), "drift is inf"),
        (lambda: peeking_error(0), "looks is 0"),
        (lambda: exact_boundary(0), "positive and finite"),
        (lambda: exact_boundary(3, 1.5), "alpha is 1.5"),
        (lambda: exact_boundary(3, family="haybittle"), "family is 'haybittle'"),
        (lambda: exact_boundary(3, alternative="both"), "alternative is 'both'"),
        (lambda: spending_boundary([0.5, 1.0], information=[1.0]), "information has 1 looks and fractions 2"),
        (lambda: Spending("magic"), "family is 'magic'"),
        (lambda: Spending("pocock", 1.0), "the family pocock has none"),
        (lambda: Spending("power", -1.0), "positive for the family power"),
        (lambda: plan(3, power=0.01), "power is 0.01"),
        (lambda: plan([0.5, 0.9]), "a plan ends at 1"),
        (lambda: plan(3, alternative="two-sided", futility=Spending()), "one-sided design"),
        (lambda: stopped([], [], []), "equally long"),
        (lambda: stopped([0.1], [0.0], [2.0]), "errors positive"),
        (lambda: stopped([math.nan], [1.0], [2.0]), "effects must be finite"),
        (lambda: stopped([0.5, 0.1], [0.1, 0.1], [2.0, 2.0]), "look 1 had crossed its bound"),
        (lambda: repeated_interval(0.1, 0.0, 2.0), "error is 0.0"),
        (lambda: sequential_pvalue([1.0, 2.0], [1.0]), "z has 2 looks and fractions 1"),
    ],
)
def test_bad_input_is_one_clear_sentence(call, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")) as caught:
        call()
    assert "\n" not in str(caught.value)
