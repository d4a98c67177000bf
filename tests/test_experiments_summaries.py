"""Summaries add up exactly, from frames, streams and databases, and refuse what cannot be right."""

import itertools

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from calling_ai.core.errors import InputError, InputTypeError
from calling_ai.experiments.summaries import (
    Cell,
    Moments,
    Summaries,
    check_arms,
    from_sums,
    nobody_shared,
    pool,
    summarise,
    summarise_query,
)
from calling_ai.store.database import engine


def frame_of(seed: int, rows: int = 400, users: int = 150, offset: float = 0.0) -> pd.DataFrame:
    """Return rows of users who come several times, in two stages and three days."""
    rng = np.random.default_rng(seed)
    who = rng.integers(0, users, rows)
    stage = rng.integers(0, 2, rows)
    bucket = rng.random(users)
    return pd.DataFrame(
        {
            "user_key": [f"u{i}" for i in who],
            "arm": np.where(bucket[who] < np.array([0.3, 0.6])[stage], "treatment", "control"),
            "stage": np.array(["10%", "50%"])[stage],
            "day": np.array(["2026-03-01", "2026-03-02", "2026-03-03"])[rng.integers(0, 3, rows)],
            "y": rng.normal(0, 1, rows) + offset,
            "s": rng.integers(1, 4, rows).astype(float),
            "x": rng.normal(3, 2, users)[who],
        }
    )


