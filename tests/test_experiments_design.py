"""Power and numbers of users against the published table, statsmodels, and simulation."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from calling_ai.core.errors import InputError
from calling_ai.experiments.design import (
    VARIANCES,
    Baseline,
    baseline,
    detectable_effect,
    duration,
    power_of,
    proportion,
    sample_size,
)
from calling_ai.experiments.inference import Metric, compare
from calling_ai.experiments.summaries import Moments, Summaries


@pytest.mark.parametrize(
    ("base", "effect", "users"), [(0.20, 0.05, 1030.2), (0.10, 0.02, 3622.6), (0.05, 0.01, 7663.0)]
)
def test_the_published_table(base: float, effect: float, users: float) -> None:
    found = sample_size(proportion(base), effect)
    assert round(found.control, 1) == round(found.treatment, 1) == users
    assert_allclose(power_of(proportion(base), effect, found.control), 0.8, atol=1e-5)
    assert_allclose(detectable_effect(proportion(base), found.control), effect, rtol=1e-5)
    assert_allclose(sample_size(proportion(base), effect / base, relative=True).control, found.control, rtol=1e-9)


@pytest.mark.parametrize("ratio", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("alternative", ["two-sided", "greater"])
def test_means_against_statsmodels(ratio: float, alternative: str) -> None:
    from statsmodels.stats.power import NormalIndPower, TTestIndPower

    names = {"two-sided": "two-sided", "greater": "larger"}
    options = {"effect_size": 0.3, "alpha": 0.05, "ratio": ratio, "alternative": names[alternative]}
    base = Baseline(10.0, 2.0)
    for method, oracle in (("z", NormalIndPower()), ("t", TTestIndPower())):
        found = power_of(base, 0.6, 70, ratio=ratio, alternative=alternative, method=method)
        assert_allclose(found, oracle.power(nobs1=70, **options), rtol=1e-6)
        needed = sample_size(base, 0.6, power=0.9, ratio=ratio, alternative=alternative, method=method)
        assert_allclose(needed.control, oracle.solve_power(power=0.9, **options), rtol=1e-5)
        assert_allclose(needed.treatment, ratio * needed.control, rtol=1e-12)
        seen = detectable_effect(base, needed.control, power=0.9, ratio=ratio, alternative=alternative, method=method)
        assert_allclose(seen, 0.6, rtol=1e-5)


def test_proportions_against_statsmodels() -> None:
    from statsmodels.stats.proportion import power_proportions_2indep, samplesize_proportions_2indep_onetail

    for ratio in (0.5, 1.0):
        needed = sample_size(proportion(0.2), 0.05, variance="pooled", ratio=ratio)
        oracle = samplesize_proportions_2indep_onetail(0.05, 0.2, 0.8, ratio=1 / ratio, alpha=0.05)
        # theirs counts the users of the treatment, per `ratio` of the control
        assert_allclose(needed.treatment, oracle, rtol=1e-6)
    oracle = power_proportions_2indep(0.05, 0.2, 900, ratio=1)
    assert_allclose(power_of(proportion(0.2), 0.05, 900, variance="pooled"), oracle.power, rtol=1e-6)


shares = st.floats(0.02, 0.9)


@given(
    shares,
    st.floats(0.02, 0.5),
    st.sampled_from(VARIANCES),
    st.floats(0.2, 4),
    st.sampled_from(["two-sided", "greater"]),
    st.floats(1, 1.3),
)
def test_the_questions_are_inverse(
    base: float, share: float, variance: str, ratio: float, alternative: str, inflation: float
) -> None:
    effect = share * (1 - base)
    options: dict[str, Any] = {"variance": variance, "ratio": ratio, "alternative": alternative, "inflation": inflation}
    needed = sample_size(proportion(base), effect, power=0.9, **options)
    found = power_of(proportion(base), effect, needed.control, **options)
    # a two-sided test may also find the effect on the wrong side: that adds a little where users are few
    assert 0.9 - 1e-9 <= found <= (0.9 + 1e-9 if alternative == "greater" else 0.91)
    assert power_of(proportion(base), effect, needed.control * 1.1, **options) > 0.9


def test_harm_is_found_as_well() -> None:
    down = sample_size(proportion(0.3), -0.05, alternative="less")
    assert_allclose(power_of(proportion(0.3), -0.05, down.control, alternative="less"), 0.8, atol=1e-5)
    assert_allclose(detectable_effect(proportion(0.3), down.control, alternative="less"), -0.05, rtol=1e-5)


def test_non_inferiority_looks_from_the_margin() -> None:
    base = Baseline(1.0, 0.5)
    same = sample_size(base, 0.0, margin=-0.1, alternative="greater", confidence=0.975)
    assert_allclose(same.control, sample_size(base, 0.1, alternative="greater", confidence=0.975).control, rtol=1e-12)
    assert_allclose(
        power_of(base, 0.0, same.control, margin=-0.1, alternative="greater", confidence=0.975), 0.8, atol=1e-6
    )


@pytest.mark.slow
def test_the_planned_power_is_reached() -> None:
    rng = np.random.default_rng(4)
    runs = 600
    x = rng.gamma(1.0, 1.0, 40_000)
    s = 1.0 + rng.poisson(x)
    today = Moments.of(y=rng.binomial(s.astype(int), 0.3).astype(float), s=s, x=x)
    metric = Metric("y", "s")
    needed = sample_size(baseline(today, metric), 0.06)
    found = 0
    for _ in range(runs):
        arms = []
        for rate, count in ((0.3, needed.control), (0.36, needed.treatment)):
            size = math.ceil(count)
            s = 1.0 + rng.poisson(rng.gamma(1.0, 1.0, size))
            arms.append(Moments.of(y=rng.binomial(s.astype(int), rate).astype(float), s=s))
        found += compare(Summaries.of(control=arms[0], treatment=arms[1]), metric).rejects
    print(f"planned 0.800, reached {found / runs:.3f}")
    assert abs(found / runs - 0.8) < 0.03 + 2.58 * math.sqrt(0.16 / runs)


def test_a_baseline_against_regression() -> None:
    rng = np.random.default_rng(2)
    x, z = rng.normal(0, 1, (2, 5_000))
    y = 3 + 0.8 * x - 0.5 * z + rng.normal(0, 1, 5_000)
    found = baseline(Moments.of(y=y, x=x, z=z), "y", ("x", "z"))
    design = np.column_stack([np.ones(5_000), x, z])
    left = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    assert_allclose([found.value, found.deviation], [y.mean(), left.std(ddof=1)], rtol=1e-9)
    assert baseline(Moments.of(y=y > 3), Metric("y", proportion=True)).proportion
    with pytest.raises(InputError, match="deviation is 0"):
        baseline(Moments.of(y=[1.0, 1.0]))
    with pytest.raises(InputError, match="at least two users"):
        baseline(Moments.of(y=[1.0]))


@given(st.integers(50, 5_000), st.floats(0.05, 0.95), st.integers(0, 10), st.floats(0.05, 0.5))
def test_a_duration_brings_what_is_needed(daily: int, share: float, days: int, start: float) -> None:
    needed = sample_size(proportion(0.2), 0.02)
    ramp = (((start, days),) if days else ()) + ((share, math.inf),)
    found = duration(needed, daily, ramp)
    length = dict(enumerate(found.stages))
    gained = sum(daily * split * (1 - split) * length.get(i, 0) for i, (split, _) in enumerate(ramp))
    assert gained >= needed.information * (1 - 1e-9)
    last = ramp[len(found.stages) - 1][0]
    assert gained - daily * last * (1 - last) < needed.information * (1 + 1e-9)  # a day less is not enough
    assert found.days == sum(found.stages)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: proportion(0.0), "between 0 and 1"),
        (lambda: Baseline(1.0, math.nan), "both must be finite"),
        (lambda: sample_size(proportion(0.2), 0.0), "tells them apart"),
        (lambda: sample_size(proportion(0.2), math.nan), "tells them apart"),
        (lambda: sample_size(proportion(0.2), 0.9), "must lie between 0 and 1"),
        (lambda: sample_size(proportion(0.2), 0.1, power=1.0), "power is 1.0"),
        (lambda: sample_size(proportion(0.2), 0.1, confidence=1.0), "confidence is 1.0"),
        (lambda: sample_size(proportion(0.2), 0.1, ratio=0), "ratio is 0"),
        (lambda: sample_size(proportion(0.2), 0.1, inflation=0.9), "inflation is 0.9"),
        (lambda: sample_size(proportion(0.2), 0.1, variance="none"), "variance is 'none'"),
        (lambda: sample_size(proportion(0.2), 0.1, method="exact"), "method is 'exact'"),
        (lambda: sample_size(proportion(0.2), 0.1, alternative="up"), "alternative is 'up'"),
        (lambda: sample_size(proportion(0.2), -0.1, alternative="greater"), "wrong side"),
        (lambda: sample_size(proportion(0.2), 0.1, power=0.01), "little is reached"),
        (lambda: power_of(proportion(0.2), 0.1, 0), "count is 0"),
        (lambda: power_of(Baseline(0, 1), 0.1, 1, method="t"), "more than two users"),
        (lambda: detectable_effect(proportion(0.2), 100, power=0.01), "power is 0.01"),
        (lambda: detectable_effect(proportion(0.5), 2), "cannot show any effect"),
        (lambda: detectable_effect(Baseline(0.0, 1.0), 100, relative=True), "baseline is 0"),
        (lambda: duration(sample_size(proportion(0.2), 0.1), -5), "daily is -5"),
        (lambda: duration(sample_size(proportion(0.2), 0.1), 5, ((1.5, 3),)), "share is 1.5"),
        (lambda: duration(sample_size(proportion(0.2), 0.1), 5, ((0.5, -3),)), "a stage lasts -3"),
        (lambda: duration(sample_size(proportion(0.2), 0.1), 5, ((0.5, 3),)), "the ramp ends after 3 days"),
        (lambda: duration(sample_size(proportion(0.2), 0.1), 5, ((1.0, math.inf),)), "one arm is empty"),
        (lambda: duration(sample_size(proportion(0.2), 0.1), 5, ()), "ramp is empty"),
        (lambda: duration(sample_size(proportion(0.2), 0.1), 5, waiting=-1), "waiting is -1"),
    ],
)
def test_bad_designs_are_refused(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
