"""Off-policy evaluation: published figures, unbiasedness, intervals that cover, and refusals where they would not."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose

from calling_ai.core.errors import InputError, NotFoundError, RefusedError
from calling_ai.experiments.off_policy import (
    ESTIMATORS,
    Limits,
    call_chances,
    call_log,
    clipped_ips,
    compare_policies,
    cross_fit,
    diagnose,
    direct_method,
    doubly_robust,
    doubts,
    evaluate_policy,
    ips,
    logged,
    logged_actions,
    logged_calls,
    lost_weight,
    mean_interval,
    open_bandit,
    ridge,
    shrunk_doubly_robust,
    snips,
    standard_error,
    switch_doubly_robust,
    terms_of,
    users_needed,
)
from calling_ai.score.policy import Policy
from calling_ai.world.people import bfi_people
from calling_ai.world.town import Town, TownLog, policy_value

# ------------------------------------------------------------------------------------------------- published figures


@pytest.mark.parametrize(
    ("campaign", "items", "figures", "clipped"),
    [
        ("all", 80, (0.00235964, 0.00233371, 1.011109, 277.7778, 340.38), (0.00146220, 0.00208082, 0.00235964)),
        ("men", 34, (0.00300863, 0.00318942, 0.943314, 178.2531, 655.71), (0.00192199, 0.00300863, 0.00300863)),
    ],
)
def test_the_uniform_policy_from_bts_logs(
    shared: Path, campaign: str, items: int, figures: tuple[float, ...], clipped: tuple[float, ...]
) -> None:
    frame = open_bandit(shared / "data" / "open_bandit", "bts", campaign)
    uniform = np.full(items, 1 / items)
    log = logged_actions(frame["item_id"].to_numpy(), frame["click"], frame["propensity_score"], uniform)
    found = diagnose(log)
    ours = (ips(log).mean(), snips(log).mean(), found.mean_weight, found.largest_weight, found.effective_rows)
    for value, published, unit in zip(ours, figures, (5e-9, 5e-9, 5e-7, 5e-5, 5e-3), strict=True):
        assert abs(value - published) <= unit * 1.0001
    for limit, published in zip((1, 5, 10), clipped, strict=True):
        assert abs(clipped_ips(log, limit).mean() - published) <= 5e-9
    refused = evaluate_policy(log)
    assert refused.verdict == "cannot tell" and "skewed" in refused.reasons[0]
    with pytest.raises(RefusedError, match="nobody can tell"):
        refused.require()


def test_on_policy_click_rates(shared: Path) -> None:
    for ran, rate in (("random", 0.0038), ("bts", 0.0042)):
        frame = open_bandit(shared / "data" / "open_bandit", ran, "all")
        same = logged(frame["click"], frame["propensity_score"], frame["propensity_score"])
        assert ips(same).mean() == snips(same).mean() == frame["click"].mean() == rate


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="bts_women.csv.gz"):
        open_bandit(tmp_path, "bts", "women")


# -------------------------------------------------------------------------------------------------------- properties


def bandit(seed: int, rows: int = 4_000, actions: int = 3) -> tuple[dict[str, Any], float]:
    """Return a log of a contextual bandit with a cross-fitted-like wrong model, and the true value of the target."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=rows)
    score = np.outer(x, np.linspace(-1, 1, actions))
    ran = np.exp(score) / np.exp(score).sum(axis=1, keepdims=True) * 0.85 + 0.05
    target = np.exp(-score) / np.exp(-score).sum(axis=1, keepdims=True)
    mean = 1 / (1 + np.exp(-(0.3 * x[:, None] + np.linspace(-0.5, 0.8, actions))))
    action = (ran.cumsum(axis=1) > rng.random((rows, 1))).argmax(axis=1)
    reward = (rng.random(rows) < mean[np.arange(rows), action]).astype(float)
    chance = ran[np.arange(rows), action]
    given_ = {
        "action": action,
        "reward": reward,
        "propensity": chance,
        "target": target,
        "predicted": mean * 0.7 + 0.1,
        "ran": ran,
    }
    return given_, float((target * mean).sum(axis=1).mean())


def test_unbiased_estimators_are_unbiased_and_the_model_is_not() -> None:
    values: dict[str, list[float]] = {name: [] for name in ESTIMATORS}
    truths = []
    for seed in range(150):
        arguments, truth = bandit(seed, 1_000)
        log = logged_actions(**arguments)
        truths.append(truth)
        for name in ESTIMATORS:
            values[name].append(float(terms_of(log, name).mean()))
    errors = {name: np.array(found) - truths for name, found in values.items()}
    z = {name: error.mean() / (error.std(ddof=1) / np.sqrt(len(error))) for name, error in errors.items()}
    assert all(abs(z[name]) < 3.5 for name in ("ips", "snips", "dr")) and abs(z["dm"]) > 20
    assert errors["dr"].std() < errors["ips"].std()


