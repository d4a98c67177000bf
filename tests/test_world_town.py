"""The town: reproducible, honest about the future, exact in its propensities, and as hard as it says."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from calling_ai.core.contract import FEATURE_NAMES, HISTORY, KNOWN_COLUMNS, NEUTRAL, feature_table, index_of
from calling_ai.core.errors import InputError
from calling_ai.score.formula import formula
from calling_ai.score.policy import Decisions, Policy, decide
from calling_ai.store.history import days, history_features
from calling_ai.world.people import synthetic_people
from calling_ai.world.town import (
    WEEK_IDS,
    BestPolicy,
    Town,
    TownLog,
    TownOptions,
    best_policy,
    expected_score,
    policy_value,
)

HISTORY_NAMES = list(FEATURE_NAMES[HISTORY])


def area(score: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve from ranks."""
    ranks, positive = pd.Series(np.asarray(score)).rank().to_numpy(), np.asarray(positive, bool)
    return (ranks[positive].mean() - (positive.sum() + 1) / 2) / (~positive).sum()


@pytest.fixture(scope="module")
def town() -> Town:
    return Town(synthetic_people(400, seed=1), seed=7)


@pytest.fixture(scope="module")
def log(town: Town) -> TownLog:
    return town.simulate(5)


@pytest.fixture(scope="module")
def large() -> TownLog:
    return Town(synthetic_people(2_000, seed=3), seed=11).simulate(5)


def same(one: TownLog, two: TownLog) -> None:
    for name in ("decisions", "outcomes", "truth"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(two, name), check_exact=True)


def test_the_same_seed_gives_the_same_bytes(town: Town, log: TownLog) -> None:
    same(log, Town(synthetic_people(400, seed=1), seed=7).simulate(5))
    other = Town(synthetic_people(400, seed=1), seed=8).simulate(1)
    assert not other.decisions["formula_score"].head(50).equals(log.decisions["formula_score"].head(50))


