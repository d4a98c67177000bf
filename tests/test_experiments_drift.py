"""Drift: false alarms stay within the stated budget over unlimited looks, and a shift that matters is found in days.

The full sizes are marked long. Each figure is printed with its bound; after 0 in n the upper bound is 3/n.
"""

import datetime as dt
import json
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from calling_ai.core.contract import FEATURE_NAMES
from calling_ai.core.errors import InputError
from calling_ai.experiments.drift import (
    CELLS,
    Drift,
    budget_of,
    cells_of,
    effects,
    log_winnings,
    normaliser,
    put_back,
    ranking,
    restart,
    sequential_ranks,
    tempering,
    tilts,
)

START, FEATURES = dt.date(2026, 1, 5), 45
NAMES = tuple(f"feature_{number}" for number in range(FEATURES))


def day(number: int) -> dt.date:
    """Return the date of a day, counted from the first of the reference."""
    return START + dt.timedelta(days=number)


class World:
    """Rows of days, one a user: independent features, or correlated ones; one of them may move."""

    def __init__(self, seed: int, rows: int = 500, correlation: float = 0.0, features: int = FEATURES) -> None:
        self.random, self.rows, self.correlation, self.features = (
            np.random.default_rng(seed),
            rows,
            correlation,
            features,
        )

    def rows_of(self, moved: int | None = None, size: float = 0.3) -> np.ndarray:
        """Return the rows of one day."""
        common = self.random.standard_normal((self.rows, 1))
        own = self.random.standard_normal((self.rows, self.features))
        values = math.sqrt(self.correlation) * common + math.sqrt(1 - self.correlation) * own
        if moved is not None:
            values[:, moved] += size
        return np.clip(0.5 + 0.13 * values, 0, 1)


def watching(world: World, seed: int = 0, reference: int = 28, **options: Any) -> Drift:
    """Return a watch that has seen its reference."""
    watch = Drift(NAMES[: world.features], seed=seed, **options)
    return watch.begin({day(number): world.rows_of() for number in range(reference)})


def quiet(world: World, days: int, seed: int = 0, **options: Any) -> list[str]:
    """Return what is named in days without drift."""
    watch = watching(world, seed, **options)
    for number in range(28, 28 + days):
        watch.look(day(number), world.rows_of())
    return list(watch.named)


def delay(world: World, before: int, seed: int = 0, size: float = 0.3) -> tuple[int, list[str]]:
    """Return after how many days of a shift it is named, and what else was; 99 when it never is."""
    watch, moved = watching(world, seed), seed % world.features
    for number in range(28, 28 + before):
        watch.look(day(number), world.rows_of())
    for later in range(10):
        watch.look(day(28 + before + later), world.rows_of(moved, size))
        if NAMES[moved] in watch.named:
            return later + 1, [name for name in watch.named if name != NAMES[moved]]
    return 99, list(watch.named)


def upper(events: int, trials: int) -> float:
    """Return the 95 % upper bound of a share (Clopper and Pearson)."""
    return 1.0 if events == trials else float(stats.beta.ppf(0.95, events + 1, trials - events))


# ------------------------------------------------------------------------------------------------------ the ranks


def test_sequential_ranks_are_what_the_definition_says() -> None:
    random = np.random.default_rng(0)
    values = np.round(random.random((150, 3)), 1)
    values[random.random((150, 3)) < 0.2] = np.nan
    cells, noise = cells_of(values), random.random((150, 3))
    counts = np.zeros((3, CELLS), np.int64)
    found = sequential_ranks(counts, cells, noise)
    for feature in range(3):
        seen: list[int] = []
        for row in range(150):
            cell = int(cells[row, feature])
            if cell < 0:
                assert np.isnan(found[row, feature])
                continue
            less, same = sum(other < cell for other in seen), seen.count(cell)
            expected = (less + noise[row, feature] * (same + 1)) / (len(seen) + 1)
            np.testing.assert_allclose(found[row, feature], expected, rtol=1e-12)
            seen.append(cell)
        assert counts[feature].sum() == len(seen)


