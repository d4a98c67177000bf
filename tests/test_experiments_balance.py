"""The balance of the split against published numbers, scipy, and by simulation (B28)."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.special import gammaln

from calling_ai.core.errors import InputError
from calling_ai.experiments.balance import (
    CONCENTRATION,
    LEVEL,
    Watch,
    check_split,
    counts_by_stage,
    log_dirichlet_multinomial,
    log_evalue,
    log_multinomial,
    mismatch_by_stage,
    ratio_mismatch,
)
from calling_ai.experiments.summaries import summarise

HALF = {"control": 0.5, "treatment": 0.5}


@pytest.mark.parametrize(
    ("counts", "statistic", "pvalue"),
    [
        ((600, 400), 40, 2.54e-10),
        ((44_000, 45_000), 11.23596, 0.000802),
        ((821_588, 815_482), 22.77437, 1.82e-6),
    ],
)
def test_published_mismatches(counts: tuple[int, int], statistic: float, pvalue: float) -> None:
    found = ratio_mismatch(dict(zip(HALF, counts, strict=True)), HALF)
    assert_allclose([found.statistic, found.pvalue], [statistic, pvalue], rtol=3e-3)
    assert round(found.statistic, 5) == statistic and found.mismatch


def test_a_published_sequence() -> None:
    batches = ([20, 17, 9], [18, 21, 8], [4, 6, 4], [18, 19, 11])
    expected = [
        (-7.028201432058, -4.077640646606),
        (-11.947847738359, -8.265946861100),
        (-15.471401950258, -11.610743519545),
        (-19.964845210904, -15.781031228536),
    ]
    prior, m1, m0 = np.ones(3), 0.0, 0.0
    for batch, pair in zip(batches, expected, strict=True):
        m1, m0 = m1 + log_dirichlet_multinomial(batch, prior), m0 + log_multinomial(batch, (0.4, 0.4, 0.2))
        prior = prior + batch
        assert_allclose((m1, m0), pair, rtol=1e-12)
        assert_allclose(log_evalue(prior - 1, (0.4, 0.4, 0.2), np.ones(3)), m1 - m0, rtol=1e-11)


@given(st.lists(st.integers(5, 500), min_size=2, max_size=5), st.integers(0, 100))
def test_one_look_against_scipy(counts: list[int], seed: int) -> None:
    from scipy import stats

    share = np.random.default_rng(seed).dirichlet(np.full(len(counts), 5.0))
    arms = [f"arm {i}" for i in range(len(counts))]
    found = ratio_mismatch(dict(zip(arms, counts, strict=True)), dict(zip(arms, share.tolist(), strict=True)))
    oracle = stats.chisquare(counts, share * sum(counts))
    assert_allclose([found.statistic, found.pvalue], [oracle.statistic, oracle.pvalue], rtol=1e-6, atol=1e-300)


def test_yates_correction_by_hand() -> None:
    found = ratio_mismatch({"control": 55, "treatment": 45}, HALF, correction=True)
    assert_allclose(found.statistic, 2 * 4.5**2 / 50, rtol=1e-12)
    assert found.method == "chi-square, Yates"


def test_a_ramp_is_judged_stage_by_stage() -> None:
    ramp = {"10%": {"control": 900, "treatment": 100}, "50%": {"control": 500, "treatment": 500}}
    shares = {"10%": {"control": 0.9, "treatment": 0.1}, "50%": HALF}
    assert_allclose(ratio_mismatch({"control": 1_400, "treatment": 600}, HALF).statistic, 320, rtol=1e-12)
    for returning in (False, True):
        found = mismatch_by_stage(ramp, shares, returning=returning)
        assert (found.statistic, found.pvalue, found.mismatch) == (0.0, 1.0, False)
    rng = np.random.default_rng(0)
    alarms = {False: 0, True: 0}
    for _ in range(2_000):
        counts = {
            stage: dict(zip(share, map(int, rng.multinomial(1_000, list(share.values()))), strict=True))
            for stage, share in shares.items()
        }
        for returning in alarms:
            alarms[returning] += mismatch_by_stage(counts, shares, 0.05, returning).mismatch
    assert all(0.03 < count / 2_000 <= 0.05 + 2.58 * math.sqrt(0.05 * 0.95 / 2_000) for count in alarms.values())


def test_counts_come_from_summaries() -> None:
    data = summarise({"arm": ["a", "a", "a"], "y": [1, 2, 3], "stage": ["1", "1", "2"]}, arms=("a", "b"))
    assert counts_by_stage(data) == {"1": {"a": 2, "b": 0}, "2": {"a": 1, "b": 0}}


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=12))
def test_batches_may_be_cut_anywhere(batches: list[tuple[int, int]]) -> None:
    watch = Watch()
    for control, treatment in batches:
        watch = watch.update({"control": control, "treatment": treatment}, HALF)
    total = np.sum(batches, axis=0)
    at_once = Watch().update({"control": int(total[0]), "treatment": int(total[1])}, HALF)
    assert_allclose(watch.evidence, at_once.evidence, rtol=1e-9, atol=1e-9)
    n, a = total.astype(float), np.array([500.0, 500.0])
    by_hand = gammaln(1e3) - gammaln(1e3 + n.sum()) + (gammaln(a + n) - gammaln(a)).sum() - n.sum() * math.log(0.5)
    assert_allclose(watch.evidence, by_hand, rtol=1e-9, atol=1e-9)
    assert watch.highest >= max(watch.evidence, 0) - 1e-12 and watch.balance.pvalue <= 1


def test_an_alarm_stays_an_alarm() -> None:
    watch = Watch().update({"control": 5_000, "treatment": 4_000}, HALF, "50%")
    assert watch.balance.mismatch
    healed = watch.update({"control": 4_000, "treatment": 5_000}, HALF, "50%")
    assert healed.balance.mismatch and healed.evidence < watch.evidence
    assert healed.balance.pvalue == watch.balance.pvalue
    assert not Watch().balance.mismatch and Watch().balance.pvalue == 1.0


@pytest.mark.slow
def test_b28_false_alarms_and_the_time_to_find_48_to_52() -> None:
    rng = np.random.default_rng(28)
    runs, step, users = 10_000, 50, 20_000
    looks = np.arange(step, users + 1, step)
    shares = {}
    for share in (0.5, 0.52, 0.48):
        ever = 0
        for _ in range(10):  # in parts, to keep the memory small
            treated = np.cumsum(rng.binomial(step, share, (runs // 10, len(looks))), axis=1)
            evidence = log_evalue(np.stack([looks - treated, treated], axis=-1), (0.5, 0.5))
            ever += int((evidence.max(axis=1) >= math.log(1 / LEVEL)).sum())
        shares[share] = ever / runs
    upper = shares[0.5] + 2.33 * math.sqrt(max(shares[0.5], 1 / runs) / runs)
    print(
        f"false alarms {shares[0.5]:.4f} (99 % upper bound {upper:.4f}), "
        f"48/52 found {min(shares[0.52], shares[0.48]):.4f}"
    )
    assert upper <= 0.01
    assert min(shares[0.52], shares[0.48]) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("returning", [False, True])
def test_a_sound_ramp_raises_no_alarm(returning: bool) -> None:
    rng = np.random.default_rng(5)
    runs, step, alarms = 4_000, 100, 0
    stages = (("10%", 0.1), ("50%", 0.5), ("90%", 0.9))
    looks = np.arange(step, 5_001, step)
    best, before = np.full(runs, -np.inf), np.zeros(runs)
    bucket = rng.random((runs, 5_000)).astype(np.float32)  # the hash of users who come in every stage
    for number, (_, share) in enumerate(stages, 1):
        drawn = bucket if returning else rng.random((runs, 5_000)).astype(np.float32)
        treated = np.cumsum((drawn < share).reshape(runs, len(looks), step).sum(axis=2), axis=1)
        evidence = log_evalue(np.stack([looks - treated, treated], axis=-1), (1 - share, share))
        if returning:
            best = np.maximum(best, evidence.max(axis=1) - math.log(number * (number + 1)))
        else:
            best = np.maximum(best, before + evidence.max(axis=1))
            before = before + evidence[:, -1]
        if number == 1:  # the vectorised evidence is that of the watch
            watch = Watch(returning=returning)
            watch = watch.update(
                {"c": int(5_000 - treated[0, -1]), "t": int(treated[0, -1])}, {"c": 1 - share, "t": share}
            )
            assert_allclose(watch.by_stage[""], evidence[0, -1], rtol=1e-9)
    alarms = int((best >= math.log(1 / LEVEL)).sum())
    print(f"{alarms} alarms in {runs} sound ramps, returning={returning}")
    assert alarms / runs + 2.33 * math.sqrt(max(alarms, 1)) / runs <= LEVEL


def test_a_watch_over_stages_multiplies_or_allows() -> None:
    one = {"control": 950, "treatment": 50}
    shares = {"control": 0.9, "treatment": 0.1}
    fresh, again = (
        Watch(returning=returning).update(one, shares, "10%").update({"control": 480, "treatment": 520}, HALF, "50%")
        for returning in (False, True)
    )
    parts = list(fresh.by_stage.values())
    assert_allclose(fresh.evidence, sum(parts), rtol=1e-12)
    assert_allclose(again.evidence, max(parts[0] - math.log(2), parts[1] - math.log(6)), rtol=1e-12)
    assert fresh.balance.expected == {"control": 1_400.0, "treatment": 600.0}
    assert fresh.concentration == CONCENTRATION


@pytest.mark.parametrize(
    ("counts", "shares", "message"),
    [
        ({"a": 5}, {"a": 1.0}, "two arms or more"),
        ({"a": 5, "b": 5}, {"a": 0.5, "b": 0.6}, "add up to one"),
        ({"a": 5, "b": 5}, {"a": 1.0, "b": 0.0}, "above zero"),
        ({"a": 5, "b": 5}, {"a": math.nan, "b": 0.5}, "above zero"),
        ({"a": 5}, {"a": 0.5, "b": 0.5}, "lack the arm 'b'"),
        ({"a": 5, "b": 5, "c": 1}, {"a": 0.5, "b": 0.5}, "nobody declared"),
        ({"a": 5, "b": -5}, {"a": 0.5, "b": 0.5}, "zero or more"),
        ({"a": 5, "b": 0.5}, {"a": 0.5, "b": 0.5}, "whole number"),
        ({"a": 5, "b": math.nan}, {"a": 0.5, "b": 0.5}, "whole number"),
    ],
)
def test_bad_splits_are_refused(counts: dict, shares: dict, message: str) -> None:
    for call in (check_split, ratio_mismatch, Watch().update):
        with pytest.raises(InputError, match=message):
            call(counts, shares)


def test_other_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="nobody came yet"):
        ratio_mismatch({"control": 0, "treatment": 0}, HALF)
    with pytest.raises(InputError, match="level is 1"):
        ratio_mismatch({"control": 1, "treatment": 0}, HALF, level=1)
    with pytest.raises(InputError, match="Yates' correction is for two"):
        ratio_mismatch({"a": 1, "b": 1, "c": 1}, {"a": 0.2, "b": 0.3, "c": 0.5}, correction=True)
    with pytest.raises(InputError, match="there is no stage"):
        mismatch_by_stage({}, {})
    with pytest.raises(InputError, match="has no shares"):
        mismatch_by_stage({"x": {"control": 1, "treatment": 1}}, {"y": HALF})
    with pytest.raises(InputError, match="begins a new stage"):
        Watch().update({"control": 1, "treatment": 1}, HALF).update(
            {"control": 1, "treatment": 1}, {"control": 0.9, "treatment": 0.1}
        )
    with pytest.raises(InputError, match="concentration is 0"):
        Watch(concentration=0)
    with pytest.raises(InputError, match="level is 0"):
        Watch(level=0)
    few = ratio_mismatch({"control": 3, "treatment": 4}, HALF)
    assert "rough guide" in few.warnings[0]
    everyone_lost = Watch().update({"control": 1_000, "treatment": 0}, HALF)
    assert everyone_lost.balance.mismatch
