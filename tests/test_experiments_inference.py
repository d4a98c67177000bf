"""Effects against published numbers, scipy and statsmodels, sums over users by hand, and by simulation."""

import math
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from calling_ai.core.errors import InputError
from calling_ai.experiments.inference import (
    INTERVALS,
    NO_VARIANCE,
    Effect,
    Metric,
    adjusted,
    compare,
    strata,
)
from calling_ai.experiments.summaries import Cell, Moments, Summaries, from_sums, summarise

PROPORTION = Metric("y", proportion=True)


def two(**columns: tuple[Any, Any]) -> Summaries:
    """Return two arms from pairs of columns: control, treatment."""
    return Summaries.of(
        control=Moments.of(**{name: pair[0] for name, pair in columns.items()}),
        treatment=Moments.of(**{name: pair[1] for name, pair in columns.items()}),
    )


def sample(seed: int, sizes: tuple[int, int] = (80, 120)) -> tuple[np.ndarray, np.ndarray]:
    """Return the metric of two arms."""
    rng = np.random.default_rng(seed)
    return rng.normal(5, 1, sizes[0]), rng.normal(5.3, 2, sizes[1])


# --------------------------------------------------------------------------------------------- published numbers


def sums_of(count: tuple[int, int], total: tuple[float, float], square: tuple[float, float]) -> Summaries:
    """Return two arms from counts, sums and sums of squares."""
    return from_sums(("y",), [Cell("control"), Cell("treatment")], count, np.c_[total], np.c_[square][:, :, None])


def test_published_welch() -> None:
    data = sums_of((3407, 3461), (1396.87, 2422.7), (52377.9767, 134698.29))
    absolute, relative = compare(data), compare(data, relative=True)
    assert_allclose(
        [absolute.effect, absolute.lower, absolute.upper, absolute.pvalue], [0.29, 0.04538, 0.53462, 0.02016], atol=5e-6
    )
    assert_allclose(
        [relative.effect, relative.lower, relative.upper, relative.pvalue],
        [0.70732, -0.03526, 1.44989, 0.06191],
        atol=5e-6,
    )


def test_published_cuped() -> None:
    data = from_sums(
        ("y", "x"),
        [Cell("control"), Cell("treatment")],
        [2023, 1977],
        [[1073, 1090], [1133, 1006]],
        [[[2073, 1691], [1691, 2720]], [[2121, 1551], [1551, 2380]]],
    )
    theta = adjusted(strata(data, ("y", "x")), 1, "cuped").slope.ravel()
    assert_allclose(theta, 0.521292971780, rtol=1e-11)
    found = compare(data, adjust="cuped")
    assert_allclose([found.control, found.treatment], [0.522683301078, 0.580987193687], rtol=1e-11)
    assert_allclose([found.effect, found.error], [0.058303892609, 0.021732258155], rtol=1e-10)
    assert_allclose(found.pvalue, 0.00733040980869, rtol=1e-11)
    assert_allclose([found.lower, found.upper], [0.015696510169, 0.100911275049], rtol=1e-10)


def test_published_ratio() -> None:
    data = from_sums(
        ("y", "s"),
        [Cell("control"), Cell("treatment")],
        [2023, 1977],
        [[1073, 4038], [1133, 3920]],
        [[[2073, 2648], [2648, 10098]], [[2121, 2730], [2730, 9698]]],
    )
    found = compare(data, Metric("y", "s"))
    assert_allclose([found.control, found.treatment], [0.265725606736, 0.289030612245], rtol=1e-11)
    assert_allclose([found.effect, found.effect / found.error], [0.023305005509, 1.773406266834], rtol=1e-10)
    assert_allclose(found.pvalue, 0.076237599782, rtol=1e-10)


# ----------------------------------------------------------------------------------------------------- oracles


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_welch_against_scipy(alternative: str, confidence: float) -> None:
    from scipy import stats

    control, treatment = sample(1)
    oracle = stats.ttest_ind(treatment, control, equal_var=False, alternative=alternative)
    interval = oracle.confidence_interval(confidence)
    found = compare(two(y=(control, treatment)), alternative=alternative, confidence=confidence)
    assert_allclose(found.pvalue, oracle.pvalue, rtol=1e-10)
    assert_allclose([found.lower, found.upper], [interval.low, interval.high], rtol=1e-10)
    assert found.rejects == (oracle.pvalue < 1 - confidence)