def test_a_longer_simulation_begins_with_the_shorter_one(town: Town, log: TownLog) -> None:
    short = town.simulate(3)
    rows = len(short)
    assert 0 < rows < len(log)
    for name in ("decisions", "truth"):
        pd.testing.assert_frame_equal(getattr(short, name), getattr(log, name).head(rows), check_exact=True)
    earlier = log.outcomes[log.outcomes["record_id"].isin(short.decisions["record_id"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(short.outcomes, earlier, check_exact=True)


def test_a_continued_simulation_equals_an_uninterrupted_one(town: Town, log: TownLog) -> None:
    first = town.simulate(2)
    before = first.decisions.copy()
    rest = town.simulate(3, after=first)
    assert rest.weeks == (2, 5) and rest.ends_at == log.ends_at
    pd.testing.assert_frame_equal(
        pd.concat([first.decisions, rest.decisions], ignore_index=True), log.decisions, check_exact=True
    )
    pd.testing.assert_frame_equal(first.decisions, before)  # continuing changes nothing that was
    same(rest, town.simulate(3, after=first))


def test_continuing_elsewhere_is_refused(town: Town, log: TownLog) -> None:
    with pytest.raises(InputError, match="continued where it ended"):
        town.simulate(1, start_week=3, after=log)
    with pytest.raises(InputError, match="weeks is 0"):
        town.simulate(0)


def test_a_later_start_lives_in_the_same_weeks(town: Town, log: TownLog) -> None:
    late = town.simulate(1, start_week=4)
    whole = log.decisions[log.decisions["record_id"] > 4 * WEEK_IDS].reset_index(drop=True)
    columns = ["record_id", "user_id", "opportunity_id", "decided_at", "context_weather_context"]
    pd.testing.assert_frame_equal(late.decisions[columns], whole[columns], check_exact=True)
    assert late.decisions["history_interaction_count"].mean() < whole["history_interaction_count"].mean()


def test_columns_are_those_of_the_contract(log: TownLog) -> None:
    wanted = {
        "record_id",
        "user_id",
        "opportunity_id",
        "decided_at",
        *FEATURE_NAMES,
        "formula_score",
        "calling_score",
        "called",
        "propensity",
        "explored",
        "action",
        "outcome_type",
        "outcome_score",
        "happened_at",
        "received_at",
    }
    assert set(log.decisions.columns) == wanted
    assert set(log.joined().columns) <= {*FEATURE_NAMES, *KNOWN_COLUMNS}
    for name in ("decided_at", "happened_at", "received_at"):
        assert str(log.decisions[name].dtype) == "datetime64[us, UTC]"
    table = feature_table(log.decisions)
    assert (
        table.missing.max() < 20
        and log.decisions["record_id"].is_unique
        and log.decisions["decided_at"].is_monotonic_increasing
    )
    assert (log.decisions["decided_at"] < log.ends_at).all()


def test_one_session_per_person_and_slot(log: TownLog) -> None:
    local = log.decisions["decided_at"] + pd.Timedelta(hours=1)
    sessions = pd.DataFrame(
        {"user": log.decisions["user_id"], "day": local.dt.floor("D"), "slot": (local.dt.hour - 7) // 4, "at": local}
    )
    assert (sessions.groupby(["user", "day", "slot"])["at"].nunique() == 1).all()
    assert local.dt.hour.between(7, 22).all()
    assert not log.decisions.duplicated(["user_id", "decided_at", "opportunity_id"]).any()


def test_formula_scores_and_calls_can_be_recomputed(log: TownLog) -> None:
    decisions = log.decisions
    score = formula(decisions[list(FEATURE_NAMES)].to_numpy()).formula_score
    np.testing.assert_allclose(decisions["formula_score"], score, rtol=1e-12)
    again = decide(score, policy=Policy(), decision_ids=decisions["record_id"].to_numpy())
    np.testing.assert_array_equal(decisions["called"], again.called)
    np.testing.assert_array_equal(decisions["propensity"], again.propensity)


@pytest.mark.parametrize("exploration", [0.0, 0.02, 0.2])
def test_propensities_are_exact(town: Town, exploration: float) -> None:
    decisions = town.simulate(3, Policy(exploration=exploration, seed=5)).decisions
    for propensity, group in decisions.groupby("propensity"):
        error = 4 * np.sqrt(propensity * (1 - propensity) / len(group))
        assert abs(group["called"].mean() - propensity) <= error
    assert set(np.round(decisions["propensity"].unique(), 12)) == {exploration, 1 - exploration}
    assert (decisions["explored"] == (decisions["called"] != (decisions["propensity"] > 0.5))).all()


def test_history_equals_the_batch_computation(log: TownLog) -> None:
    got = log.decisions[log.decisions["received_at"].notna()]
    batch = history_features(
        user=log.decisions["user_id"],
        decided_at=days(log.decisions["decided_at"]),
        outcome_user=got["user_id"],
        outcome_received_at=days(got["received_at"]),
        outcome_happened_at=days(got["happened_at"]),
        outcome_score=got["outcome_score"],
        outcome_type=got["outcome_type"],
    )
    np.testing.assert_allclose(log.decisions[HISTORY_NAMES], batch, rtol=1e-9)
    assert log.decisions["history_past_positive_rate"].notna().mean() > 0.5


def test_history_by_plain_loops(log: TownLog) -> None:
    """Counts and rates of some late decisions, one by one, from the messages of the log."""
    first = log.outcomes.drop_duplicates("outcome_id")
    for row in log.decisions.tail(2_000).iloc[::97].itertuples():
        mine = first[
            (first["user_id"] == row.user_id)
            & (first["received_at"] < row.decided_at)
            & (first["happened_at"] < row.decided_at)
        ]
        assert row.history_interaction_count == pytest.approx(min(1, len(mine) / 100))
        if len(mine):
            assert row.history_past_positive_rate == pytest.approx((mine["outcome_type"] == "positive").mean())
            assert row.history_past_negative_rate == pytest.approx((mine["outcome_type"] == "negative").mean())
            assert row.history_average_engagement == pytest.approx(mine["outcome_score"].mean())


def test_the_future_does_not_leak(log: TownLog) -> None:
    """Deleting every message that arrives after a moment changes no history before it."""
    moment = pd.Timestamp("2026-03-20 12:00", tz="UTC")
    then = log.known_at(moment)
    got = then.decisions[then.decisions["received_at"].notna()]
    assert (got["received_at"] < moment).all() and 0 < len(got) < then.decisions["called"].sum()
    batch = history_features(
        user=then.decisions["user_id"],
        decided_at=days(then.decisions["decided_at"]),
        outcome_user=got["user_id"],
        outcome_received_at=days(got["received_at"]),
        outcome_happened_at=days(got["happened_at"]),
        outcome_score=got["outcome_score"],
        outcome_type=got["outcome_type"],
    )
    np.testing.assert_allclose(log.decisions[HISTORY_NAMES].head(len(then)), batch, rtol=1e-9)
    assert (then.outcomes["received_at"] < moment).all() and (then.decisions["decided_at"] < moment).all()
    assert len(then.truth) == len(then)


def test_outcomes_only_of_calls_and_as_the_truth_says(log: TownLog) -> None:
    decisions, truth = log.decisions, log.truth
    heard = decisions["received_at"].notna()
    assert not (heard & ~decisions["called"]).any()
    for name in ("action", "outcome_type", "outcome_score", "happened_at"):
        assert (decisions[name].notna() == heard).all()
    np.testing.assert_array_equal(decisions.loc[heard, "outcome_score"], truth.loc[heard, "truth_score"])
    np.testing.assert_array_equal(
        decisions.loc[heard, "outcome_type"] == "positive", truth.loc[heard, "truth_positive"]
    )
    np.testing.assert_array_equal(truth["truth_score"] >= 0.7, truth["truth_positive"])
    score = decisions.loc[heard].groupby("action")["outcome_score"]
    for action, value in {"visit": 0.8, "accept": 0.9, "reject": 0.2, "ignore": 0.5}.items():
        assert set(score.get_group(action)) == {value}
    kinds = decisions.loc[heard & (decisions["action"] == "feedback")]
    expected = np.select(
        [kinds["outcome_score"] >= 0.7, kinds["outcome_score"] <= 0.3], ["positive", "negative"], "neutral"
    )
    np.testing.assert_array_equal(kinds["outcome_type"], expected)


def test_delays_losses_and_duplicates_have_the_documented_rates(large: TownLog) -> None:
    options, called = TownOptions(), large.decisions[large.decisions["called"]]
    heard = called["received_at"].notna()

    def close(share: float, expected: float, n: int) -> bool:
        return abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / n)

    assert close(1 - heard.mean(), options.never, len(called))
    assert close(
        large.outcomes["outcome_id"].duplicated().mean() * len(large.outcomes) / heard.sum(), options.twice, heard.sum()
    )
    got = called[heard]
    assert (got["received_at"] >= got["happened_at"]).all() and (got["happened_at"] > got["decided_at"]).all()
    waited = (got["received_at"] - got["happened_at"]).dt.total_seconds() / 3600
    assert abs((waited > 1).mean() - options.late) < 0.02
    assert waited[waited > 1].median() == pytest.approx(options.late_median, rel=0.15)
    messages = large.outcomes
    again = messages.groupby("outcome_id").agg(["nunique", "count"])
    for column in ("outcome_score", "outcome_type", "happened_at", "action", "user_id"):
        assert (again[column]["nunique"] == 1).all()  # a duplicate repeats the content
    first = messages.drop_duplicates("record_id").set_index("record_id")["received_at"].sort_index()
    pd.testing.assert_series_equal(first, got.set_index("record_id")["received_at"].sort_index())
    assert messages["received_at"].is_monotonic_increasing


def test_whether_a_message_is_lost_does_not_depend_on_the_outcome(large: TownLog) -> None:
    called = large.decisions["called"]
    heard, good = large.decisions["received_at"].notna()[called], large.truth["truth_positive"][called]
    difference = heard[good].mean() - heard[~good].mean()
    assert abs(difference) < 4 * np.sqrt(0.06 * 0.94 * (1 / good.sum() + 1 / (~good).sum()))


def test_true_probability_and_expected_score_are_true(large: TownLog) -> None:
    truth = large.truth
    groups = truth.groupby(pd.qcut(truth["truth_probability"], 20))
    for _, group in groups:
        error = 4 * np.sqrt((group["truth_probability"] * (1 - group["truth_probability"])).sum()) / len(group)
        assert abs(group["truth_positive"].mean() - group["truth_probability"].mean()) < error
        assert abs(group["truth_score"].mean() - group["truth_expected_score"].mean()) < 4 * group[
            "truth_score"
        ].std() / np.sqrt(len(group))
    logit = np.log(truth["truth_probability"] / (1 - truth["truth_probability"])).to_numpy()
    np.testing.assert_allclose(truth["truth_expected_score"], expected_score(logit, TownOptions()), rtol=1e-9)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_town_is_as_hard_as_it_says(seed: int) -> None:
    log = Town(synthetic_people(1_500, seed), seed).simulate(4)
    good = log.truth["truth_positive"].to_numpy()
    assert area(log.decisions["formula_score"], good) == pytest.approx(0.65, abs=0.025)
    assert 0.80 < area(log.truth["truth_probability"], good) < 0.87
    assert 0.30 < good.mean() < 0.45
    assert 0.10 < log.decisions["called"].mean() < 0.25
    value, best = policy_value(log), policy_value(log, best_policy(log))
    assert 0 < value < best / 2


def test_logged_outcomes_teach_more_than_the_formula_knows() -> None:
    """Gradient boosting on what was logged, held-out people in later weeks."""
    ensemble = pytest.importorskip("sklearn.ensemble")
    log = Town(synthetic_people(2_800, 5), 2026).simulate(6)
    decisions, good = log.decisions, log.truth["truth_positive"].to_numpy()
    assert 150_000 < len(log) < 250_000
    values, week = decisions[list(FEATURE_NAMES)].to_numpy(), decisions["record_id"].to_numpy() // WEEK_IDS
    held_out = pd.util.hash_array(decisions["user_id"].to_numpy(object)) % 4 == 0
    train = decisions["outcome_score"].notna().to_numpy() & ~held_out & (week < 4)
    test = held_out & (week >= 4)
    model = ensemble.HistGradientBoostingClassifier(
        max_iter=150, learning_rate=0.08, max_leaf_nodes=15, min_samples_leaf=60, random_state=0
    )
    predicted = model.fit(values[train], decisions["outcome_score"][train] >= 0.7).predict_proba(values[test])[:, 1]
    found, baseline = area(predicted, good[test]), area(decisions["formula_score"][test], good[test])
    assert found > 0.75 and found - baseline > 0.09
    assert found < area(log.truth["truth_probability"][test], good[test]) - 0.02


@pytest.mark.parametrize(
    "name",
    [
        "context_social_context",
        "context_weather_context",
        "context_event_context",
        "context_accessibility_context",
        "timing_seasonal_timing",
        "timing_user_patterns",
        "context_network_effects",
        "history_past_positive_rate",
    ],
)
def test_features_that_the_formula_ignores_carry_information(large: TownLog, name: str) -> None:
    known = large.decisions[name].notna().to_numpy()
    value = area(large.decisions[name][known], large.truth["truth_positive"][known])
    n = known.sum()
    assert value - 0.5 > 4 * np.sqrt(1 / (12 * 0.23 * n))  # four standard errors above chance


def test_missing_features_have_the_documented_rates(large: TownLog) -> None:
    options, missing = TownOptions(), large.decisions[list(FEATURE_NAMES)].isna().mean()
    for name, rate in {
        "context_social_context": options.missing_social,
        "context_weather_context": options.missing_weather,
        "context_accessibility_context": options.missing_access,
        "context_network_effects": options.missing_network,
        "context_community_patterns": options.missing_community,
        "context_journey_alignment": options.missing_journey,
    }.items():
        assert missing[name] == pytest.approx(rate, abs=4 * np.sqrt(rate / len(large)))
    pairs = (
        large.decisions[["context_social_context", "context_accessibility_context", "context_journey_alignment"]]
        .isna()
        .corr()
        .to_numpy()
    )
    assert abs(pairs[np.triu_indices(3, 1)]).max() < 0.02  # independent of each other


def test_timing_defaults_by_local_time(large: TownLog) -> None:
    unknown = large.decisions[large.decisions["timing_user_patterns"].isna()]
    local = unknown["decided_at"] + pd.Timedelta(hours=1)
    for row, at in zip(unknown.head(300).itertuples(), local.head(300), strict=True):
        hour = 0.8 if 9 <= at.hour <= 11 else 0.7 if 12 <= at.hour <= 14 else 0.9 if 17 <= at.hour <= 20 else 0.5
        assert row.timing_optimal_time_of_day == hour
        assert row.timing_optimal_day_of_week == (0.8 if at.day_of_week >= 5 else 0.6)


def test_people_with_unknown_vibes_live_too() -> None:
    people = synthetic_people(60, 1)
    people.loc[:9, "user_novelty_seeking"] = np.nan
    log = Town(people, 3).simulate(2)
    chosen = log.decisions["user_id"].isin(people["user_id"][:10])
    assert log.decisions.loc[chosen, "user_novelty_seeking"].isna().all() and log.truth.notna().all(axis=None)


def test_policies_meet_the_same_offers(town: Town, log: TownLog) -> None:
    seen: list[np.ndarray] = []

    def eager(features: np.ndarray, ids: np.ndarray) -> Decisions:
        seen.append(features)
        return decide(np.where(np.isnan(features[:, 0]), 0.5, 1.0), policy=Policy(exploration=0.1), decision_ids=ids)

    other = town.simulate(5, eager)
    exogenous = [
        "record_id",
        "user_id",
        "opportunity_id",
        "decided_at",
        "context_network_effects",
        "timing_user_patterns",
    ]
    pd.testing.assert_frame_equal(other.decisions[exogenous], log.decisions[exogenous], check_exact=True)
    np.testing.assert_array_equal(np.vstack(seen), other.decisions[list(FEATURE_NAMES)].to_numpy())
    assert other.decisions["called"].mean() > 0.85 and seen[0].shape[1] == len(NEUTRAL)
    # whoever is called nearly always tires: the same offers are worth less
    assert other.truth["truth_probability"].mean() < log.truth["truth_probability"].mean() - 0.03
    receptivity = FEATURE_NAMES[index_of("context_user_receptivity")]
    assert other.decisions[receptivity].mean() < log.decisions[receptivity].mean()


def test_a_policy_cannot_change_the_log_through_its_input(town: Town) -> None:
    def vandal(features: np.ndarray, ids: np.ndarray) -> Decisions:
        features[:] = 0.5
        return decide(features[:, 0], policy=Policy(), decision_ids=ids)

    assert town.simulate(1, vandal).decisions["user_overall_energy"].std() > 0.05


def test_without_fatigue_calls_do_not_matter(town: Town) -> None:
    options = dataclasses.replace(TownOptions(), fatigue=0.0)
    calm = Town(synthetic_people(100, seed=1), 7, options)
    one, two = calm.simulate(2, Policy(exploration=0.0)), calm.simulate(2, Policy(threshold=0.0, exploration=0.0))
    np.testing.assert_allclose(one.truth["truth_probability"], two.truth["truth_probability"])
    tired = Town(synthetic_people(100, seed=1), 7)
    assert (
        tired.simulate(2, Policy(threshold=0.0)).truth["truth_probability"].mean()
        < two.truth["truth_probability"].mean()
    )


def test_knowing_the_truth_pays(town: Town, log: TownLog) -> None:
    best = town.simulate(5, BestPolicy())
    assert policy_value(best) > 2 * policy_value(log)
    np.testing.assert_array_equal(best.decisions["called"], best_policy(best))
    assert policy_value(log, np.zeros(len(log))) == 0
    by_hand = 1000 * (log.truth["truth_expected_score"] - 0.5)[log.decisions["called"]].sum() / len(log)
    assert policy_value(log) == pytest.approx(by_hand)
    with pytest.raises(InputError, match="called has shape"):
        policy_value(log, np.ones(3))


def test_no_policy_beats_the_best(log: TownLog) -> None:
    rng, best = np.random.default_rng(0), policy_value(log, best_policy(log))
    for _ in range(20):
        assert policy_value(log, rng.random(len(log)) < rng.random()) < best


def test_wrong_people_are_refused() -> None:
    people = synthetic_people(3)
    for wrong in (people.head(0), people.drop(columns="user_id"), people.assign(user_id="x")):
        with pytest.raises(InputError, match="people"):
            Town(wrong)