@pytest.mark.parametrize("make", ["smooth", "tied", "constant", "heavy"])
def test_ranks_are_uniform_and_independent_whatever_the_distribution(make: str) -> None:
    random = np.random.default_rng(3)
    values = {
        "smooth": random.random((3_000, 20)),
        "tied": np.round(random.beta(2, 5, (3_000, 20)) * 3) / 3,
        "constant": np.full((3_000, 20), 0.5),
        "heavy": random.beta(0.1, 0.1, (3_000, 20)),
    }[make]
    ranks = sequential_ranks(np.zeros((20, CELLS), np.int64), cells_of(values), random.random((3_000, 20)))
    assert stats.kstest(ranks[:, 0], "uniform").pvalue > 0.001
    assert stats.kstest(ranks.ravel()[::7], "uniform").pvalue > 0.001
    lagged = [np.corrcoef(ranks[:-1, feature], ranks[1:, feature])[0, 1] for feature in range(20)]
    assert abs(np.mean(lagged)) < 4 / math.sqrt(3_000 * 20)


def test_bets_are_fair() -> None:
    exponents = tilts(0.3)
    grid = (np.arange(200_001) + 0.5) / 200_001
    first, second = math.sqrt(3) * (2 * grid - 1), math.sqrt(5) / 2 * (3 * (2 * grid - 1) ** 2 - 1)
    for (one, other), constant in zip(exponents, normaliser(exponents), strict=True):
        fair = np.exp(one * first + other * second - constant).mean()
        assert 1 - 1e-6 < fair <= 1.0
    with pytest.raises(InputError, match="alarms is 2"):
        budget_of(2)
    random = np.random.default_rng(1)
    won = np.exp(log_winnings(random.random((8, 60_000)), random.random((8, 60_000)), 0.3)).mean(axis=0)
    print("mean winnings of fair bets:", won.round(3))
    np.testing.assert_allclose(np.delete(won, 8), 1, atol=0.1)  # the heaviest tail has no variance


def test_the_wealth_is_the_sum_that_the_text_says() -> None:
    random = np.random.default_rng(2)
    factors = random.normal(0, 0.3, 30)
    wealth = np.array([-np.inf])
    for number, factor in enumerate(factors):
        wealth = restart(wealth, np.array([factor]), number)
    direct = sum(math.exp(factors[begin:].sum()) / ((begin + 1) * (begin + 2)) for begin in range(30))
    np.testing.assert_allclose(math.exp(wealth[0]), direct, rtol=1e-10)
    np.testing.assert_allclose(sum(1 / ((begin + 1) * (begin + 2)) for begin in range(30)) + 1 / 31, 1)


# ---------------------------------------------------------------------------------------------- B29, and the budget


def test_ninety_days_of_45_features_and_no_false_alarm() -> None:
    independent = [quiet(World(seed, rows=100), 90, seed) for seed in range(2)]
    correlated = [quiet(World(seed, rows=100, correlation=0.5), 90, seed) for seed in range(1)]
    alarms = [len(found) for found in independent + correlated]
    print(f"false alarms in 90 days over 45 features: {alarms}, expected at most {budget_of(0.05):.3f} each")
    assert max(alarms) <= 1 and sum(alarms) <= 1


def test_a_shift_that_matters_is_found_within_three_days() -> None:
    found = [delay(World(seed), 0, seed) for seed in range(4)]
    found += [delay(World(seed, correlation=0.5), 5, seed) for seed in range(2)]
    days = [item[0] for item in found]
    print(f"days until a shift of 0.3 standard deviations is named, 500 rows a day: {days}")
    assert np.mean(np.array(days) <= 3) >= 0.9 and not any(item[1] for item in found)