@given(st.integers(0, 10_000), st.integers(2, 50), st.integers(2, 50))
def test_welch_against_scipy_at_any_size(seed: int, m: int, n: int) -> None:
    from scipy import stats

    control, treatment = sample(seed, (m, n))
    oracle = stats.ttest_ind(treatment, control, equal_var=False)
    found = compare(two(y=(control, treatment)))
    assert_allclose([found.pvalue, found.effect / found.error], [oracle.pvalue, oracle.statistic], rtol=1e-9)
    swapped = compare(two(y=(treatment, control)))
    assert_allclose([swapped.effect, swapped.lower, swapped.upper], [-found.effect, -found.upper, -found.lower])


def test_z_against_statsmodels() -> None:
    from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

    control, treatment = sample(2)
    oracle = CompareMeans(DescrStatsW(treatment), DescrStatsW(control))
    found = compare(two(y=(control, treatment)), method="z", margin=0.1)
    assert_allclose([found.lower, found.upper], oracle.zconfint_diff(usevar="unequal"), rtol=1e-9)
    assert_allclose(found.pvalue, oracle.ztest_ind(usevar="unequal", value=0.1)[1], rtol=1e-9)
    welch = compare(two(y=(control, treatment)), margin=0.1)
    assert_allclose([welch.lower, welch.upper], oracle.tconfint_diff(usevar="unequal"), rtol=1e-9)
    assert_allclose(welch.pvalue, oracle.ttest_ind(usevar="unequal", value=0.1)[1], rtol=1e-9)


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_proportions_against_statsmodels(alternative: str) -> None:
    from statsmodels.stats.proportion import confint_proportions_2indep, proportions_ztest

    good, count = (190, 160), (900, 600)
    data = sums_of(count, good, good)
    names = {"two-sided": "two-sided", "greater": "larger", "less": "smaller"}
    pooled = compare(data, PROPORTION, method="z-pooled", alternative=alternative)
    oracle = proportions_ztest(good[::-1], count[::-1], alternative=names[alternative])
    assert_allclose(pooled.pvalue, oracle[1], rtol=1e-9)
    unpooled = compare(data, PROPORTION, method="z-unpooled", alternative=alternative)
    oracle = proportions_ztest(good[::-1], count[::-1], alternative=names[alternative], prop_var=False)
    if alternative == "two-sided":
        interval = confint_proportions_2indep(good[1], count[1], good[0], count[0], method="wald")
        assert_allclose([unpooled.lower, unpooled.upper], interval, rtol=1e-9)
    share = np.array(good) / np.array(count)
    error = math.sqrt((share * (1 - share) / np.array(count)).sum())
    assert_allclose([unpooled.error, unpooled.effect], [error, share[1] - share[0]], rtol=1e-12)


