"""The contract: the published order of features, every kind of input, and what is refused."""

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from calling_ai.core import contract
from calling_ai.core.contract import (
    ASSESSMENT_NAMES,
    BASE_NAMES,
    FEATURE_NAMES,
    FEATURES,
    NEUTRAL,
    TREND_NAMES,
    VIBES,
    FeatureTable,
    check_columns,
    check_range,
    feature_table,
    fill_neutral,
    index_of,
)
from calling_ai.core.errors import InputError, InputTypeError

# Written down a second time, from the description of the domain, so that a reordering cannot pass unseen.
GROUPS = {
    "user": """exploration_eagerness community_orientation location_adventurousness authenticity_preference
        trust_network_reliance temporal_flexibility energy_preference novelty_seeking value_orientation crowd_tolerance
        social_preference overall_energy""",
    "context": """location_proximity journey_alignment user_receptivity opportunity_availability network_effects
        community_patterns social_context weather_context event_context accessibility_context""",
    "timing": "optimal_time_of_day optimal_day_of_week user_patterns opportunity_timing seasonal_timing",
    "history": """past_positive_rate past_negative_rate average_engagement interaction_count time_since_last_positive
        activity_level""",
}
EXPECTED = [
    f"{group}_{label}"
    for group in ("user", "spot", "context", "timing", "history")
    for label in GROUPS["user" if group == "spot" else group].split()
]
ENERGY = EXPECTED.index("user_overall_energy")

UNIT = st.floats(0, 1, allow_nan=False)
CELL = st.one_of(UNIT, st.none(), st.just(float("nan")))
BAD = st.one_of(
    st.floats(min_value=1, exclude_min=True),
    st.floats(max_value=0, exclude_max=True),
    st.integers(2),
    st.integers(max_value=-1),
).filter(lambda value: not 0 <= value <= 1)


def same(first: np.ndarray, second: np.ndarray) -> bool:
    """Say whether two arrays agree, missing values included."""
    return np.array_equal(first, second, equal_nan=True)


def test_names_are_those_of_the_domain_in_their_order() -> None:
    assert list(FEATURE_NAMES) == EXPECTED
    assert list(BASE_NAMES) == EXPECTED[:39]
    assert len(FEATURES) == 45 and len(set(FEATURE_NAMES)) == 45
    assert [feature.index for feature in FEATURES] == list(range(45))
    assert list(VIBES) == GROUPS["user"].split()


def test_groups_slices_and_meanings_agree() -> None:
    for name in ("user", "spot", "context", "timing", "history"):
        chosen = FEATURES[getattr(contract, name.upper())]
        assert {feature.group for feature in chosen} == {name}
        assert len(chosen) == sum(feature.group == name for feature in FEATURES)
    for feature in FEATURES:
        assert feature.name == f"{feature.group}_{feature.label}" and feature.meaning


def test_neutral_is_a_half_except_for_the_count() -> None:
    expected = [0.0 if name == "history_interaction_count" else 0.5 for name in EXPECTED]
    assert NEUTRAL.tolist() == expected == [feature.neutral for feature in FEATURES]
    with pytest.raises(ValueError, match="read-only"):
        NEUTRAL[0] = 1


def test_known_columns_do_not_collide_with_features() -> None:
    assert not set(contract.KNOWN_COLUMNS) & {*FEATURE_NAMES, *ASSESSMENT_NAMES, *TREND_NAMES}
    assert all(contract.KNOWN_COLUMNS.values())


def test_index_of_every_name_and_of_none() -> None:
    assert [index_of(name) for name in EXPECTED] == list(range(45))
    with pytest.raises(InputError, match="did you mean user_overall_energy"):
        index_of("user_overal_energy")
    with pytest.raises(InputError, match="must be one of the 45 features"):
        index_of("")


@given(st.lists(st.lists(CELL, min_size=45, max_size=45), min_size=1, max_size=4), st.sampled_from([39, 45]))
def test_every_kind_of_input_gives_the_same_table(rows: list[list[float | None]], width: int) -> None:
    rows = [row[:width] for row in rows]
    names = EXPECTED[:width]
    expected = np.full((len(rows), 45), np.nan)
    for index, row in enumerate(rows):
        expected[index, :width] = [np.nan if value is None else value for value in row]
    flat = [dict(zip(names, row)) for row in rows]
    nested: list[dict[str, Any]] = []
    for row in rows:
        groups: dict[str, Any] = {}
        for name, value in zip(names, row):
            group, _, label = name.partition("_")
            groups.setdefault(group, {})[label] = value
        nested.append(groups)
    shuffled = pd.DataFrame(flat)[names[::-1]]
    inputs = [
        flat,
        nested,
        tuple(flat),
        np.array(rows, dtype=object),
        expected[:, :width],
        np.asfortranarray(expected[:, :width]),
        pd.DataFrame(expected[:, :width], columns=names),
        shuffled,
        pd.DataFrame(expected[:, :width], columns=names, index=range(100, 100 + len(rows))),
        pa.table({name: pa.array(expected[:, index], from_pandas=True) for index, name in enumerate(names)}),
    ]
    if len(rows) == 1:
        inputs += [flat[0], nested[0], expected[0, :width]]
    for data in inputs:
        table = feature_table(data)
        assert table.values.dtype == np.float64 and table.values.shape == expected.shape
        assert same(table.values, expected)
        assert table.missing.tolist() == np.isnan(expected).sum(axis=1).tolist()
        assert sum(table.missing_by_feature.values()) == np.isnan(expected).sum()
        assert len(table) == len(rows) and table.assessment is None and table.trend is None