def test_after_a_quiet_year_a_shift_is_found_as_quickly() -> None:
    world = World(5, rows=300, features=3)
    watch = watching(world, alarms=0.05 / 15)  # a fifteenth of the features has a fifteenth of the budget
    for number in range(28, 393):
        watch.look(day(number), world.rows_of())
    assert not watch.named
    for later in range(3):
        watch.look(day(393 + later), world.rows_of(1))
    print(f"after 365 quiet days: named on {watch.named.get('feature_1')}, the shift began on {day(393)}")
    assert list(watch.named) == ["feature_1"]


def test_the_budget_is_kept_where_it_is_large_enough_to_be_seen() -> None:
    """With a budget of one half, 40 watches give at most 20 alarms in expectation."""
    trials, level = 40, budget_of(1.0)
    alarms = sum(
        len(quiet(World(seed, rows=12, features=8), 30, seed, alarms=1.0, stratum="none")) for seed in range(trials)
    )
    print(f"{alarms} alarms in {trials} watches, expected at most {trials * level:.0f}")
    assert alarms <= trials * level


@pytest.mark.long
@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_b29_false_alarms_at_full_size(correlation: float) -> None:
    alarms = [len(quiet(World(seed, rows=500, correlation=correlation), 90, seed)) for seed in range(60)]
    share = upper(sum(item > 1 for item in alarms), len(alarms))
    print(f"{sum(alarms)} false alarms in {len(alarms)} x 90 days; more than one: at most {share:.3f}")
    assert max(alarms) <= 1 and np.mean(alarms) <= 0.1


@pytest.mark.long
def test_b29_a_year_without_drift_at_full_size() -> None:
    alarms = [len(quiet(World(seed, rows=500), 365, seed)) for seed in range(20)]
    print(
        f"{sum(alarms)} false alarms in {len(alarms)} years of 45 features; expected at most {20 * budget_of(0.05):.1f}"
    )
    assert sum(alarms) <= 2


@pytest.mark.long
@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_b29_delay_at_full_size(correlation: float) -> None:
    found = [
        delay(World(1_000 * before + seed, correlation=correlation), before, seed)
        for before in (0, 30, 87)
        for seed in range(40)
    ]
    days = np.array([item[0] for item in found])
    missed = int((days > 3).sum())
    least = 1 - upper(missed, len(days))
    print(f"found within 3 days: {1 - missed / len(days):.3f}, at least {least:.3f}; {days.mean():.2f} days")
    others, bound = sum(len(item[1]) for item in found), len(found) * budget_of(0.05)
    print(f"others named: {others}, expected at most {bound:.1f}")
    assert least >= 0.9 and others <= 2 * bound


# ------------------------------------------------------------------------------------------- what days have in common


