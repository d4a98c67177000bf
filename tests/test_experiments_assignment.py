"""Assignment: exact shares, nobody thrown around, independent salts, no clock, and definitions that are checked."""

import hashlib
import math
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from calling_ai.core.errors import CallingError, InputError, InputTypeError
from calling_ai.experiments.assignment import (
    BUCKETS,
    Experiment,
    Holdout,
    Layer,
    Stage,
    assign,
    assign_one,
    check_salts,
    cut,
    expose,
    exposures,
    moves,
    position,
    positions,
    ramp_up,
)
from calling_ai.store.decisions import DecisionLog
from calling_ai.store.identity import uuid7s


def keys(number: int, seed: str = "user") -> list[str]:
    """Return pseudonymous keys."""
    return [hashlib.sha256(f"{seed} {index}".encode()).hexdigest() for index in range(number)]


PEOPLE = keys(30_000)
ROLLOUT = ramp_up("hybrid", "autumn", "formula", "hybrid")


# ---------------------------------------------------------------------------------------------------- positions


@given(
    st.lists(st.text(min_size=1, max_size=12) | st.integers(0, 99), max_size=30), st.sampled_from(["a", "long salt"])
)
def test_positions_are_the_first_53_bits_of_a_hash(users: list[Any], salt: str) -> None:
    by_hand = [int.from_bytes(hashlib.sha256(f"{salt}:{user}".encode()).digest()[:8], "big") >> 11 for user in users]
    assert positions(users, salt).tolist() == by_hand == [position(user, salt) for user in users]


def test_a_frame_with_repeats_a_column_and_an_array_give_the_same() -> None:
    column = pd.Series(PEOPLE[:50] * 40).sample(frac=1, random_state=1)
    expected = [position(user, "s") for user in column]
    assert positions(column, "s").tolist() == expected
    assert positions(column.to_numpy(), "s").tolist() == expected
    assert positions(np.arange(5), "s").tolist() == [position(index, "s") for index in range(5)]


@pytest.mark.parametrize(
    ("users", "why"),
    [
        ("ada", "must be a list"),
        (["ada", None], "user 1 is None"),
        (["ada", 0.5], "user 1 is 0.5"),
        (["ada", True], "user 1 is True"),
        (["ada", ""], "user 1 is an empty"),
        (pd.Series(["ada", None, "ben"], dtype="str"), "user 1"),
    ],
)
def test_users_without_a_key_are_refused(users: Any, why: str) -> None:
    with pytest.raises(InputError, match=why):
        positions(users, "s")


def test_positions_are_uniform_and_salts_independent() -> None:
    spots = np.array([positions(PEOPLE, f"salt {index}") / BUCKETS for index in range(40)])
    assert ((spots >= 0) & (spots < 1)).all()
    kolmogorov = [stats.kstest(row, "uniform").pvalue for row in spots]
    counts = np.array([np.histogram(row, bins=100, range=(0, 1))[0] for row in spots])
    squares = stats.chisquare(counts, axis=1).pvalue
    grids = [
        stats.chi2_contingency(np.histogram2d(one, two, bins=10, range=[[0, 1]] * 2)[0]).pvalue
        for one, two in zip(spots[:-1], spots[1:])
    ]
    for values in (kolmogorov, squares, grids):
        assert min(values) > 1e-5 and stats.kstest(values, "uniform").pvalue > 1e-3


def test_arms_of_two_experiments_are_independent() -> None:
    other = ramp_up("other", "winter", "a", "b")
    table = pd.crosstab(assign(PEOPLE, ROLLOUT, "50 %").arm, assign(PEOPLE, other, "10 %").arm)
    assert stats.chi2_contingency(table).pvalue > 1e-4
    copy = ramp_up("copy", "autumn", "a", "b")
    same = pd.crosstab(assign(PEOPLE, ROLLOUT, "50 %").arm, assign(PEOPLE, copy, "50 %").arm)
    assert stats.chi2_contingency(same).pvalue < 1e-100, "one salt for two experiments is what check_salts is for"
    with pytest.raises(InputError, match="which experiment hybrid has already"):
        check_salts(ROLLOUT, copy)


# --------------------------------------------------------------------------------------------------------- cuts


SPLITS = st.lists(
    st.lists(st.integers(0, 20), min_size=3, max_size=3).map(
        lambda parts: tuple((name, part / max(20, sum(parts))) for name, part in zip("ABC", parts))
    ),
    min_size=1,
    max_size=5,
)