def units_of(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row a user and stage, added up by pandas."""
    keys = frame.groupby(["user_key", "stage"])
    return keys.agg(
        arm=("arm", "first"), day=("day", "min"), y=("y", "sum"), s=("s", "sum"), x=("x", "first")
    ).reset_index()


def assert_same(one: Summaries, other: Summaries, rtol: float = 1e-9) -> None:
    """Assert that two summaries are equal up to rounding."""
    assert (one.columns, one.cells) == (other.columns, other.cells)
    assert one.count.tolist() == other.count.tolist()
    assert_allclose(one.mean, other.mean, rtol=1e-12, atol=1e-9)
    assert_allclose(one.scatter, other.scatter, rtol=rtol, atol=1e-7)
    assert one.shared.cells == other.shared.cells and one.shared.count.tolist() == other.shared.count.tolist()
    assert_allclose(one.shared.mean, other.shared.mean, rtol=1e-12, atol=1e-9)
    assert_allclose(one.shared.scatter, other.shared.scatter, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_a_frame_against_pandas(seed: int) -> None:
    frame = frame_of(seed)
    found, units = summarise(frame, ("y", "s"), ("x",)), units_of(frame)
    groups = units.groupby(["arm", "stage", "day"])
    assert [tuple(cell) for cell in found.cells] == list(groups.groups)
    assert found.count.tolist() == groups.size().tolist() and found.users() == len(units)
    assert_allclose(found.mean, groups[["y", "s", "x"]].mean(), rtol=1e-12)
    for cell, count, scatter in zip(found.cells, found.count, found.scatter, strict=True):
        part = groups.get_group(tuple(cell))[["y", "s", "x"]]
        assert_allclose(scatter, np.cov(part.T) * (count - 1) if count > 1 else 0, rtol=1e-9, atol=1e-12)


def test_users_of_two_stages_against_a_join() -> None:
    frame = frame_of(4)
    found, units = summarise(frame, ("y", "s"), ("x",)), units_of(frame)
    both = units[units.stage == "10%"].merge(units[units.stage == "50%"], on="user_key", suffixes=("", "_2"))
    assert found.shared.count.sum() == len(both) > 20
    for pair, count, mean, scatter in zip(
        found.shared.cells, found.shared.count, found.shared.mean, found.shared.scatter, strict=True
    ):
        first, second = pair
        chosen = both[
            (both.arm == first.arm) & (both.day == first.day) & (both.arm_2 == second.arm) & (both.day_2 == second.day)
        ]
        values = chosen[["y", "s", "x", "y_2", "s_2", "x_2"]].to_numpy()
        assert (first.stage, second.stage, count) == ("10%", "50%", len(chosen))
        assert_allclose(mean, values.mean(axis=0), rtol=1e-12)
        assert_allclose(scatter, (values - values.mean(axis=0)).T @ (values - values.mean(axis=0)), atol=1e-9)


values_of = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30)


@given(values_of, st.integers(0, 30), st.sampled_from([0.0, 1e6, -1e9]))
def test_parts_add_up_to_the_whole(values: list[float], at: int, offset: float) -> None:
    data = np.array(values) + offset
    whole, left, right = (Moments.of(y=part, z=part**0) for part in (data, data[:at], data[at:]))
    joined = left + right
    scale = max(1.0, float(np.ptp(data))) ** 2 * len(data)
    assert joined.count == len(data)
    assert_allclose(joined.mean, whole.mean, rtol=1e-12, atol=1e-9)
    assert_allclose(joined.scatter, whole.scatter, rtol=1e-9, atol=1e-6 * scale)
    back = joined - right
    assert back.count == left.count
    if left.count:
        assert_allclose(back.mean, left.mean, rtol=1e-7, atol=1e-5)
        assert_allclose(back.scatter, left.scatter, rtol=1e-6, atol=1e-4 * scale)
    if len(data) > 1:
        assert_allclose(whole.variance("y"), np.var(data, ddof=1), rtol=1e-9, atol=1e-9)


@settings(max_examples=12)
@given(st.permutations(range(6)), st.integers(0, 5))
def test_order_of_batches_does_not_matter(order: list[int], seed: int) -> None:
    units = units_of(frame_of(seed))
    kept = units[units.stage == "50%"].reset_index(drop=True)  # each user once, so that batches are disjoint
    parts = np.array_split(np.arange(len(kept)), 6)
    arms = ("control", "treatment")
    streamed = sum(summarise(kept.iloc[parts[i]], ("y", "s"), ("x",), arms=arms) for i in order)
    assert isinstance(streamed, Summaries)
    assert_same(streamed, summarise(kept, ("y", "s"), ("x",), arms=arms))


def test_a_late_outcome_is_exchanged() -> None:
    units = units_of(frame_of(2))
    late = units.iloc[:25]
    changed = units.assign(y=units.y + np.where(np.arange(len(units)) < 25, 1.0, 0.0))
    options = {"totals": ("y",), "arms": ("control", "treatment"), "user": None}
    found = summarise(units, **options) - summarise(late, **options) + summarise(changed.iloc[:25], **options)
    assert_same(found, summarise(changed, **options))
    with pytest.raises(InputError, match="what is taken away must be in it"):
        summarise(late, **options) - summarise(units, **options)


def test_pooling_keeps_users_and_their_links() -> None:
    frame = frame_of(5)
    found = summarise(frame, ("y",))
    for names in itertools.chain.from_iterable(itertools.combinations(("stage", "day"), n) for n in (0, 1, 2)):
        pooled = found.over(*names)
        assert pooled.users() == found.users() and pooled.shared.count.sum() == found.shared.count.sum()
        for arm in found.arms:
            assert_allclose(pooled.moments(arm).scatter, found.moments(arm).scatter, rtol=1e-9)
    assert found.pick(stage="10%").users() + found.pick(stage="50%").users() == found.users()
    assert len(found.pick(stage="10%").shared) == 0
    assert {cell.day for cell in found.pick(until="2026-03-02").cells} == {"2026-03-01", "2026-03-02"}
    with pytest.raises(InputError, match="by stage and day"):
        found.over("weather")


def test_a_thousand_million_away_no_digit_is_lost() -> None:
    near, far = (summarise(frame_of(1, offset=offset), ("y",), user=None) for offset in (0.0, 1e9))
    assert_allclose(far.scatter, near.scatter, rtol=1e-5)
    data = np.random.default_rng(0).normal(0, 1, 10_000) + 1e9
    naive = (np.square(data).sum() - data.sum() ** 2 / len(data)) / (len(data) - 1)
    assert abs(Moments.of(y=data).variance("y") - 1) < 0.05 < abs(naive - 1)  # what is avoided


def test_times_give_the_day_in_utc() -> None:
    moments = pd.to_datetime(["2026-03-01T23:30:00-02:00", "2026-03-01T10:00:00Z"], utc=True)
    found = summarise({"arm": ["a", "a"], "y": [1, 2], "day": moments})
    assert [cell.day for cell in found.cells] == ["2026-03-01", "2026-03-02"]


def test_an_arm_without_users_stays_declared() -> None:
    found = summarise({"arm": ["control"], "y": [1.0]}, arms=("control", "treatment"))
    assert found.arms == ("control", "treatment") and found.users("treatment") == 0
    assert found.moments("treatment").count == 0
    none = summarise({"arm": [], "y": []}, arms=("control", "treatment"))
    assert len(none) == 0 and none.users() == 0


BAD = [
    ({"arm": ["a", "b"], "y": [1, np.nan]}, {}, "row 1 of column y is nan"),
    ({"arm": ["a", "b"], "y": [1, -np.inf]}, {}, "row 1 of column y is -inf"),
    ({"arm": ["a", None], "y": [1, 2]}, {}, "every user belongs to an arm"),
    ({"arm": ["a", "b"], "y": [1, 2]}, {"arms": ("a",)}, "arm is 'b', which nobody declared"),
    ({"arm": ["a", "b"], "y": [1, 2]}, {"arms": ("a", "b", "a")}, "each arm is declared once"),
    ({"arm": ["a", "b"], "y": [1]}, {}, "equally long"),
    ({"arm": ["a", "b"]}, {}, "lacks the columns y"),
    ({"arm": ["a", "b"], "y": [1, 2], "user_key": ["u", "u"]}, {}, "1 users are in two arms of the same stage"),
    ({"arm": ["a", "a"], "y": [1, 2], "user_key": ["u", None]}, {}, "row 1 has no user"),
    (
        {"arm": ["a", "a"], "y": [1, 2], "x": [1, 2], "user_key": ["u", "u"]},
        {"covariates": ("x",)},
        "differs within a user",
    ),
    ({"arm": ["a", "a"], "y": [1, 2], "share": [0.1, 0.5]}, {}, "a split that changes begins a new stage"),
    ({"arm": ["a", "a"], "y": [1, 2], "share": [0.1, 1.5]}, {}, "share is 1.5"),
    (
        {"arm": ["a"], "y": [1], "exposed_at": ["2026-03-02"], "happened_at": ["2026-03-01"]},
        {},
        "before the exposure",
    ),
]


@pytest.mark.parametrize(("frame", "options", "message"), BAD, ids=[case[2] for case in BAD])
def test_a_bad_frame_is_refused(frame: dict, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        summarise(pd.DataFrame(frame) if len({len(column) for column in frame.values()}) == 1 else frame, **options)


def test_text_is_no_metric() -> None:
    with pytest.raises(InputTypeError, match="column y is not numeric"):
        summarise({"arm": ["a"], "y": ["many"]})


@pytest.mark.parametrize(
    ("count", "sums", "products", "message"),
    [
        ([-1], [[1]], [[[1]]], "count is -1"),
        ([1.5], [[1]], [[[1]]], "count is 1.5"),
        ([np.nan], [[1]], [[[1]]], "count is nan"),
        ([2], [[np.nan]], [[[1]]], "not finite"),
        ([0], [[1]], [[[1]]], "without users"),
        ([10], [[100]], [[[999]]], "no data has such sums"),
        ([1, 2], [[1]], [[[1]]], "the numbers must agree"),
    ],
)
def test_bad_sums_are_refused(count: list, sums: list, products: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_sums(("y",), [Cell("a")], count, sums, products)


def test_sums_against_values() -> None:
    rng = np.random.default_rng(9)
    data = rng.normal(5, 2, (200, 2))
    shift = np.array([4.0, 6.0])
    away = data - shift
    found = from_sums(("y", "x"), [Cell("a")], [200], away.sum(axis=0), away.T @ away, shift).moments("a")
    assert_allclose(found.mean, data.mean(axis=0), rtol=1e-12)
    assert_allclose(found.scatter / 199, np.cov(data.T), rtol=1e-10)
    constant = from_sums(("y",), [Cell("a")], [3], [[0.3]], [[[3 * 0.1**2]]]).moments("a")
    assert constant.variance("y") == 0  # not the noise of rounding


def test_unlike_summaries_do_not_add_up() -> None:
    one, other = Summaries.of(a=Moments.of(y=[1, 2])), Summaries.of(a=Moments.of(z=[1, 2]))
    with pytest.raises(InputError, match="only like summaries"):
        one + other
    with pytest.raises(InputError, match="only like summaries"):
        one.moments("a") + other.moments("a")
    with pytest.raises(InputError, match="the summary holds y"):
        one.moments("a").average("z")
    assert len(nobody_shared(2)) == 0
    check_arms([], ("a",))
    assert np.isnan(Moments.of(y=[1]).variance("y"))


def test_pool_takes_away_everything() -> None:
    count, mean, scatter = pool(
        np.array([3.0, -3.0]), np.ones((2, 1)), np.array([[[2.0]], [[-2.0]]]), np.zeros(2, int), 1
    )
    assert count.tolist() == [0] and mean.tolist() == [[0.0]] and scatter.tolist() == [[[0.0]]]


# ------------------------------------------------------------------------------------------------- the database


def table_of(frame: pd.DataFrame, connection: sa.Connection) -> sa.Table:
    """Write a frame into a new table."""
    kinds = {name: sa.Double if frame[name].dtype.kind == "f" else sa.Text for name in frame}
    table = sa.Table("units", sa.MetaData(), *(sa.Column(name, kind) for name, kind in kinds.items()))
    table.create(connection)
    rows = [{name: None if value is None else value for name, value in row.items()} for row in frame.to_dict("records")]
    connection.execute(table.insert(), rows)
    return table


@pytest.mark.parametrize("offset", [0.0, 1e9])
def test_the_database_gives_what_the_frame_gives(database_url: str, offset: float) -> None:
    units = units_of(frame_of(6, rows=3_000, users=900))
    units = units.assign(y=units.y + offset)
    with engine(database_url).begin() as connection:
        table = table_of(units, connection)
        asked = summarise_query(connection, table, ("y", "s"), ("x",))
        cold = summarise_query(connection, sa.select(table), ("y", "s"), ("x",), glance=False)
        alone = summarise_query(connection, table, ("y",), returning=False)
    known = summarise(units, ("y", "s"), ("x",))
    assert_same(asked, known, 1e-5 if offset else 1e-9)
    assert_same(cold, known, 1e-5 if offset else 1e-9)
    assert len(alone.shared) == 0 and len(known.shared) > 0


def test_a_misleading_first_look_is_repaired(database_url: str) -> None:
    rng = np.random.default_rng(1)
    first = pd.DataFrame({"arm": "a", "y": np.zeros(1_000)})  # what the glance sees
    rest = pd.DataFrame({"arm": "b", "y": rng.normal(1e9, 1, 20_000)})
    frame = pd.concat([first, rest], ignore_index=True)
    with engine(database_url).begin() as connection:
        found = summarise_query(connection, table_of(frame, connection), arms=("a", "b"))
    assert_allclose(found.moments("b").variance("y"), rest.y.var(), rtol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": None}, "rows lack a value"),
        ({"arm": None}, "arm is missing"),
        ({"arm": "placebo"}, "nobody declared"),
        ({"share": 0.4}, "a split that changes begins a new stage"),
    ],
)
def test_a_bad_row_in_the_database_is_refused(database_url: str, change: dict, message: str) -> None:
    frame = pd.DataFrame({"arm": ["control", "treatment"] * 5, "stage": "10%", "share": 0.5, "y": np.arange(10.0)})
    rows = frame.astype(object)
    for name, value in change.items():
        rows.loc[3, name] = value
    with engine(database_url).begin() as connection:
        table = table_of(frame, connection)
        connection.execute(table.delete())
        connection.execute(table.insert(), rows.to_dict("records"))
        with pytest.raises(InputError, match=message):
            summarise_query(connection, table, arms=("control", "treatment"))
        with pytest.raises(InputError, match="lacks the columns z"):
            summarise_query(connection, table, ("z",))


def test_an_empty_table_has_no_users(database_url: str) -> None:
    with engine(database_url).begin() as connection:
        table = sa.Table("units", sa.MetaData(), sa.Column("arm", sa.Text), sa.Column("y", sa.Double))
        table.create(connection)
        assert summarise_query(connection, table, arms=("control", "treatment")).users() == 0
