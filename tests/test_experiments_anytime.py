"""Anytime-valid sequences against published values, against sums by hand, and at every single moment by simulation."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.integrate import quad
from scipy.stats import beta, binom, gamma

from calling_ai.core.errors import InputError
from calling_ai.experiments.anytime import (
    Bet,
    Betting,
    Blocks,
    Running,
    bernoulli_sequence,
    beta_binomial_log_evalue,
    betting_sequence,
    compare_proportions,
    confidence_sequence,
    evalue_boundary,
    gamma_exponential_log_evalue,
    kish_size,
    mixture_boundary,
    mixture_log_evalue,
    mixture_rho,
    ready,
    sequence_reach,
    sprt_log_ratio,
)
from calling_ai.experiments.inference import compare
from calling_ai.experiments.summaries import Cell, from_sums


def test_published_mixtures() -> None:
    rho, single = mixture_rho(100), mixture_rho(100, one_sided=True)
    assert_allclose([rho, single, mixture_rho(100, exact=True)], [12.60056, 15.800635, 12.17735], atol=1e-5)
    assert_allclose([mixture_log_evalue(10, 100, rho), mixture_boundary(100, rho)], [-0.6510052, 30.35209], atol=1e-5)
    assert_allclose(mixture_log_evalue(10, 100, single, True), -0.06502391, atol=1e-7)
    assert_allclose(mixture_boundary(100, single, one_sided=True), 27.66071, atol=1e-5)
    assert_allclose(beta_binomial_log_evalue(10, 100, 0.2, 0.8, rho), -0.6941012, atol=1e-5)
    assert_allclose(
        evalue_boundary(lambda s: beta_binomial_log_evalue(s, 100, 0.2, 0.8, rho), largest=500), 31.4308, atol=1e-4
    )
    assert_allclose(gamma_exponential_log_evalue(10, 100, 2.0, single), -0.2490165, atol=1e-6)
    assert_allclose(
        evalue_boundary(lambda s: gamma_exponential_log_evalue(s, 100, 2.0, single), largest=1e3), 33.02017, atol=1e-5
    )
    assert_allclose(sprt_log_ratio(10, 100, 1.0, 0.0793615460), -0.6510052, atol=1e-7)
    found = bernoulli_sequence(700, 1_000, optimum=100)
    assert_allclose([found.lower, found.upper], [0.651629, 0.745949], atol=1e-6)


@pytest.mark.parametrize(
    ("control", "optimum", "alternative", "relative", "published"),
    [
        (3_000, 1_000, "two-sided", True, (0.50336, -0.55844, 1.56516, 1.0)),
        (3_000, 5_000, "greater", False, (0.23437667, -0.12656844, math.inf, 0.46316492)),
    ],
)
def test_published_sequences(
    control: int, optimum: float, alternative: str, relative: bool, published: tuple[float, ...]
) -> None:
    cells = [Cell("control"), Cell("treatment")]
    table = from_sums(("y",), cells, [control, 3_461], [[1_396.87], [2_422.7]], [[[52_377.9767]], [[134_698.29]]])
    found = compare(table, "y", relative=relative)
    made = confidence_sequence(found.effect, found.error, control + 3_461, optimum=optimum, alternative=alternative)
    numbers = (made.effect.value, made.effect.lower, made.effect.upper, made.pvalue)
    assert_allclose(numbers, published, atol=5e-6 if relative else 6e-9)


def test_published_proportions() -> None:
    (p, n), (q, m) = (1_396 / 3_000, 3_000), (2_422 / 3_461, 3_461)
    error = math.sqrt(q * (1 - q) / m / p**2 + p * (1 - p) / n * q**2 / p**4)
    made = confidence_sequence(q / p - 1, error, n + m, optimum=5_000)
    assert_allclose(
        [made.effect.value, made.effect.lower, made.effect.upper, made.pvalue],
        [0.50386, 0.40098, 0.60675, 0],
        atol=5e-6,
    )


@settings(max_examples=25)
@given(s=st.floats(-40, 40), v=st.floats(0.1, 300), rho=st.floats(0.5, 100))
def test_the_normal_mixture_is_an_average_of_likelihood_ratios(s: float, v: float, rho: float) -> None:
    peak, width = s / (v + rho), (v + rho) ** -0.5

    def integrand(slope: float) -> float:
        prior = 0.5 * math.log(rho / (2 * math.pi)) - slope**2 * rho / 2
        return math.exp(slope * s - slope**2 * v / 2 + prior - s**2 / (2 * (v + rho)))

    both = quad(integrand, peak - 12 * width, peak + 12 * width, epsabs=0, epsrel=1e-9, limit=200)[0]
    assert_allclose(mixture_log_evalue(s, v, rho), math.log(both) + s**2 / (2 * (v + rho)), atol=1e-6)
    above = quad(integrand, max(0.0, peak - 12 * width), max(peak, 0.0) + 12 * width, epsabs=0, epsrel=1e-9, limit=200)[
        0
    ]
    if above > 1e-200:
        assert_allclose(mixture_log_evalue(s, v, rho, True), math.log(2 * above) + s**2 / (2 * (v + rho)), atol=1e-5)


def test_other_mixtures_are_averages_too() -> None:
    g, h, rho, n, k = 0.3, 0.7, 5.0, 40, 17
    size, null = rho - g * h, g / (g + h)
    prior = beta(size / (h * (g + h)), size / (g * (g + h)))
    mixed = quad(lambda p: prior.pdf(p) * binom.pmf(k, n, p), 0, 1)[0]
    expected = math.log(mixed) - binom.logpmf(k, n, null)
    assert_allclose(beta_binomial_log_evalue(k * h - (n - k) * g, n * g * h, g, h, rho), expected, rtol=1e-9)
    c, s, v = 0.5, 6.0, 20.0
    law = gamma(rho / c**2, scale=c**2 / rho)  # of 1 - c * slope, cut to at most 1
    norming = law.cdf(1.0)
    mixed = quad(
        lambda u: law.pdf(u) / norming * math.exp((1 - u) / c * s - v * (-math.log(u) - (1 - u)) / c**2), 1e-12, 1
    )[0]
    assert_allclose(gamma_exponential_log_evalue(s, v, c, rho), math.log(mixed), rtol=1e-8)


@given(v=st.floats(1, 1e4), rho=st.floats(1, 1e3), alpha=st.floats(0.001, 0.4), one_sided=st.booleans())
def test_the_boundary_is_where_the_evalue_is_one_over_alpha(
    v: float, rho: float, alpha: float, one_sided: bool
) -> None:
    bound = mixture_boundary(v, rho, alpha, one_sided)
    assert_allclose(mixture_log_evalue(bound, v, rho, one_sided), -math.log(alpha), rtol=1e-6)


@given(optimum=st.floats(1, 1e6), alpha=st.floats(0.001, 0.45))
def test_the_exact_rho_is_the_best(optimum: float, alpha: float) -> None:
    rho = mixture_rho(optimum, alpha, exact=True)
    best = float(mixture_boundary(optimum, rho, alpha))
    assert best <= float(mixture_boundary(optimum, 1.01 * rho, alpha)) and best <= float(
        mixture_boundary(optimum, 0.99 * rho, alpha)
    )
    assert float(mixture_boundary(optimum, mixture_rho(optimum, alpha), alpha)) <= 1.03 * best


@given(
    effect=st.floats(-3, 3),
    error=st.floats(0.01, 2),
    users=st.integers(2, 100_000),
    confidence=st.sampled_from([0.8, 0.95, 0.99]),
    alternative=st.sampled_from(["two-sided", "greater", "less"]),
    margin=st.floats(-1, 1),
)
def test_interval_and_pvalue_agree(
    effect: float, error: float, users: int, confidence: float, alternative: str, margin: float
) -> None:
    found = confidence_sequence(effect, error, users, confidence, 1_000, alternative, margin)
    alpha = 1 - confidence
    if alternative == "two-sided" or abs(found.pvalue - alpha) > 2e-4:
        assert found.rejects == (found.pvalue < alpha) or abs(found.pvalue / alpha - 1) < 1e-6
    mirrored = confidence_sequence(
        -effect,
        error,
        users,
        confidence,
        1_000,
        {"greater": "less", "less": "greater"}.get(alternative, alternative),
        -margin,
    )
    assert_allclose(
        [-mirrored.effect.upper, -mirrored.effect.lower, mirrored.pvalue],
        [found.effect.lower, found.effect.upper, found.pvalue],
        atol=1e-9,
    )


def test_an_asymptotic_sequence_holds_at_all_times() -> None:
    rng, runs, n = np.random.default_rng(11), 2_000, 3_000
    totals = np.cumsum(rng.normal(0, 1, (runs, n)), axis=1)
    count = np.arange(1, n + 1)
    away = np.abs(totals) / np.sqrt(count) > sequence_reach(count, mixture_rho(1_000, 0.1), 0.1)
    assert away.any(axis=1).mean() <= 0.1
    one = totals / np.sqrt(count) > sequence_reach(count, mixture_rho(1_000, 0.1, one_sided=True), 0.1, one_sided=True)
    assert one.any(axis=1).mean() <= 0.1
    fixed = (np.abs(totals[:, 100:]) / np.sqrt(count[100:]) > 1.645).any(axis=1).mean()
    assert fixed > 0.4  # what a single look's bound would have done


def test_a_share_is_held_at_all_times_however_rare() -> None:
    """Exact from the first trial: the path of successes leaves the sequence of its share alpha of the time at most."""
    rng, n = np.random.default_rng(5), 1_500
    trials = np.arange(1, n + 1)
    for share in (0.005, 0.1, 0.5):
        totals = np.cumsum(rng.random((1_000, n)) < share, axis=1)
        g, h = share, 1 - share
        rho = mixture_rho(1.0, 0.1) * g * h * 300
        left = (beta_binomial_log_evalue(totals - trials * share, trials * g * h, g, h, rho) >= -math.log(0.1)).any(
            axis=1
        )
        assert left.mean() <= 0.1
        found = bernoulli_sequence(int(totals[0, -1]), n, 0.9, 300)
        inside = beta_binomial_log_evalue(totals[0, -1] - n * share, n * g * h, g, h, rho) < -math.log(0.1)
        assert (found.lower <= share <= found.upper) == inside


@given(
    before=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    shift=st.floats(-0.4, 0.4),
    ratio=st.floats(0.4, 2.5),
    mode=st.sampled_from(["equal", "shift", "ratio"]),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    level=st.floats(0.02, 0.98),
    further=st.floats(0, 0.5),
)
def test_a_bet_is_fair_under_the_whole_hypothesis(
    before: tuple[int, int], shift: float, ratio: float, mode: str, sizes: tuple[int, int], level: float, further: float
) -> None:
    """Every outcome of a block is summed over: on average the stake does not grow, on the border and beyond it."""
    shift, ratio = (shift if mode == "shift" else 0.0), (ratio if mode == "ratio" else 1.0)
    control = level
    treatment = shift + ratio * control - further
    if not 0 <= treatment <= 1:
        return
    (n, m), total = sizes, 0.0
    for yes, other in product(range(n + 1), range(m + 1)):
        bet = Bet(np.array([shift]), np.array([ratio])).update(before[0], 30, before[1], 30)
        start = bet.log_evalue
        total += (
            binom.pmf(yes, n, control)
            * binom.pmf(other, m, treatment)
            * float(np.exp(bet.update(yes, n, other, m).log_evalue - start)[0])
        )
    assert total <= 1 + 1e-6


@given(
    before=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    share=st.floats(0.05, 0.95),
    level=st.floats(0.02, 0.98),
    values=st.sampled_from([(0.0, 1.0), (0.2, 0.9), (0.5, 0.5)]),
)
def test_a_bet_is_fair_user_by_user(
    before: tuple[int, int], share: float, level: float, values: tuple[float, float]
) -> None:
    """With the probability of the arm, each user is a block; values between 0 and 1 count as well."""
    low, high = values
    total = 0.0
    for treated, value in product((False, True), (low, high)):
        bet = Bet().update(before[0], 30, before[1], 30)
        start = float(bet.log_evalue)
        block = (0.0, 0, value, 1) if treated else (value, 1, 0.0, 0)
        chance = (
            (share if treated else 1 - share) * (level if value == high else 1 - level)
            if low != high
            else (share if treated else 1 - share) / 2
        )
        total += chance * math.exp(float(bet.update(*block, share=share).log_evalue) - start)
    assert total <= 1 + 1e-9


def test_the_table_of_blocks_equals_the_running_bet() -> None:
    rng = np.random.default_rng(2)
    n = rng.integers(0, 60, (2, 25))
    blocks = Blocks(rng.binomial(n[0], 0.3), n[0], rng.binomial(n[1], 0.4), n[1])
    for shift, ratio, share in ((0.0, 1.0, None), (0.05, 1.0, 0.5), (-0.02, 1.0, None), (0.0, 0.8, 0.4)):
        bet = Bet(shift, ratio)
        path = [
            float(bet.update(*row, share=share).log_evalue)
            for row in zip(blocks.control, n[0], blocks.treatment, n[1], strict=True)
        ]
        assert_allclose(blocks.log_evalues(shift, ratio, share)[:, 0], path, atol=1e-12)


@pytest.mark.parametrize("relative", [False, True])
def test_the_exact_interval_inverts_the_bets(relative: bool) -> None:
    rng, n = np.random.default_rng(4), np.full(30, 400)
    blocks = Blocks(rng.binomial(n, 0.2), n, rng.binomial(n, 0.26), n)
    found = compare_proportions(blocks, relative=relative)
    assert 0 < found.effect.lower < (0.3 if relative else 0.06) < found.effect.upper
    for end, up in ((found.effect.lower, True), (found.effect.upper, False)):
        for step, refuted in ((-1e-3, up), (1e-3, not up)):
            at = np.array([end + step])
            shift, ratio = (np.zeros(1), 1 + at) if relative else (at, np.ones(1))
            path = blocks.log_evalues(shift, ratio) if up else blocks.swapped().log_evalues(-shift / ratio, 1 / ratio)
            assert (path.max() >= math.log(40)) == refuted
    mirrored = compare_proportions(blocks.swapped())
    if not relative:
        assert_allclose(
            [-mirrored.effect.upper, -mirrored.effect.lower], [found.effect.lower, found.effect.upper], atol=2e-4
        )


def test_ramps_and_steps_do_not_fool_the_bet() -> None:
    rng, rejected = np.random.default_rng(6), 0
    nc, nt = np.r_[np.full(6, 450), np.full(12, 250)], np.r_[np.full(6, 50), np.full(12, 250)]
    rate = np.r_[np.full(6, 0.02), np.full(12, 0.06)]
    for _ in range(300):
        blocks = Blocks(rng.binomial(nc, rate), nc, rng.binomial(nt, rate), nt)
        rejected += max(blocks.log_evalues().max(), blocks.swapped().log_evalues().max()) >= math.log(40)
    assert rejected <= 15 + 3 * math.sqrt(15)


def by_hand(values: np.ndarray, mean: float, alpha: float, cut: float) -> float:
    """Return the highest wealth of the hedged bet against one mean, one value at a time."""
    up = down = highest = 0.0
    total, squares = 0.0, 0.25
    for step, x in enumerate(values, 1):
        stake = math.sqrt(2 * math.log(2 / alpha) / (squares / step * step * math.log(1 + step)))
        up += math.log1p(min(stake, cut / mean) * (x - mean))
        down += math.log1p(-min(stake, cut / (1 - mean)) * (x - mean))
        highest = max(highest, max(up, down) - math.log(2))
        total += x
        squares += (x - (0.5 + total) / (step + 1)) ** 2
    return highest


def test_betting_against_a_loop_by_hand() -> None:
    values = np.random.default_rng(8).beta(2, 5, 700)
    bet = Betting(points=40).update(values)
    expected = np.array([by_hand(values, mean, 0.05, 0.5) < math.log(20) for mean in bet.means])
    assert (bet.alive == expected).all() and 0 < expected.sum() < 40


@given(cuts=st.lists(st.integers(0, 300), max_size=6))
def test_betting_in_pieces_is_betting_in_one(cuts: list[int]) -> None:
    values = np.random.default_rng(9).beta(2, 3, 300)
    pieces = Betting(points=50)
    for part in np.split(values, sorted(cuts)):
        pieces.update(part)
    whole = Betting(points=50).update(values)
    assert_allclose([pieces.up, pieces.down], [whole.up, whole.down], rtol=1e-9)
    assert (pieces.alive == whole.alive).all()


def test_betting_holds_at_all_times() -> None:
    rng, missed = np.random.default_rng(10), 0
    for _ in range(150):
        values = (rng.random(400) < 0.03).astype(float)  # skewed: a variance would be learned late
        missed += not Betting(0.9, points=400).update(values).alive[int(0.03 * 400)]
    assert missed <= 15 + 3 * math.sqrt(15)


@given(seed=st.integers(0, 1_000), pieces=st.integers(1, 6))
def test_watching_batch_by_batch_equals_the_comparison_from_scratch(seed: int, pieces: int) -> None:
    rng, watch, sums = np.random.default_rng(seed), Running(), {}
    for day, arm in product(range(3), ("control", "treatment")):
        values = rng.gamma(2, 1 + day, rng.integers(3, 60))
        for part in np.array_split(values, pieces):
            if len(part):
                watch.update(day, arm, len(part), part.mean(), ((part - part.mean()) ** 2).sum())
        sums[Cell(arm, "", str(day))] = (len(values), [values.sum()], [[(values**2).sum()]])
    table = from_sums(("y",), list(sums), *map(list, zip(*sums.values(), strict=True)))
    found = compare(table, "y")
    assert_allclose(watch.score / watch.weight, found.effect, rtol=1e-9)
    assert_allclose(math.sqrt(watch.totals[2]) / watch.weight, found.error, rtol=1e-9)
    assert watch.variance >= watch.totals[2]


def test_the_small_arm_of_a_ramp_is_not_trusted_alone() -> None:
    watch = Running()
    watch.update(0, "control", 900, 1.0, 900 * 5.0).update(
        0, "treatment", 100, 0.8, 100 * 0.5
    )  # its tail has not come yet
    joint = 900 * 100 / 1_000 * (4_500 + 50) / 998
    assert_allclose(watch.variance, joint, rtol=1e-12)
    assert watch.totals[2] < joint


@pytest.mark.parametrize(
    ("n", "mean", "variance", "size"),
    [(1_000, 0.01, 0.0099, 10), (100, 2.0, 0.0, 100), (10, 0.0, 0.0, 0), (1_000, 0.0, 1.0, 0)],
)
def test_who_carries_the_mean(n: int, mean: float, variance: float, size: float) -> None:
    assert_allclose(kish_size(n, mean, variance), size, rtol=1e-9)


def test_the_sequence_is_silent_until_it_may_speak() -> None:
    assert not ready((49, 500), (1.0, 1.0), (0.1, 0.1)) and ready((80, 500), (1.0, 1.0), (0.1, 0.1))
    assert not ready((1_000, 1_000), (1.0, 1.0), (0.0, 1.0)) and not ready(
        (99, 500), (0.0, 0.0), (1.0, 1.0), burn_in=100
    )
    watch = Running().update("day", "control", 2, 1.0, 0.5)
    assert watch.sequence().effect.upper == math.inf and watch.sequence().pvalue == 1 and not watch.ready


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mixture_rho(0), "optimum is 0"),
        (lambda: mixture_rho(10, 0.6, one_sided=True), "it must lie below 0.5"),
        (lambda: mixture_rho(10, 0.0), "alpha is 0.0"),
        (lambda: sprt_log_ratio(1, 1, -1.0, 1.0), "both must be positive"),
        (lambda: bernoulli_sequence(5, 4), "successes is 5 of 4 trials"),
        (lambda: bernoulli_sequence(-1, 4), "successes is -1 of 4 trials"),
        (lambda: confidence_sequence(0.1, 0.0, 100), "error is 0.0"),
        (lambda: confidence_sequence(0.1, math.nan, 100), "error is nan"),
        (lambda: confidence_sequence(math.nan, 1.0, 100), "effect is nan"),
        (lambda: confidence_sequence(0.1, 1.0, 0), "there must be users"),
        (lambda: confidence_sequence(0.1, 1.0, 10, 1.0), "confidence is 1.0"),
        (lambda: confidence_sequence(0.1, 1.0, 10, alternative="up"), "alternative is 'up'"),
        (lambda: Blocks([3], [2], [0], [1]), "control has 3 successes of 2 users in block 1"),
        (lambda: Blocks([1], [2], [-1], [1]), "treatment has -1 successes of 1 users in block 1"),
        (lambda: Blocks([1, 1], [2], [1], [1]), "they must be equally long"),
        (lambda: Blocks([1], [math.nan], [1], [1]), "control has 1 successes of nan users"),
        (
            lambda: compare_proportions(Blocks([1], [2], [1], [2]), margin=-1.0, relative=True),
            "a relative margin is above -1",
        ),
        (lambda: betting_sequence([0.5, 1.5]), "they must lie in"),
        (lambda: betting_sequence([math.nan]), "they must lie in"),
        (lambda: betting_sequence([0.5], low=1.0, high=0.0), "low must be smaller"),
        (lambda: Running().update(0, "other", 1, 1.0, 0.0), "arm is 'other'"),
        (lambda: Running().update(0, "control", -1, 1.0, 0.0), "batch has -1 users"),
        (lambda: Running().update(0, "control", 1, math.nan, 0.0), "mean nan"),
    ],
)
def test_bad_input_is_one_clear_sentence(call, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