@pytest.mark.parametrize("dtype", ["Float64", "Int64", "float32", "object", "double[pyarrow]"])
def test_nullable_columns_of_pandas(dtype: str) -> None:
    missing = np.nan if dtype == "float32" else pd.NA
    frame = pd.DataFrame({"user_overall_energy": pd.Series([missing, 1, 0], dtype=dtype)})
    assert same(feature_table(frame).values[:, ENERGY], np.array([np.nan, 1, 0]))


@pytest.mark.parametrize("missing", [None, float("nan"), np.nan, np.float32("nan"), pd.NA, pd.NaT], ids=repr)
def test_every_spelling_of_missing(missing: Any) -> None:
    assert np.isnan(feature_table({"user_overall_energy": missing}).values).all()


def test_a_masked_value_is_missing() -> None:
    masked = np.ma.array(np.full((1, 39), 0.25), mask=[[True] + [False] * 38])
    assert feature_table(masked).missing.tolist() == [7]


def test_empty_tables_are_tables() -> None:
    assert feature_table(pd.DataFrame({"user_overall_energy": []})).values.shape == (0, 45)
    assert feature_table(np.empty((0, 39))).values.shape == (0, 45)
    assert feature_table({}).missing.tolist() == [45]
    assert feature_table([{}, {}]).missing.tolist() == [45, 45]


def test_the_table_does_not_share_memory_with_its_source() -> None:
    source = np.full((2, 45), 0.5)
    table = feature_table(source)
    source[:] = 0
    assert (table.values == 0.5).all()
    assert feature_table(table) is table


def test_assessment_and_trend() -> None:
    table = feature_table([{"assessment": {"risk": 0.2}, "trend_cultural": -1}, {"trend": {"life_pattern": 1.0}}])
    assert table.assessment is not None and table.trend is not None
    assert same(table.assessment, np.array([[np.nan] * 4 + [0.2], [np.nan] * 5]))
    assert same(table.trend, np.array([[np.nan, np.nan, -1, np.nan], [np.nan, np.nan, np.nan, 1]]))
    for name, value in (("trend_emerging", -1.01), ("trend_emerging", 1.01), ("assessment_risk", -0.01)):
        with pytest.raises(InputError, match=f"row 0, column {name}"):
            feature_table({name: value})


def test_known_columns_are_accepted_and_are_no_features() -> None:
    frame = pd.DataFrame({name: ["text"] for name in contract.KNOWN_COLUMNS})
    assert feature_table(frame).missing.tolist() == [45]


@given(
    rows=st.integers(1, 5),
    where=st.integers(0, 224),
    column=st.integers(0, 44),
    value=BAD,
    kind=st.sampled_from(["frame", "array", "list"]),
)
def test_one_bad_value_is_found_wherever_it_is(rows: int, where: int, column: int, value: float, kind: str) -> None:
    row = where % rows
    values = np.full((rows, 45), 0.5, dtype=object)
    values[row, column] = value
    name = EXPECTED[column]
    data: Any = values
    if kind == "frame":
        data = pd.DataFrame(values, columns=EXPECTED).infer_objects()
    elif kind == "list":
        data = [dict(zip(EXPECTED, items)) for items in values]
    with pytest.raises(InputError) as caught:
        feature_table(data)
    assert (caught.value.row, caught.value.column) == (row, name)
    assert f"row {row}, column {name}: " in str(caught.value)
    rule = "not finite" if abs(value) == float("inf") else "outside [0, 1]"
    assert rule in str(caught.value) or abs(value) > 1e308