def test_corrections_disappear_where_they_must() -> None:
    arguments, _ = bandit(1)
    log = logged_actions(**arguments)
    assert_allclose(switch_doubly_robust(log, 1e9), doubly_robust(log))
    assert_allclose(switch_doubly_robust(log, 1e-9), direct_method(log))
    assert_allclose(shrunk_doubly_robust(log, np.inf), doubly_robust(log))
    assert_allclose(shrunk_doubly_robust(log, 1e-12), direct_method(log), atol=1e-6)
    assert_allclose(clipped_ips(log, 1e9), ips(log))
    no_model = logged_actions(**{**arguments, "predicted": np.zeros(3)})
    assert_allclose(doubly_robust(no_model), ips(no_model))
    assert lost_weight(log, "dr") == 0 < lost_weight(log, "switch", 2.0) < 1


@given(
    arrays(float, 30, elements=st.floats(-5, 5)),
    arrays(float, 30, elements=st.floats(0.05, 1)),
    arrays(float, 30, elements=st.floats(0.01, 1)),
    st.floats(-3, 3),
)
def test_snips_follows_a_shift_of_rewards(
    reward: np.ndarray, chance: np.ndarray, target: np.ndarray, shift: float
) -> None:
    before, after = (snips(logged(reward + move, chance, target)).mean() for move in (0.0, shift))
    assert_allclose(after, before + shift, atol=1e-9)
    log = logged(reward, chance, target)
    assert reward.min() - 1e-9 <= before <= reward.max() + 1e-9
    assert 0 < diagnose(log).effective_rows <= 30 + 1e-9


@given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 2**31))
def test_the_standard_error_counts_users(users: int, each: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=users)
    user = np.repeat(np.arange(users), each)
    assert_allclose(standard_error(np.repeat(values, each), user), values.std(ddof=1) / np.sqrt(users), rtol=1e-9)
    order = np.random.default_rng(seed + 1).permutation(len(user))
    assert_allclose(
        standard_error(np.repeat(values, each)[order], user[order]),
        standard_error(np.repeat(values, each), user),
        rtol=1e-9,
    )


def test_t_bootstrap_and_scipy_agree() -> None:
    from scipy import stats

    values = np.random.default_rng(0).gamma(2, size=300)
    ours = mean_interval(values, np.arange(300))
    theirs = stats.ttest_1samp(values, 0).confidence_interval()
    assert_allclose([ours.lower, ours.upper], [theirs.low, theirs.high], rtol=1e-9)
    drawn = mean_interval(values, np.arange(300), method="bootstrap")
    assert_allclose([drawn.lower, drawn.upper], [ours.lower, ours.upper], atol=0.02)


def test_bernstein_holds_where_t_does_not() -> None:
    """One rare large reward: with 40 rows t misses the truth in most runs, the bound does not."""
    rng, misses = np.random.default_rng(1), {"t": 0, "bernstein": 0}
    for _ in range(300):
        terms = (rng.random(40) < 0.02) * 1.0
        for method in misses:
            found = mean_interval(terms, np.arange(40), method=method, bounds=(0, 1))
            misses[method] += not found.lower <= 0.02 <= found.upper
    assert misses["t"] > 100 and misses["bernstein"] == 0
    assert users_needed((np.arange(40) == 0) * 1.0, np.arange(40)) > 40, "and the skewness rule refuses to use t there"


# ------------------------------------------------------------------------------------------------------------- calls


@pytest.fixture(scope="module")
def lived() -> TownLog:
    """Return a town's log with known truth."""
    return Town(bfi_people().head(500), seed=5).simulate(3, Policy(threshold=0.66, exploration=0.04))


def test_a_model_never_sees_the_users_that_it_predicts(lived: TownLog) -> None:
    user = np.repeat(np.arange(30), 4)
    reward = np.random.default_rng(0).normal(size=120)
    seen: list[set[int]] = []

    def spy(features: np.ndarray, values: np.ndarray) -> Any:
        seen.append(set(features[:, 0].astype(int)))
        return lambda other: np.where(np.isin(other[:, 0].astype(int), list(seen[-1])), 1.0, 0.0)

    leaked = cross_fit(user[:, None].astype(float), reward, user, np.ones(120, bool), spy)
    assert len(seen) == 5 and not leaked.any()
    with pytest.raises(InputError, match="folds is 40"):
        cross_fit(user[:, None], reward, user, np.ones(120, bool), ridge, 40)