def visits(seed: int, users: int = 300) -> pd.DataFrame:
    """Return rows of users, a few each, with outcomes that resemble each other within a user."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, 9, users)
    arm = np.where(rng.random(users) < 0.4, "treatment", "control")
    taste = rng.beta(1, 2, users)
    who = np.repeat(np.arange(users), rows)
    return pd.DataFrame(
        {"user_key": who, "arm": arm[who], "y": (rng.random(len(who)) < taste[who]).astype(float), "s": 1.0}
    )


def test_a_ratio_against_regression_clustered_by_user() -> None:
    import statsmodels.api as sm

    frame = visits(3)
    found = compare(summarise(frame, ("y", "s")), Metric("y", "s"))
    variance = 0.0
    for arm, value in (("control", found.control), ("treatment", found.treatment)):
        part = frame[frame.arm == arm]
        options = {"groups": part.user_key, "use_correction": False}
        fit = sm.OLS(part.y, np.ones(len(part))).fit(cov_type="cluster", cov_kwds=options)
        users = part.user_key.nunique()
        assert_allclose(value, fit.params.iloc[0], rtol=1e-12)
        variance += fit.bse.iloc[0] ** 2 * users / (users - 1)
    assert_allclose(found.error, math.sqrt(variance), rtol=1e-9)
    naive = compare(summarise(frame, ("y",), user=None))  # rows as if they were independent
    assert naive.error < 0.85 * found.error


def with_past(seed: int, size: int = 500, share: float = 0.25) -> pd.DataFrame:
    """Return users whose metric depends on two covariates, more so under the treatment."""
    rng = np.random.default_rng(seed)
    x, z = rng.gamma(2, 1, size), rng.normal(0, 1, size)
    treated = rng.random(size) < share
    y = 1 + 0.3 * treated + (0.8 + 0.7 * treated) * x - 0.4 * z + rng.normal(0, 1, size)
    return pd.DataFrame({"arm": np.where(treated, "treatment", "control"), "y": y, "x": x, "z": z})


@pytest.mark.parametrize("columns", [("x",), ("x", "z")])
def test_cuped_is_a_test_of_what_is_left(columns: tuple[str, ...]) -> None:
    from scipy import stats

    frame = with_past(4)
    inside = frame[list(columns)] - frame[list(columns)].mean()
    theta = np.linalg.lstsq(inside, frame.y - frame.y.mean(), rcond=None)[0]
    left = frame.y - inside @ theta
    treated = frame.arm == "treatment"
    oracle = stats.ttest_ind(left[treated], left[~treated], equal_var=False)
    found = compare(summarise(frame, ("y",), columns), adjust="cuped", covariates=columns)
    assert_allclose([found.pvalue, found.effect / found.error], [oracle.pvalue, oracle.statistic], rtol=1e-8)
    assert_allclose([found.control, found.treatment], [left[~treated].mean(), left[treated].mean()], rtol=1e-10)
    assert found.error < compare(summarise(frame)).error


@pytest.mark.parametrize("columns", [("x",), ("x", "z")])
def test_regression_against_statsmodels(columns: tuple[str, ...]) -> None:
    import statsmodels.api as sm

    frame = with_past(5)
    middle = frame[list(columns)].mean()
    means, variance, slopes = [], 0.0, []
    for arm in ("control", "treatment"):
        part = frame[frame.arm == arm]
        fit = sm.OLS(part.y, sm.add_constant(part[list(columns)])).fit()
        at = fit.get_prediction(np.r_[1.0, middle][None, :])
        means.append(float(at.predicted_mean[0]))
        variance += float(at.se_mean[0]) ** 2
        slopes.append(fit.params[list(columns)].to_numpy())
    away = slopes[1] - slopes[0]
    variance += away @ np.cov(frame[list(columns)].T).reshape(len(columns), -1) @ away / len(frame)
    found = compare(summarise(frame, ("y",), columns), adjust="regression", covariates=columns)
    assert_allclose([found.control, found.treatment], means, rtol=1e-10)
    assert_allclose(found.error, math.sqrt(variance), rtol=1e-9)


def test_regression_with_uneven_arms_is_never_worse() -> None:
    rng = np.random.default_rng(1)
    errors = {name: [] for name in (None, "cuped", "regression")}
    for _ in range(60):
        size = 800
        treated, x = rng.random(size) < 0.1, rng.normal(0, 1, size)
        y = np.where(treated, 2.0, -0.15) * x + rng.normal(0, 0.5, size)  # the slopes differ, and so do the arms
        data = summarise({"arm": np.where(treated, "treatment", "control"), "y": y, "x": x}, ("y",), ("x",))
        for name in errors:
            errors[name].append(compare(data, adjust=name).effect)
    spread = {name: np.std(values) for name, values in errors.items()}
    assert spread["regression"] < 0.8 * min(spread[None], spread["cuped"])


def test_strata_against_regression_with_fixed_effects() -> None:
    import statsmodels.formula.api as smf

    frame = with_past(6, share=0.3)
    rng = np.random.default_rng(0)
    frame["day"] = rng.choice(["2026-03-01", "2026-03-02", "2026-03-03"], len(frame), p=[0.6, 0.3, 0.1])
    frame["y"] += frame.day.map({"2026-03-01": 0.0, "2026-03-02": 3.0, "2026-03-03": -2.0})
    data = summarise(frame)
    fit = smf.ols("y ~ C(day) + C(arm)", frame).fit()
    assert_allclose(compare(data).effect, fit.params["C(arm)[T.treatment]"], rtol=1e-9)
    shares, effects = frame.groupby("day").size() / len(frame), []
    for _, part in frame.groupby("day"):
        effects.append(part[part.arm == "treatment"].y.mean() - part[part.arm == "control"].y.mean())
    assert_allclose(compare(data, weights="population").effect, shares @ np.array(effects), rtol=1e-9)
    alone = [compare(data.pick(until="2026-03-01")), compare(data.over())]
    assert alone[0].method.count("strata") == 0 and alone[1].effect != compare(data).effect


def test_pooled_proportions_in_strata_against_cochran_mantel_haenszel() -> None:
    from statsmodels.stats.contingency_tables import StratifiedTable

    good = np.array([[40, 55], [150, 160]])
    count = np.array([[300, 300], [300, 300]])
    cells = [Cell(arm, "", day) for day in ("1", "2") for arm in ("control", "treatment")]
    data = from_sums(("y",), cells, count.ravel(), good.reshape(-1, 1), good.reshape(-1, 1, 1))
    tables = [np.array([[g[1], n[1] - g[1]], [g[0], n[0] - g[0]]]) for g, n in zip(good, count, strict=True)]
    oracle = StratifiedTable(tables).test_null_odds(correction=False)
    from scipy.special import ndtri

    found = compare(data, PROPORTION, method="z-pooled")
    statistic = ndtri(1 - found.pvalue / 2) ** 2
    assert_allclose(statistic * 599 / 600, oracle.statistic, rtol=1e-9)  # their variance divides by n - 1


# ----------------------------------------------------------------------------------------------- relative effects


@given(st.integers(0, 1_000))
def test_relative_intervals_agree_far_from_zero(seed: int) -> None:
    control, treatment = sample(seed, (400, 500))
    found = [compare(two(y=(control, treatment)), relative=True, interval=kind) for kind in INTERVALS]
    assert_allclose([each.effect for each in found], treatment.mean() / control.mean() - 1, rtol=1e-12)
    assert_allclose([each.lower for each in found], found[0].lower, atol=0.002)
    assert_allclose([each.upper for each in found], found[0].upper, atol=0.002)
    gradient = [1 / control.mean(), -treatment.mean() / control.mean() ** 2]
    variances = [treatment.var(ddof=1) / 500, control.var(ddof=1) / 400]
    assert_allclose(found[0].error, math.sqrt(np.square(gradient) @ variances), rtol=1e-9)


def test_fieller_ends_are_where_the_test_says_so() -> None:
    control, treatment = sample(11, (30, 30))
    data = two(y=(control - 4, treatment - 4))
    found = compare(data, relative=True, interval="fieller")
    assert math.isfinite(found.lower) and math.isfinite(found.upper)
    for end in (found.lower, found.upper):
        assert_allclose(compare(data, relative=True, interval="fieller", margin=end).pvalue, 0.05, rtol=1e-6)
    assert_allclose(found.pvalue, compare(data).pvalue, rtol=1e-12)  # no relative effect is no absolute one


def test_log_ends_are_where_the_test_says_so() -> None:
    data = two(y=sample(12))
    found = compare(data, relative=True, interval="log", confidence=0.9)
    for end in (found.lower, found.upper):
        assert_allclose(compare(data, relative=True, interval="log", margin=end).pvalue, 0.1, rtol=1e-6)


@pytest.mark.parametrize("alternative", ["greater", "less"])
@pytest.mark.parametrize("relative", [False, True])
def test_a_bound_and_its_test_agree(alternative: str, relative: bool) -> None:
    data = two(y=sample(13))
    found = compare(data, alternative=alternative, relative=relative)
    end = found.lower if alternative == "greater" else found.upper
    assert math.isinf(found.upper if alternative == "greater" else found.lower)
    at = compare(data, alternative=alternative, relative=relative, margin=end)
    assert_allclose(at.pvalue, 0.05, rtol=1e-6)


# ----------------------------------------------------------------------------------- users who come in two stages


def ramp(seed: int, users: int = 500) -> pd.DataFrame:
    """Return a ramp of a treatment that does nothing, with users who come again in the second stage."""
    rng = np.random.default_rng(seed)
    bucket, taste, parts = rng.random(users), rng.normal(0, 1, users), []
    for number, (stage, share) in enumerate((("10%", 0.1), ("50%", 0.5))):
        come = np.flatnonzero(rng.random(users) < 0.8)
        parts.append(
            pd.DataFrame(
                {
                    "user_key": come,
                    "arm": np.where(bucket[come] < share, "treatment", "control"),
                    "stage": stage,
                    "y": number + taste[come] + rng.normal(0, 0.5, len(come)),
                    "s": 1.0 + rng.poisson(2, len(come)),
                    "x": taste[come] + rng.normal(0, 1, len(come)),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


@pytest.mark.parametrize("metric", [Metric(), Metric("y", "s")], ids=str)
def test_users_of_two_stages_against_a_sum_over_users(metric: Metric) -> None:
    frame = ramp(1)
    found = compare(summarise(frame, ("y", "s")), metric)
    groups = frame.groupby(["stage", "arm"])
    count = groups.size()
    means = groups[["y", "s"]].mean()
    weight = {stage: count[stage].prod() / count[stage].sum() for stage in ("10%", "50%")}
    total = sum(weight.values())
    standard = {
        arm: sum(weight[stage] / total * means.loc[(stage, arm)] for stage in weight)
        for arm in ("control", "treatment")
    }
    parts = []
    for (stage, arm), part in groups:
        rest = part[["y", "s"]] - means.loc[(stage, arm)]
        value = rest.y
        if metric.denominator:
            value = (rest.y - standard[arm].y / standard[arm].s * rest.s) / standard[arm].s
        sign = 1 if arm == "treatment" else -1
        parts.append(part.assign(part=sign * weight[stage] / total * value / len(part), more=1 / (len(part) - 1)))
    every = pd.concat(parts)
    by_user = (every.groupby("user_key")["part"].sum() ** 2).sum()
    by_user += (every["part"] ** 2 * every["more"]).sum()  # sample variances divide by n - 1
    assert_allclose(found.error, math.sqrt(by_user), rtol=1e-9)


@pytest.mark.slow
def test_a_ramp_of_returning_users_covers_the_truth() -> None:
    runs = 400
    linked, alone = [], []
    for seed in range(runs):
        frame = ramp(seed, 300)
        data = summarise(frame, ("y",), ("x",), user="user_key") if seed % 2 else summarise(frame, ("y",))
        linked.append(compare(data, method="z"))
        alone.append(compare(summarise(frame, ("y",), user=None), method="z"))
    spread = np.std([each.effect for each in linked])
    assert_allclose(np.mean([each.error for each in linked]) / spread, 1, atol=0.1)
    wrong, wrong_alone = (np.mean([each.rejects for each in group]) for group in (linked, alone))
    print(f"rejected {wrong:.3f} with users linked, {wrong_alone:.3f} as if they were others, of {runs}")
    assert wrong <= 0.05 + 2.58 * math.sqrt(0.05 * 0.95 / runs)


@pytest.mark.slow
def test_intervals_cover_the_truth() -> None:
    rng = np.random.default_rng(8)
    runs, covered = 600, {"ratio": 0, "relative": 0, "cuped": 0, "regression": 0}
    for _ in range(runs):
        arms = []
        for rate in (0.30, 0.33):
            x = rng.gamma(1.0, 1.0, 250)
            s = 1.0 + rng.poisson(x)
            arms.append({"y": rng.binomial(s.astype(int), rate).astype(float), "s": s, "x": x})
        data = Summaries.of(control=Moments.of(**arms[0]), treatment=Moments.of(**arms[1]))
        for name, options, truth in (
            ("ratio", {"metric": Metric("y", "s")}, 0.03),
            ("relative", {"metric": Metric("y", "s"), "relative": True}, 0.1),
            ("cuped", {"adjust": "cuped"}, 0.06),
            ("regression", {"adjust": "regression"}, 0.06),
        ):
            found = compare(data, **options)
            covered[name] += found.lower <= truth <= found.upper
    print({name: count / runs for name, count in covered.items()})
    assert min(covered.values()) / runs >= 0.95 - 2.58 * math.sqrt(0.95 * 0.05 / runs)


@pytest.mark.slow
def test_a_pooled_test_over_a_ramp_is_wrong_and_strata_are_right() -> None:
    rng = np.random.default_rng(2)
    runs, rejected = 600, {"pooled": 0, "strata": 0}
    for _ in range(runs):
        parts = []
        for stage, share, base in (("10%", 0.1, 0.30), ("50%", 0.5, 0.36)):
            count = rng.multinomial(2_000, [1 - share, share])
            good = rng.binomial(count, base)
            cells = [Cell("control", stage), Cell("treatment", stage)]
            parts.append(from_sums(("y",), cells, count, good[:, None], good[:, None, None]))
        data = parts[0] + parts[1]
        rejected["strata"] += compare(data, PROPORTION, method="z").rejects
        rejected["pooled"] += compare(data.over(), PROPORTION, method="z").rejects
    print({name: count / runs for name, count in rejected.items()})
    assert rejected["pooled"] / runs > 0.3
    assert rejected["strata"] / runs <= 0.05 + 2.58 * math.sqrt(0.05 * 0.95 / runs)


# ------------------------------------------------------------------------------------------------------ bad input


GOOD = two(y=sample(1), x=sample(2))


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (two(y=([], [1, 2])), {}, "arm control has 0 users"),
        (two(y=([1, 2], [1])), {}, "arm treatment has 1 users"),
        (GOOD, {"treatment": "placebo"}, "'placebo', which nobody declared"),
        (GOOD, {"treatment": "control"}, "both 'control'"),
        (GOOD, {"metric": "z"}, "the summary holds y, x"),
        (GOOD, {"metric": PROPORTION}, "not made of zeros and ones"),
        (GOOD, {"method": "exact"}, "method is 'exact'"),
        (GOOD, {"method": "z-pooled"}, "for proportions"),
        (GOOD, {"weights": "equal"}, "weights is 'equal'"),
        (GOOD, {"adjust": "magic"}, "adjust is 'magic'"),
        (GOOD, {"adjust": "cuped", "covariates": ()}, "it needs covariates"),
        (GOOD, {"interval": "fieller"}, "for relative effects"),
        (GOOD, {"interval": "exact"}, "interval is 'exact'"),
        (GOOD, {"alternative": "better"}, "alternative is 'better'"),
        (GOOD, {"margin": math.nan}, "margin is nan"),
        (GOOD, {"margin": -1.0, "relative": True}, "above -1"),
        (GOOD, {"confidence": 95}, "confidence is 95"),
        (two(y=([-1, -2], [1, 2])), {"relative": True}, "a control above zero"),
        (two(y=([1, 2], [-1, -2])), {"relative": True, "interval": "log"}, "a treatment above zero"),
        (two(y=([1, 2], [1, 2]), s=([0, 0], [1, 1])), {"metric": Metric("y", "s")}, "must be above zero in both arms"),
        (
            two(y=([1, 2, 3], [1, 2, 3]), x=([1, 2, 3], [1, 2, 3]), z=([1, 5, 3], [1, 0, 3])),
            {"adjust": "regression", "covariates": ("x", "z")},
            "too few to estimate",
        ),
    ],
)
def test_bad_questions_are_refused(data: Summaries, options: dict[str, Any], message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=message):
            compare(data, **options)


def test_no_number_looks_fine_that_is_not() -> None:
    silent = compare(two(y=(np.zeros(500), np.zeros(400))), PROPORTION, method="z-pooled")
    assert (silent.lower, silent.upper, silent.pvalue) == (-math.inf, math.inf, 1.0) and NO_VARIANCE in silent.warnings
    constant = compare(two(y=(np.full(50, 0.1 + 0.2), np.full(50, 0.3))))
    assert not constant.rejects and NO_VARIANCE in constant.warnings
    half = compare(two(y=(np.zeros(500), np.arange(500) < 20)), PROPORTION)
    assert any("the control does not vary" in text for text in half.warnings)
    assert any("only 0 events in the control" in text for text in half.warnings)
    few = compare(two(y=sample(3, (12, 100))))
    assert any("only 12 users in the control" in text for text in few.warnings)
    idle = compare(two(y=sample(3), x=(np.ones(80), np.ones(120))), adjust="cuped")
    assert any("does not vary" in text for text in idle.warnings)
    assert_allclose(idle.error, compare(two(y=sample(3))).error, rtol=1e-9)
    wild = compare(two(y=sample(3, (40, 40)), s=(np.linspace(-20, 21, 40), np.linspace(-20, 21, 40))), Metric("y", "s"))
    assert any("the ratio is unstable" in text for text in wild.warnings)


def test_strata_without_both_arms_are_left_out_and_counted() -> None:
    parts = [
        summarise({"arm": ["control", "treatment"] * 50, "y": np.arange(100.0) % 7, "stage": ["50%"] * 100}),
        summarise(
            {"arm": ["treatment"] * 40, "y": np.arange(40.0), "stage": ["100%"] * 40}, arms=("control", "treatment")
        ),
        summarise({"arm": ["control"] * 9 + ["treatment"], "y": np.arange(10.0), "stage": ["10%"] * 10}),
    ]
    found = compare(parts[0] + parts[1] + parts[2])
    alone = compare(parts[0])
    assert (found.control_count, found.treatment_count) == (50, 50)
    assert_allclose([found.effect, found.error, found.pvalue], [alone.effect, alone.error, alone.pvalue], rtol=1e-12)
    assert found.warnings[0].startswith("50 users are left out")
    with pytest.raises(InputError, match="there is nothing to compare"):
        compare(parts[1] + summarise({"arm": ["control"] * 9, "y": np.arange(9.0)}, arms=("control", "treatment")))


def test_an_effect_speaks() -> None:
    found = compare(GOOD, relative=True)
    assert isinstance(found, Effect) and "%" in str(found) and found.estimate.value == found.effect
    assert found.to_dict()["metric"] == "mean of y"
    with pytest.raises(InputError, match="a proportion of users has none"):
        Metric("y", "s", proportion=True)