def test_days_with_a_mood_of_their_own_are_tempered() -> None:
    random = np.random.default_rng(4)

    def moody(number: int) -> np.ndarray:
        return np.clip(random.beta(4, 2, (300, 5)) + 0.04 * random.standard_normal(5), 0, 1)

    named = {True: 0, False: 0}
    for seed in range(2):
        for tempered in named:
            watch = Drift(NAMES[:5], seed=seed).begin({day(number): moody(number) for number in range(28)})
            assert watch.temper.min() > 2
            if not tempered:
                watch.temper[:] = 1
            for number in range(28, 88):
                watch.look(day(number), moody(number))
            named[tempered] += len(watch.named)
    print(f"means jump by 0.22 standard deviations a day: {named[True]} of 10 named, {named[False]} untempered")
    assert named[True] <= 2 and named[False] >= 8  # a guard, not a guarantee: days are not exchangeable here
    cells, noise = cells_of(random.random((2_800, 30))), random.random((2_800, 30))
    assert 1 <= tempering(cells, np.arange(2_800) // 100, np.zeros(2_800, int), noise).mean() < 1.25


def test_weekends_are_no_drift_and_pooling_them_would_be() -> None:
    world = World(6, rows=300, features=2)

    def rows(number: int) -> np.ndarray:
        return world.rows_of(0 if day(number).weekday() >= 5 else None, 1.0)

    for stratum in ("weekday", "weekend"):
        watch = Drift(NAMES[:2], stratum=stratum).begin({day(number): rows(number) for number in range(28)})
        for number in range(28, 70):
            watch.look(day(number), rows(number))
        assert not watch.named and watch.temper.max() < 2


def test_the_same_people_every_day_are_no_drift() -> None:
    """A fixed population of 400 people, some of whom come far more often than others."""
    random = np.random.default_rng(7)
    people, habit = random.beta(4, 2, (400, 10)), random.beta(1, 3, 400)

    def rows(number: int) -> np.ndarray:
        return people[random.random(400) < habit]

    watch = Drift(NAMES[:10]).begin({day(number): rows(number) for number in range(28)})
    for number in range(28, 393):
        watch.look(day(number), rows(number))
    assert not watch.named


def test_people_who_stay_for_a_while_and_come_every_day_are_hardly_ever_drift() -> None:
    """A thousand people are active, each for fifteen days on average: their mean wanders, rows are not independent."""
    named = 0
    for seed in range(2):
        random = np.random.default_rng([seed, 20])
        people = random.beta(4, 2, (1_000, 8))

        def rows(number: int, people: np.ndarray = people, random: np.random.Generator = random) -> np.ndarray:
            gone = random.random(1_000) < 1 / 15
            people[gone] = random.beta(4, 2, (int(gone.sum()), 8))
            return people[random.random(1_000) < 0.4]

        watch = Drift(NAMES[:8], seed=seed).begin({day(number): rows(number) for number in range(28)})
        for number in range(28, 118):
            watch.look(day(number), rows(number))
        named += len(watch.named)
    print(f"{named} of 16 features named in 90 days of a population that comes and goes")
    assert named <= 1


def test_other_kinds_of_change_are_found() -> None:
    random = np.random.default_rng(8)

    def rows(changed: bool) -> np.ndarray:
        values = np.clip(random.normal(0.5, [0.1, 0.1, 0.1, 0.1], (500, 4)), 0, 1)
        if changed:
            values[:, 0] = np.clip(0.5 + (values[:, 0] - 0.5) * 1.4, 0, 1)
            values[random.random(500) < 0.1, 1] = np.nan
        values[random.random(500) < (0.0 if changed else 0.15), 2] = np.nan
        return values

    watch = Drift(NAMES[:4]).begin({day(number): rows(False) for number in range(28)})
    for number in range(28, 32):
        watch.look(day(number), rows(True))
    assert set(watch.named) == {"feature_0", "feature_1", "feature_2"} == set(watch.found)


# ------------------------------------------------------------------------------------------------------- the town


@pytest.fixture(scope="module")
def town() -> dict[dt.date, np.ndarray]:
    """Return one row a person and day of a town, with all that its features have in common."""
    from calling_ai.world.people import bfi_people
    from calling_ai.world.town import Town

    lived = Town(bfi_people(400, seed=7), seed=7).simulate(9).decisions
    lived = lived.assign(day=lived["decided_at"].dt.date).sort_values("record_id").groupby(["day", "user_id"]).head(1)
    return {name: rows[list(FEATURE_NAMES)].to_numpy(float) for name, rows in lived.groupby("day")}


def test_in_the_town_only_what_moves_is_named(town: dict[dt.date, np.ndarray]) -> None:
    """Histories grow and seasons change there; people, spots and all else stay as they are."""
    order = sorted(town)
    watch = Drift(FEATURE_NAMES).begin({name: town[name] for name in order[:28]})
    for name in order[28:]:
        watch.look(name, town[name])
    print("named in the town:", watch.named)
    moving = {"context_weather_context", "timing_seasonal_timing"} | {
        name for name in FEATURE_NAMES if name.startswith("history_")
    }
    assert set(watch.named) <= moving and any(name.startswith("history_") for name in watch.named)


def test_in_a_town_that_stands_still_the_injected_feature_is_named_first(town: dict[dt.date, np.ndarray]) -> None:
    """Rows of the town drawn again and again: its correlations, its gaps, and no drift but the one put in."""
    random, rows = np.random.default_rng(9), np.concatenate(list(town.values()))
    moved = FEATURE_NAMES.index("context_user_receptivity")
    size = 0.3 * np.nanstd(rows[:, moved])

    def draw(shift: float = 0.0) -> np.ndarray:
        found = rows[random.integers(0, len(rows), 500)]
        found[:, moved] = np.clip(found[:, moved] + shift, 0, 1)
        return found

    reference = {day(number): draw() for number in range(28)}
    watch = Drift(FEATURE_NAMES).begin(reference)
    for number in range(28, 58):
        watch.look(day(number), draw())
    assert not watch.named
    window = [draw(size) for _ in range(3)]
    for later, drawn in enumerate(window):
        watch.look(day(58 + later), drawn)

    def score(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        from calling_ai.score.formula import formula
        from calling_ai.score.policy import Policy, decide

        made = decide(formula(values).formula_score, policy=Policy(), decision_ids=np.arange(len(values)))
        return made.calling_score, made.propensity

    joined, before = np.concatenate(window), np.concatenate(list(reference.values()))
    ranked = ranking(watch, before, joined, effects(joined, before, score))
    print(
        "first:", ranked[0].name, ranked[0].named, f"shift {ranked[0].shift:.2f}, scores {ranked[0].score_effect:+.4f}"
    )
    assert list(watch.named) == ["context_user_receptivity"] and ranked[0].name == "context_user_receptivity"
    assert ranked[0].score_effect > 0 and 0.2 < ranked[0].shift < 0.4


# ------------------------------------------------------------------------------------------------ the state, refusals


def test_the_state_continues_and_does_not_depend_on_interruptions() -> None:
    def run(cut: bool) -> dict[str, Any]:
        world = World(10, rows=60, features=6)
        watch = watching(world)
        for number in range(28, 40):
            watch.look(day(number), world.rows_of())
            if cut:
                watch = Drift.from_dict(json.loads(json.dumps(watch.to_dict())))
        return watch.to_dict()

    assert run(True) == run(False)
    assert len(json.dumps(run(False))) < 200_000


def test_empty_days_unknown_weekdays_and_short_references_are_fine() -> None:
    world = World(11, rows=5, features=3)
    watch = Drift(NAMES[:3]).begin({})
    assert watch.look(day(0), np.empty((0, 3))) == ()
    for number in range(1, 20):
        watch.look(day(number), world.rows_of())
    assert not watch.named and np.isfinite(watch.log_evalues).all()
    with pytest.raises(InputError, match="once and in order"):
        watch.look(day(3), world.rows_of())
    with pytest.raises(InputError, match="before the first look"):
        watch.begin({})
    with pytest.raises(InputError, match="2 columns"):
        watch.look(day(30), np.zeros((3, 2)))
    with pytest.raises(InputError, match="stratum is 'month'"):
        Drift(NAMES, stratum="month")
    with pytest.raises(InputError, match="must lie in"):
        cells_of(np.array([[np.inf]]))


def test_putting_back_gives_the_reference_in_the_order_of_the_window() -> None:
    random = np.random.default_rng(12)
    window, reference = random.random(500), random.beta(2, 5, 2_000)
    reference[:200] = np.nan
    back = put_back(window, reference)
    there = ~np.isnan(back)
    assert abs(there.mean() - 0.9) < 0.01 and abs(np.nanmean(back) - np.nanmean(reference)) < 0.005
    assert (np.diff(back[np.argsort(window)][: there.sum()]) >= 0).all()