def test_outcomes_that_never_came_do_not_bias(lived: TownLog) -> None:
    frame = lived.decisions.copy()
    log = call_log(frame)
    rng = np.random.default_rng(3)
    frame.loc[rng.random(len(frame)) < 0.4, "outcome_score"] = np.nan
    fewer = call_log(frame)
    assert fewer.heard.sum() < 0.65 * log.heard.sum()
    chances = call_chances(log, Policy(threshold=0.64, exploration=0.04))
    full, part = (evaluate_policy(logged_calls(item, chances)).require() for item in (log, fewer))
    assert abs(full.value - part.value) < 1.2 * (part.upper - part.lower) / 2
    assert abs(diagnose(logged_calls(fewer, chances)).mean_weight - 1) < 0.1


def test_a_comparison_waits_for_outcomes(lived: TownLog) -> None:
    """Outcomes that come quickly are not like those that come slowly, so a log with few of them says nothing yet."""
    frame = lived.decisions.assign(settled=lived.decisions["decided_at"] < lived.ends_at - pd.Timedelta(days=7))
    policies = {"champion": Policy(threshold=0.66, exploration=0.04), "near": Policy(threshold=0.65, exploration=0.04)}
    early = frame.assign(
        outcome_score=frame["outcome_score"].mask(frame["received_at"] > frame["decided_at"] + pd.Timedelta(hours=6))
    )
    found = compare_policies(call_log(early), policies)
    assert found.differences["near"] is None and "of the calls are known" in found.reasons["near"][0]
    ripe = call_log(frame, settled_only=True)
    assert 0 < len(ripe) == int(frame["settled"].sum()) < len(frame)
    assert compare_policies(ripe, policies).differences["near"] is not None


def test_policies_without_support_are_refused(lived: TownLog) -> None:
    frame = lived.decisions.assign(propensity=lived.decisions["called"].astype(float))
    with_hard = call_log(frame)
    log = logged_calls(with_hard, call_chances(with_hard, Policy(threshold=0.60, exploration=0.0)))
    assert "never taken" in evaluate_policy(log).reasons[0]
    refused = lived.decisions.assign(refused=False)
    some = np.random.default_rng(0).random(len(refused)) < 0.2
    refused.loc[some, ["refused", "called", "propensity"]] = [True, False, 0.0]
    log_refused = call_log(refused)
    assert (call_chances(log_refused, Policy())[some] == 0).all()
    everybody = evaluate_policy(logged_calls(log_refused, np.ones(len(refused))))
    assert everybody.value is None and "20.0% of its actions" in " ".join(everybody.reasons).replace(
        "19.", "20."
    ).replace("20.1", "20.0")


def test_wrong_propensities_are_found(lived: TownLog) -> None:
    frame = lived.decisions.assign(propensity=np.where(lived.decisions["propensity"] > 0.5, 0.8, 0.2))
    log = call_log(frame)
    found = evaluate_policy(logged_calls(log, call_chances(log, Policy(threshold=0.69, exploration=0.04))))
    assert found.value is None and any("mean weight" in reason for reason in found.reasons)


def test_the_paired_difference_is_narrower_and_right(lived: TownLog) -> None:
    log = call_log(lived.decisions)
    truth = lived.truth["truth_probability"].to_numpy()
    policies = {
        "champion": Policy(threshold=0.66, exploration=0.04),
        "near": Policy(threshold=0.665, exploration=0.04),
        "good": np.where(truth > 0.5, 0.96, 0.04),
    }
    for estimator in ("ips", "snips", "dr", "dros"):
        found = compare_policies(log, policies, estimator=estimator)
        for name in ("near", "good"):
            true = (
                policy_value(lived, call_chances(log, policies[name]))
                - policy_value(lived, call_chances(log, policies["champion"]))
            ) / 1000
            difference = found.differences[name]
            assert difference is not None and difference.lower - 0.004 < true < difference.upper + 0.004
        near, champion = found.differences["near"], found.values["champion"].require()
        assert near is not None and near.upper - near.lower < champion.upper - champion.lower
        assert found.verdicts["good"] == "better" and found.table().loc["champion", "verdict"] == "baseline"
    reverse = compare_policies(log, policies, "good")
    assert reverse.verdicts["champion"] == "worse"


