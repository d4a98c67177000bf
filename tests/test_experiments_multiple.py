"""Adjusted p-values and e-values against statsmodels, brute force over all sets, and by simulation."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from calling_ai.core.errors import InputError
from calling_ai.experiments.inference import Effect
from calling_ai.experiments.multiple import (
    METHODS,
    benjamini_hochberg,
    bonferroni,
    closed_evalues,
    closed_testing,
    correct,
    e_benjamini_hochberg,
    evalue_of,
    fisher,
    holm,
    hommel,
    simes,
)

many = st.lists(st.floats(0, 1), min_size=1, max_size=12)
few = st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.01, 0.01, 0.02, 0.05])), min_size=1, max_size=6)
NAMES = {"holm": "holm", "hommel": "hommel", "benjamini-hochberg": "fdr_bh", "benjamini-yekutieli": "fdr_by"}


@pytest.mark.parametrize("method", METHODS)
@given(pvalues=many)
def test_against_statsmodels(method: str, pvalues: list[float]) -> None:
    from statsmodels.stats.multitest import multipletests

    oracle = multipletests(pvalues, method=NAMES[method])[1]
    found = METHODS[method](pvalues)
    assert_allclose(found, oracle, rtol=1e-9, atol=1e-12)
    order = np.argsort(pvalues, kind="stable")
    assert (np.diff(found[order]) >= -1e-12).all()  # monotone
    assert (found >= np.array(pvalues) - 1e-12).all() and (found <= 1).all()


@given(few)
def test_closed_testing_is_holm_and_hommel(pvalues: list[float]) -> None:
    assert_allclose(closed_testing(pvalues, bonferroni), holm(pvalues), rtol=1e-9)
    assert_allclose(closed_testing(pvalues, simes), hommel(pvalues), rtol=1e-9)


def test_tests_of_sets_against_scipy() -> None:
    from scipy import stats

    p = np.array([0.02, 0.3, 0.11])
    assert_allclose(fisher(p), stats.combine_pvalues(p, "fisher").pvalue, rtol=1e-12)
    assert_allclose(benjamini_hochberg(p).min(), simes(p), rtol=1e-12)


evalues_of = st.lists(st.floats(0, 1e4), min_size=1, max_size=6)


@given(evalues_of)
def test_closed_evalues_by_brute_force(evalues: list[float]) -> None:
    e = np.array(evalues)
    expected = [
        min(e[list(s)].mean() for n in range(1, len(e) + 1) for s in combinations(range(len(e)), n) if i in s)
        for i in range(len(e))
    ]
    assert_allclose(closed_evalues(e), expected, rtol=1e-9)


@given(evalues_of, st.sampled_from([0.01, 0.05, 0.2]))
def test_e_benjamini_hochberg_by_definition(evalues: list[float], level: float) -> None:
    e = np.array(evalues)
    ordered = np.sort(e)[::-1]
    ranks = np.flatnonzero(np.arange(1, len(e) + 1) * ordered / len(e) >= 1 / level)
    expected = e >= ordered[ranks.max()] if len(ranks) else np.zeros(len(e), dtype=bool)
    found = e_benjamini_hochberg(e)
    assert ((found >= 1 / level) == expected).all()
    assert (np.diff(found[np.argsort(e, kind="stable")]) >= 0).all()


def test_infinite_evalues_are_rejected_and_the_rest_is_not() -> None:
    assert e_benjamini_hochberg([np.inf, 1.0]).tolist() == [np.inf, 1.0]
    assert closed_evalues([np.inf, 1.0])[1] == 1.0
    assert evalue_of(0.0) == np.inf
    draws = np.asarray(evalue_of(np.random.default_rng(0).random(200_000)))
    assert draws.mean() < 1.02


@pytest.mark.slow
def test_promises_are_kept_under_dependence() -> None:
    rng = np.random.default_rng(1)
    runs, arms, truth = 4_000, 8, np.arange(8) < 2
    from scipy.special import ndtr

    common = rng.normal(0, 1, (runs, 1))  # all arms share one control
    z = np.sqrt(0.5) * common + np.sqrt(0.5) * rng.normal(0, 1, (runs, arms)) + 3 * truth
    p = ndtr(-z)
    e = np.exp(2 * z - 2)  # likelihood ratio of a shift by 2
    wrong = {}
    for name, procedure in METHODS.items():
        claims = np.array([procedure(row) <= 0.05 for row in p])
        wrong[name] = (
            (claims & ~truth).any(axis=1).mean(),
            ((claims & ~truth).sum(axis=1) / np.maximum(claims.sum(axis=1), 1)).mean(),
        )
    for name, procedure in (("closed e", closed_evalues), ("e-BH", e_benjamini_hochberg)):
        claims = np.array([procedure(row) >= 20 for row in e])
        wrong[name] = (
            (claims & ~truth).any(axis=1).mean(),
            ((claims & ~truth).sum(axis=1) / np.maximum(claims.sum(axis=1), 1)).mean(),
        )
    print({name: (round(any_, 4), round(rate, 4)) for name, (any_, rate) in wrong.items()})
    edge = 0.05 + 2.58 * np.sqrt(0.05 * 0.95 / runs)
    for name in ("holm", "hommel", "closed e"):
        assert wrong[name][0] <= edge
    for name in ("benjamini-hochberg", "benjamini-yekutieli", "e-BH"):
        assert wrong[name][1] <= edge


def test_effects_are_corrected_by_name() -> None:
    effects = {name: Effect(0, d, d, d - 1, d + 1, p, 0.95, "z") for name, d, p in (("a", 2.0, 0.01), ("b", 1.0, 0.04))}
    found = correct(effects)
    assert found.rejected == ("a", "b") and [each.pvalue for each in found.effects] == [0.02, 0.04]
    assert "holm over 2" in found.effects[0].method and effects["a"].pvalue == 0.01


@pytest.mark.parametrize("bad", [[], [[0.1]], [0.1, float("nan")], [-0.1], [1.1]])
def test_what_is_no_pvalue_is_refused(bad: list) -> None:
    for procedure in (*METHODS.values(), closed_testing):
        with pytest.raises(InputError, match="pvalue"):
            procedure(bad)


@pytest.mark.parametrize("bad", [[], [float("nan")], [-1.0]])
def test_what_is_no_evalue_is_refused(bad: list) -> None:
    for procedure in (closed_evalues, e_benjamini_hochberg):
        with pytest.raises(InputError, match="evalue"):
            procedure(bad)


def test_other_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="at most 15"):
        closed_testing([0.5] * 16)
    with pytest.raises(InputError, match="kappa is 1"):
        evalue_of(0.5, 1)
    with pytest.raises(InputError, match="effects is empty"):
        correct({})
    with pytest.raises(InputError, match="method is 'none'"):
        correct({"a": Effect(0, 1, 1, 0, 2, 0.5, 0.95, "z")}, "none")