def lengths(splits: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return starts, ends and owners of the pieces."""
    starts, owners, _ = cut(splits)
    return starts, np.append(starts[1:], BUCKETS), owners


@given(SPLITS)
def test_cuts_have_the_lengths_of_the_shares(splits: list[Any]) -> None:
    starts, ends, owners = lengths(tuple(splits))
    assert starts[0] == 0 and (ends > starts).all() and (np.diff(owners) != 0).all()
    for code, (_, share) in enumerate(splits[-1]):
        assert_allclose((ends - starts)[owners == code].sum() / BUCKETS, share, atol=2e-9)


@given(SPLITS)
def test_as_few_move_as_can_be(splits: list[Any]) -> None:
    if len(splits) < 2:
        return
    before, after = lengths(tuple(splits[:-1])), lengths(tuple(splits))
    edges = np.unique(np.concatenate([before[0], after[0], [BUCKETS]]))
    width, middle = np.diff(edges), edges[:-1]
    owner = [
        starts_owner[2][np.searchsorted(starts_owner[0], middle, side="right") - 1] for starts_owner in (before, after)
    ]
    moved = width[owner[0] != owner[1]].sum() / BUCKETS
    old = np.array([share for _, share in splits[-2]])
    new = np.array([share for _, share in splits[-1]])
    least = (np.abs(new - old).sum() + abs(new.sum() - old.sum())) / 2
    assert_allclose(moved, least, atol=1e-8)
    for code in range(3):
        left = width[(owner[0] == code) & (owner[1] != code)].sum() / BUCKETS
        assert_allclose(left, max(0.0, old[code] - new[code]), atol=1e-8)


def test_exact_shares_cover_the_line() -> None:
    for number in (2, 3, 7, 11):
        starts, _, owners = lengths((tuple((str(index), 1 / number) for index in range(number)),))
        assert len(starts) == number and (owners >= 0).all()


def test_shares_that_add_up_leave_nobody_outside() -> None:
    thirds = Experiment("thirds", "s", {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, "a")
    found = assign(PEOPLE, thirds)
    assert found.exposed.all() and set(found.counts()) == {"a", "b", "c"}
    assert stats.chisquare(list(found.counts().values())).pvalue > 1e-4


# -------------------------------------------------------------------------------------------- ramps, B28 and B15


@pytest.mark.slow
def test_a_million_ids_and_nobody_leaves_treatment() -> None:
    people = keys(1_000_000)
    arms = [assign(people, ROLLOUT, stage).arm == "hybrid" for stage in ("10 %", "50 %", "100 %")]
    left = int((arms[0] & ~arms[1]).sum() + (arms[1] & ~arms[2]).sum())
    print(f"B28: {left} of 1,000,000 ids left treatment as 10-50-100 grew (95 % upper bound {3 / 1e6:.0e})")
    assert left == 0 and arms[2].all()
    assert_allclose([arm.mean() for arm in arms], [0.1, 0.5, 1.0], atol=5 * math.sqrt(0.25 / 1e6))


def test_several_arms_that_grow_lose_nobody() -> None:
    experiment = Experiment(
        "three",
        "s",
        {"a": 0.4, "b": 0.3, "c": 0.3},
        "a",
        stages=(
            Stage("one", {"a": 0.9, "b": 0.05, "c": 0.05}),
            Stage("two", {"a": 0.6, "b": 0.3, "c": 0.1}),
            Stage("three", {"a": 0.2, "b": 0.3, "c": 0.5}),
            Stage("four", {"b": 0.3, "c": 0.7}),
        ),
    )
    for before, after in (("one", "two"), ("two", "three"), ("three", "four"), ("one", "four")):
        found = moves(PEOPLE, experiment, before, after)
        assert {pair for pair in found if pair[0] != pair[1]} <= {("a", "b"), ("a", "c")}
    longer = experiment.then(Stage("five", {"b": 1.0}))
    assert assign(PEOPLE, longer, "three").arm.tolist() == assign(PEOPLE, experiment, "three").arm.tolist()


def test_traffic_that_grows_moves_nobody_who_takes_part() -> None:
    shares = {"a": 0.5, "b": 0.25, "c": 0.25}
    experiment = Experiment("t", "s", shares, "a", stages=(Stage("low", traffic=0.1), Stage("high", traffic=0.8)))
    low, high = assign(PEOPLE, experiment, "low"), assign(PEOPLE, experiment, "high")
    assert (low.arm[low.exposed] == high.arm[low.exposed]).all()
    assert_allclose([low.exposed.mean(), high.exposed.mean()], [0.1, 0.8], atol=0.012)
    assert set(low.reason[~low.exposed]) == {"traffic"} and np.isnan(low.share[~low.exposed]).all()
    assert {arm: float(high.share[high.arm == arm][0]) for arm in "abc"} == shares


def test_assignment_reads_no_clock_and_no_random_number() -> None:
    code = """
        import datetime, os, random, time
        import numpy
        from calling_ai.experiments.assignment import assign, assign_one, ramp_up
        def never(*arguments, **options): raise AssertionError("a clock was read")
        for name in ("time", "time_ns", "monotonic", "perf_counter", "localtime", "gmtime"): setattr(time, name, never)
        class Frozen(datetime.datetime):
            now = utcnow = today = never
        datetime.datetime = Frozen
        random.random = numpy.random.default_rng = never
        rollout = ramp_up("hybrid", "autumn", "formula", "hybrid")
        print(*assign([str(i) for i in range(60)], rollout, "50 %").arm, assign_one("7", rollout, "10 %").share)
    """
    seen = set()
    for zone, seed in (("UTC", "0"), ("America/New_York", "1")):
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            capture_output=True,
            text=True,
            env={"TZ": zone, "PYTHONHASHSEED": seed, "PATH": ""},
        )
        assert result.returncode == 0, result.stderr
        seen.add(result.stdout)
    assert len(seen) == 1 and "hybrid" in seen.pop()


@given(st.integers(0, 10_000), st.sampled_from(["10 %", "50 %", "100 %"]))
def test_one_and_many_agree(user: int, stage: str) -> None:
    many = assign(PEOPLE[:5] + [str(user)], ROLLOUT, stage)
    one = assign_one(user, ROLLOUT, stage)
    assert (one.arm, one.share, one.reason) == (many.arm[-1], many.share[-1], many.reason[-1])


# ------------------------------------------------------------------------------------------- layers and holdouts


def test_experiments_in_a_layer_never_meet_and_other_layers_cross() -> None:
    layer = Layer("one", "layer", {"x": 0.5, "y": 0.5})
    pair = [Experiment(name, f"salt {name}", {"a": 0.5, "b": 0.5}, "a", layer="one") for name in "xy"]
    x, y = (assign(PEOPLE, item, layer=layer) for item in pair)
    assert (x.exposed ^ y.exposed).all() and set(x.reason) == {"", "layer"}
    free = assign(PEOPLE, Experiment("z", "salt z", {"a": 0.5, "b": 0.5}, "a"))
    assert stats.chi2_contingency(pd.crosstab(x.exposed, free.arm)).pvalue > 1e-4
    assert stats.chisquare([x.counts()["a"], x.counts()["b"]]).pvalue > 1e-4


def test_a_holdout_is_in_no_experiment_and_only_grows() -> None:
    small, large = Holdout("apart", 0.05), Holdout("apart", 0.1)
    assert (small.holds(PEOPLE) <= large.holds(PEOPLE)).all()
    found = assign(PEOPLE, ROLLOUT, "50 %", holdout=small)
    assert (found.exposed == ~small.holds(PEOPLE)).all()
    assert_allclose((found.arm[found.exposed] == "hybrid").mean(), 0.5, atol=0.012)


def test_a_layer_must_fit_the_experiment() -> None:
    layer = Layer("one", "layer", {"x": 0.5})
    other = Experiment("y", "s", {"a": 0.5, "b": 0.5}, "a", layer="one")
    with pytest.raises(InputError, match="none for experiment y"):
        assign(["u"], other, layer=layer)
    with pytest.raises(InputError, match="is in layer None"):
        assign(["u"], ROLLOUT, "10 %", layer=layer)


# --------------------------------------------------------------------------------------------------- definitions


GOOD: dict[str, Any] = {"name": "e", "salt": "s", "arms": {"a": 0.5, "b": 0.5}, "control": "a"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"salt": ""}, "salt of experiment e is ''"),
        ({"salt": "  "}, "salt of experiment e"),
        ({"salt": "a:b"}, "without a colon"),
        ({"salt": 3}, "salt of experiment e is 3"),
        ({"name": ""}, "name of an experiment is ''"),
        ({"arms": {"a": -0.1, "b": 1.1}}, "share of a in experiment e is -0.1"),
        ({"arms": {"a": 0.6, "b": 0.6}}, "add up to 1.2"),
        ({"arms": {"a": 0.4, "b": 0.4}}, "add up to 0.8"),
        ({"arms": {"a": math.nan, "b": 0.5}}, "share of a in experiment e is nan"),
        ({"arms": {"a": "half", "b": 0.5}}, "share of a in experiment e is 'half'"),
        ({"arms": {"a": True, "b": 0}}, "share of a in experiment e is True"),
        ({"arms": {"a": 0.5, "a ": 0.5}}, "names an arm twice"),
        ({"arms": {"a": 1.0}}, "at least two"),
        ({"arms": {}}, "must be a dictionary"),
        ({"arms": ["a", "b"]}, "must be a dictionary"),
        ({"arms": {"": 0.5, "a": 0.5}}, "an arm named ''"),
        ({"control": "c"}, "must be one of a, b"),
        ({"traffic": 1.5}, "traffic of experiment e is 1.5"),
        ({"traffic": math.nan}, "traffic of experiment e is nan"),
        ({"stages": ({"name": "x"}, {"name": "x"})}, "each name may appear once"),
        ({"stages": ({"name": "x", "shares": {"a": 0.5, "c": 0.5}},)}, "has the arm 'c'"),
        ({"stages": ({"name": "x", "traffic": -1},)}, "traffic of stage x is -1"),
        ({"stages": ({"share": 1},)}, "each is a dictionary of name"),
        ({"shares": 1}, "definition has"),
    ],
)
def test_a_bad_definition_is_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        Experiment.from_dict(GOOD | change)


def test_a_definition_comes_back_from_its_dictionary() -> None:
    import json

    experiment = Experiment("e", "s", {"a": 0.5, "b": 0.5}, "a", 0.5, (Stage("one"), Stage("two", {"b": 1.0})))
    assert Experiment.from_dict(json.loads(json.dumps(experiment.to_dict()))) == experiment
    assert Experiment.from_dict(GOOD).stage().name == "all"
    with pytest.raises(InputError, match="definition lacks salt"):
        Experiment.from_dict({key: value for key, value in GOOD.items() if key != "salt"})
    with pytest.raises(InputTypeError, match="each is a dictionary of name"):
        Experiment.from_dict(GOOD | {"stages": [{"title": "x"}]})


def test_stages_are_asked_for_by_name() -> None:
    with pytest.raises(InputError, match="stage is missing"):
        assign(PEOPLE[:3], ROLLOUT)
    with pytest.raises(InputError, match="stage is '20 %'"):
        assign(PEOPLE[:3], ROLLOUT, "20 %")
    with pytest.raises(InputError, match="steps is empty"):
        ramp_up("e", "s", "a", "b", ())
    with pytest.raises(InputError, match="must lie in"):
        ramp_up("e", "s", "a", "b", (1.5,))


# ----------------------------------------------------------------------------------------------------- exposures


def test_exposures_carry_the_probability_of_the_arm_into_the_log(workspace: Path) -> None:
    log = DecisionLog.open(workspace)
    assigned = assign(PEOPLE[:1000], ROLLOUT, "10 %", holdout=Holdout("h", 0.2))
    at = pd.Timestamp("2026-03-29 01:30", tz="UTC")
    ids = [str(item) for item in uuid7s(1000)]
    assert expose(log, assigned, at, ids) == int(assigned.exposed.sum())
    assert expose(log, assigned, at, ids) == int(assigned.exposed.sum()), "once more changes nothing"
    found = log.exposed("hybrid").set_index("user_key").loc[assigned.user[assigned.exposed].tolist()]
    assert found["share"].tolist() == [{"formula": 0.9, "hybrid": 0.1}[arm] for arm in found["arm"]]
    assert found["arm"].tolist() == assigned.arm[assigned.exposed].tolist()
    assert (found["exposed_at"] == at).all() and (found["stage"] == "10 %").all()
    assert [str(item) for item in found["decision_id"]] == [
        item for item, inside in zip(ids, assigned.exposed) if inside
    ]
    expose(log, assign(PEOPLE[:1000], ROLLOUT, "50 %"), at)
    assert len(log.exposed("hybrid")) == int(assigned.exposed.sum()) + 1000
    nobody = assign(PEOPLE[:5], Experiment.from_dict(GOOD | {"traffic": 0.0}))
    assert expose(log, nobody, at) == 0 and log.exposed("e").empty


def test_another_arm_in_the_same_stage_is_a_conflict(workspace: Path) -> None:
    log = DecisionLog.open(workspace)
    at = pd.Timestamp("2026-03-29 01:30", tz="UTC")
    expose(log, assign(PEOPLE[:50], ROLLOUT, "50 %"), at)
    other = Experiment("hybrid", "another salt", ROLLOUT.arms, ROLLOUT.control, stages=ROLLOUT.stages)
    with pytest.raises(CallingError, match="arm"):
        expose(log, assign(PEOPLE[:50], other, "50 %"), at)


def test_exposures_of_the_wrong_length_are_refused() -> None:
    assigned = assign(PEOPLE[:1000], ROLLOUT, "10 %")
    with pytest.raises(InputError, match="decision_ids has 2 items"):
        exposures(assigned, pd.Timestamp("2026-03-29", tz="UTC"), ["a", "b"])
    with pytest.raises(InputError, match="exposed_at has 1 items"):
        exposures(assigned, [pd.Timestamp("2026-03-29", tz="UTC")])
    assert_array_equal(exposures(assigned, "2026-03-29T00:00:00Z")["user_key"], assigned.user)