@pytest.mark.slow
def test_intervals_cover_the_truth_at_the_stated_rate_and_refuse_where_they_would_not() -> None:
    """Users, calls and outcomes drawn anew from a town whose probabilities are known."""
    from importlib.util import module_from_spec, spec_from_file_location

    path = Path(__file__).parent.parent / "benchmarks" / "bench_off_policy.py"
    spec = spec_from_file_location("bench_off_policy", path)
    assert spec is not None and spec.loader is not None
    bench = module_from_spec(spec)
    spec.loader.exec_module(bench)
    table = bench.coverage(runs=40, people=400, sizes=(150,), explorations=(0.001, 0.02, 0.1))
    print(table.to_string(float_format="{:.3f}".format))
    told = table[table["told"] >= 25]
    rows = told["told"].sum()
    for estimator in ("ips", "snips", "dr"):
        overall = (told[estimator] * told["told"]).sum() / rows
        print(f"{estimator}: {overall:.3f} of {rows:,} intervals of nominally 95 % cover")
        assert overall > 0.925
        assert (told[estimator] > 0.82).all()
    assert (table.sort_index().loc[(0.001,), "told"].drop("the same").to_numpy() <= 3).all()
    assert table.loc[(0.1,), "told"].min() >= 33


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"reward": []}, "reward is empty"),
        ({"reward": [1, np.nan]}, "reward of row 1 is nan"),
        ({"reward": [1, np.inf]}, "reward of row 1 is inf"),
        ({"propensity": [0.5, 0.0]}, "propensity of row 1 is 0"),
        ({"propensity": [0.5, 1.5]}, "propensity of row 1 is 1.5"),
        ({"propensity": [0.5]}, "propensity has shape"),
        ({"target": [0.5, -0.1]}, "target of row 1 is -0.1"),
        ({"target": [0.5, np.nan]}, "target of row 1 is nan"),
        ({"user": ["a"]}, "user has shape"),
        ({"predicted_taken": [0, 0]}, "must be given together"),
    ],
)
def test_a_bad_log_is_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        logged(**({"reward": [1, 0], "propensity": [0.5, 0.5], "target": [0.5, 0.5]} | change))


def test_bad_questions_are_refused(lived: TownLog) -> None:
    arguments, _ = bandit(0, 50)
    log = logged_actions(**arguments)
    for call, why in (
        (lambda: evaluate_policy(log, "magic"), "estimator is 'magic'"),
        (lambda: evaluate_policy(log, "dr", limit=3), "dr has none"),
        (lambda: evaluate_policy(log, "switch", limit=-1), "limit is -1"),
        (lambda: mean_interval(np.ones(3), np.arange(3), method="magic"), "method is 'magic'"),
        (lambda: mean_interval(np.ones(3), np.arange(3), 1.5), "confidence is 1.5"),
        (
            lambda: mean_interval(np.ones(3) * 3, np.arange(3), method="bernstein", bounds=(0, 1)),
            "must lie in the bounds",
        ),
        (lambda: logged_actions(np.array([0, 5]), [1, 0], [0.5, 0.5], [0.5, 0.5]), "action reaches from 0 to 5"),
        (lambda: logged_actions(np.array([0, 1]), [1, 0], [0.5, 0.5], [0.5, 0.6]), "adds up to 1.1"),
        (lambda: logged_actions(np.array([0.5]), [1], [0.5], [0.5, 0.5]), "one whole number a row"),
        (lambda: snips(logged([1.0], [0.5], [0.0])), "target is 0 in every row"),
        (lambda: call_log(lived.decisions.head(0)), "frame is empty"),
        (lambda: call_log(lived.decisions.assign(propensity=0.0)), "must have had a chance"),
        (lambda: call_chances(call_log(lived.decisions), np.full(3, 0.5)), "policy has shape"),
        (lambda: compare_policies(call_log(lived.decisions), {"one": Policy()}), "at least two"),
        (
            lambda: logged_calls(call_log(lived.decisions.assign(outcome_score=np.nan)), np.full(len(lived), 0.5)),
            "no outcome of any call",
        ),
    ):
        with pytest.raises(InputError, match=why):
            call()


def test_one_user_and_few_users_get_no_number() -> None:
    log = logged([1, 0] * 500, [0.5] * 1000, [0.5] * 1000, ["only"] * 1000)
    assert np.isinf(mean_interval(ips(log), log.user).upper)
    found = evaluate_policy(log)
    assert (
        found.value is None
        and found.reasons[0].startswith("1 users")
        and "one user carries 100%" in " ".join(found.reasons)
    )
    fine = logged([1, 0] * 500, [0.5] * 1000, [0.5] * 1000)
    assert evaluate_policy(fine, "ips").verdict == "supported"
    assert evaluate_policy(fine, "ips", limits=Limits(effective_rows=2_000)).value is None
    assert doubts(diagnose(fine)) == []
    assert isinstance(pd.DataFrame([diagnose(fine).to_dict()]), pd.DataFrame)