@pytest.mark.parametrize(
    "value",
    [
        "0.5",
        b"0.5",
        "",
        True,
        False,
        np.True_,
        1j,
        Decimal("0.5"),
        [0.5],
        (0.5, 0.6),
        {0.5},
        object(),
        pd.Timestamp(0),
        np.array([0.1, 0.2]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_a_number_is_refused_with_its_place(value: Any) -> None:
    with pytest.raises(InputTypeError, match="row 1, column user_overall_energy: .* is not a number") as caught:
        feature_table([{"user_overall_energy": 0.5}, {"user_overall_energy": value}])
    assert isinstance(caught.value, TypeError | ValueError)
    assert (caught.value.row, caught.value.column) == (1, "user_overall_energy")


def test_a_number_too_large_for_a_float_is_out_of_range() -> None:
    with pytest.raises(InputError, match="row 0, column user_overall_energy"):
        feature_table({"user_overall_energy": 10**400})


@pytest.mark.parametrize("dtype", [bool, str, complex, bytes, "datetime64[s]"])
def test_arrays_of_other_types_are_refused(dtype: Any) -> None:
    with pytest.raises(InputTypeError, match=f"row 0, column {EXPECTED[0]}"):
        feature_table(np.zeros((2, 39)).astype(dtype))


@pytest.mark.parametrize("shape", [(), (44,), (2, 38), (2, 46), (1, 2, 39), (39, 2)])
def test_arrays_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=re.escape(f"data has shape {shape}: an array must have 39 or 45 columns")):
        feature_table(np.zeros(shape))


@pytest.mark.parametrize(
    "data",
    [None, 3, "text", b"text", [0.5] * 39, {1, 2}, pd.Series([0.5]), [{"user_overall_energy": 0.5}, 3]],
    ids=repr,
)
def test_other_things_are_refused(data: Any) -> None:
    with pytest.raises(InputTypeError, match="must be a frame, an array, a dictionary or a list of dictionaries"):
        feature_table(data)


Maker = Callable[[str], Any]
MAKERS: list[Maker] = [
    lambda name: pd.DataFrame({name: [0.5]}),
    lambda name: {name: 0.5},
    lambda name: pa.table({name: [0.5]}),
]


@pytest.mark.parametrize("make", MAKERS, ids=["pandas", "dictionary", "arrow"])
def test_an_unknown_column_is_refused_by_name_with_the_nearest_known(make: Maker) -> None:
    with pytest.raises(
        InputError, match="unknown column user_overal_energy: .*did you mean user_overall_energy"
    ) as caught:
        feature_table(make("user_overal_energy"))
    assert caught.value.column == "user_overal_energy"
    with pytest.raises(InputError, match="unknown column zzz: "):
        feature_table(make("zzz"))


def test_many_unknown_columns_are_shortened() -> None:
    with pytest.raises(InputError, match=r"unknown columns a1, a2, a3, a4, a5 \.\.\.: "):
        check_columns([f"a{index}" for index in range(1, 9)])
    with pytest.raises(InputError, match="column user_id appears more than once"):
        check_columns(["user_id", "split", "user_id"])
    check_columns([*FEATURE_NAMES, *contract.KNOWN_COLUMNS])


def test_a_repeated_column_of_a_frame_is_refused() -> None:
    frame = pd.DataFrame(np.array([[0.1, 0.2]]), columns=["user_overall_energy"] * 2)
    with pytest.raises(InputError, match="user_overall_energy appears more than once"):
        feature_table(frame)


@pytest.mark.parametrize("first", ["flat", "nested"])
def test_a_feature_given_twice_in_one_record_is_refused(first: str) -> None:
    parts: list[dict[str, Any]] = [{"user_overall_energy": 0.7}, {"user": {"overall_energy": 0.2}}]
    merged = {key: value for part in (parts if first == "flat" else parts[::-1]) for key, value in part.items()}
    with pytest.raises(InputError, match="user_overall_energy"):
        feature_table(merged)


def test_a_group_must_be_a_dictionary() -> None:
    with pytest.raises(InputTypeError, match="row 0, history: float given; a group is a dictionary"):
        feature_table({"history": 0.5})


def test_the_other_bad_values_are_counted() -> None:
    values = np.full((3, 2), 0.5)
    values[1:] = [[2, -1], [np.inf, 0.5]]
    with pytest.raises(InputError, match=r"row 1, column a: 2 is outside \[0, 1\].*\(2 more such values\)"):
        check_range(values, ["a", "b"])
    with pytest.raises(InputError, match=r"row 0, column a: -inf is not finite.*missing$"):
        check_range(np.array([[-np.inf]]), ["a"])
    check_range(np.array([[0.0, 1.0, np.nan]]), ["a", "b", "c"])
    check_range(np.array([[-3.0]]), ["a"], low=-3)


@given(st.lists(st.lists(CELL, min_size=45, max_size=45), min_size=1, max_size=3), st.sampled_from([39, 45]))
def test_fill_neutral_changes_missing_values_only(rows: list[list[float | None]], width: int) -> None:
    values = np.array(rows, dtype=float)[:, :width]
    before = values.copy()
    filled = fill_neutral(values)
    for row, column in np.ndindex(values.shape):
        expected = NEUTRAL[column] if np.isnan(values[row, column]) else values[row, column]
        assert filled[row, column] == expected
    assert_array_equal(values, before)


def test_the_shared_reference_file_is_read_whole(shared: Any) -> None:
    frame = pd.read_csv(shared / "data" / "hybrid_v1.csv.gz")
    table = feature_table(frame)
    assert len(table) == 8_500
    assert table.missing_by_feature.keys() == set(EXPECTED) - set(frame.columns)
    assert same(table.values[:, ENERGY], frame["user_overall_energy"].to_numpy())


def test_a_table_shows_itself() -> None:
    assert "<b>1</b> moments, 45 of 45 features missing" in FeatureTable(np.full((1, 45), np.nan))._repr_html_()
