"""The formula against an oracle: plain Python, one row at a time, written from the description of the domain."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from calling_ai.core.contract import FEATURE_NAMES, feature_table
from calling_ai.core.errors import InputError
from calling_ai.score.formula import WEIGHTS, FormulaBreakdown, formula, trend_boost

TERMS = [
    "vibe_compatibility",
    "connection",
    "fulfilment",
    "positive_influence",
    "trajectory",
    "life_betterment",
    "context_factor",
    "timing_factor",
    "formula_score",
]
DIMENSIONS = [name.removeprefix("user_") for name in FEATURE_NAMES[:12]]
NAN = math.nan


def clip(value: float, low: float = 0.0, high: float = 1.0) -> float:
    """Return the value moved into [low, high]."""
    return min(max(value, low), high)


def oracle(features: list[float], assessment: list[float] | None) -> dict[str, float]:
    """Return all terms of one row, computed as a reader of the description would."""
    row = {name: None if math.isnan(value) else value for name, value in zip(FEATURE_NAMES, features)}

    def value(name: str) -> float:
        found = row[name]
        return 0.5 if found is None else found

    def times(name: str, base: float, slope: float) -> float:
        found = row[name]
        return 1.0 if found is None else base + slope * found

    user = {name: value(f"user_{name}") for name in DIMENSIONS}
    spot = {name: value(f"spot_{name}") for name in DIMENSIONS}
    for vibes in (user, spot):
        vibes["exploration"] = (vibes["exploration_eagerness"] + vibes["novelty_seeking"]) / 2
    mean = sum(1 - abs(user[name] - spot[name]) for name in DIMENSIONS) / 12
    energy = 1 - abs(user["overall_energy"] - spot["overall_energy"])
    exploration = 1 - abs(user["exploration"] - spot["exploration"])
    social = 1 - abs(user["social_preference"] - spot["social_preference"])
    good = [0.5 if assessment is None or math.isnan(item) else item for item in (assessment or [NAN] * 5)]
    developmental, educational, social_value, cultural, risk = good
    company = 0.5 * spot["overall_energy"] + 0.5 * spot["social_preference"]

    vibe = 0.50 * mean + 0.20 * energy + 0.15 * exploration + 0.15 * social
    network, community = value("context_network_effects"), value("context_community_patterns")
    connection = 0.40 * vibe + 0.25 * network + 0.20 * community + 0.15 * company
    alone = 0.40 * vibe + 0.25 * 0.5 + 0.20 * 0.5 + 0.15 * company
    fulfilment = 0.40 * energy + 0.35 * exploration + 0.25 * social
    influence = 0.30 * developmental + 0.25 * educational + 0.25 * social_value + 0.10 * (1 - risk) + 0.10 * cultural
    trajectory = 0.30 * developmental + 0.25 * educational + 0.25 * social_value + 0.20 * cultural
    life = 0.40 * trajectory + 0.30 * alone + 0.20 * influence + 0.10 * fulfilment
    proximity = row["context_location_proximity"]
    near = 1.0 if proximity is None else 0.9 if proximity < 0.5 else 1.1 if proximity > 0.8 else 1.0
    context = clip(
        near
        * times("context_journey_alignment", 0.8, 0.2)
        * times("context_user_receptivity", 0.7, 0.3)
        * times("context_opportunity_availability", 0.0, 1.0)
    )
    timing = clip(
        times("timing_optimal_time_of_day", 0.8, 0.2)
        * times("timing_optimal_day_of_week", 0.8, 0.2)
        * times("timing_user_patterns", 0.7, 0.3)
        * times("timing_opportunity_timing", 0.0, 1.0)
    )
    score = clip(0.40 * vibe + 0.30 * life + 0.15 * connection + 0.10 * context + 0.05 * timing)
    return dict(zip(TERMS, [vibe, connection, fulfilment, influence, trajectory, life, context, timing, score]))


# The corners matter most: missing, the ends, the thresholds of proximity and their neighbours.
CORNERS = [
    NAN,
    0.0,
    1.0,
    0.5,
    0.8,
    math.nextafter(0.5, 0),
    math.nextafter(0.5, 1),
    math.nextafter(0.8, 0),
    math.nextafter(0.8, 1),
]
VALUE = st.one_of(st.sampled_from(CORNERS), st.floats(0, 1))
ROW = st.lists(VALUE, min_size=45, max_size=45)
GOOD = st.one_of(st.none(), st.lists(VALUE, min_size=5, max_size=5))


def table(rows: int, seed: int = 0, missing: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Return features and assessments of random moments."""
    rng = np.random.default_rng(seed)
    values = rng.random((rows, 50))
    values[rng.random(values.shape) < missing] = np.nan
    return values[:, :45], values[:, 45:]


def rows_equal(first: FormulaBreakdown, second: FormulaBreakdown) -> None:
    """Assert that two breakdowns agree in every bit."""
    for name in TERMS:
        assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)


@given(ROW, GOOD)
def test_every_term_of_a_row_agrees_with_the_oracle(row: list[float], assessment: list[float] | None) -> None:
    found = formula(np.array([row]), None if assessment is None else np.array([assessment]))
    for name, expected in oracle(row, assessment).items():
        assert_allclose(getattr(found, name), [expected], rtol=1e-12, atol=1e-15, err_msg=name)


def test_every_term_of_many_rows_agrees_with_the_oracle() -> None:
    features, assessment = table(3000)
    found = formula(features, assessment)
    expected = [oracle(list(row), list(good)) for row, good in zip(features, assessment)]
    for name in TERMS:
        assert_allclose(getattr(found, name), [row[name] for row in expected], rtol=1e-12, err_msg=name)


def test_the_oracle_sees_a_wrong_weight() -> None:
    """Change each input of a row a little: the terms that must move do, the others do not."""
    rng = np.random.default_rng(5)
    row, good = rng.uniform(0.3, 0.45, 45), rng.uniform(0.3, 0.45, 5)
    base = formula(row[None], good[None]).columns()
    used = set()
    for index in range(50):
        changed_row, changed_good = row.copy(), good.copy()
        (changed_row if index < 45 else changed_good)[index % 45] += 0.01
        moved = formula(changed_row[None], changed_good[None]).columns()
        expected, before = oracle(list(changed_row), list(changed_good)), oracle(list(row), list(good))
        for name in TERMS:
            assert_allclose(
                moved[name] - base[name], expected[name] - before[name], atol=1e-14, err_msg=f"{index} {name}"
            )
            if abs(expected[name] - before[name]) > 1e-9:
                used.add((index, name))
    # 24 vibes, 5 of context, 4 of timing and 5 of assessment move the score (proximity only at its thresholds).
    moving = {index for index, name in used if name == "formula_score"}
    assert moving == {*range(24), *range(25, 30), *range(34, 38), *range(45, 50)}


def test_the_neutral_moment_by_hand() -> None:
    found = formula(np.full((1, 39), np.nan))
    by_hand = [1, 0.7, 1, 0.5, 0.5, 0.61, 1, 1, 0.838]
    assert_allclose([getattr(found, name)[0] for name in TERMS], by_hand, rtol=1e-14)


def test_a_moment_by_hand() -> None:
    """User all 1, spot all 0: no dimension agrees, and everything else is at its worst."""
    row = np.array([[1.0] * 12 + [0.0] * 12 + [0.0] * 15])
    found = formula(row, np.array([[0, 0, 0, 0, 1.0]]))
    # alone = 0.25 * 0.5 + 0.20 * 0.5 = 0.225; life = 0.30 * 0.225 = 0.0675; score = 0.30 * 0.0675
    by_hand = [0, 0, 0, 0, 0, 0.0675, 0, 0, 0.02025]
    assert_allclose([getattr(found, name)[0] for name in TERMS], by_hand, atol=1e-15)
    best = formula(np.ones((1, 39)), np.array([[1, 1, 1, 1, 0.0]]))
    # alone = 0.4 + 0.225 + 0.15 = 0.775; life = 0.4 + 0.2325 + 0.2 + 0.1; the rest is 1
    by_hand = [1, 1, 1, 1, 1, 0.9325, 1, 1, 0.97975]
    assert_allclose([getattr(best, name)[0] for name in TERMS], by_hand, rtol=1e-14)


@pytest.mark.parametrize(
    ("proximity", "expected"),
    [
        (0.0, 0.9),
        (math.nextafter(0.5, 0), 0.9),
        (0.5, 1.0),
        (0.8, 1.0),
        (math.nextafter(0.8, 1), 1.1),
        (1.0, 1.1),
        (NAN, 1.0),
    ],
)
def test_the_steps_of_proximity(proximity: float, expected: float) -> None:
    row = np.full((1, 45), np.nan)
    row[0, FEATURE_NAMES.index("context_location_proximity")] = proximity
    row[0, FEATURE_NAMES.index("context_opportunity_availability")] = 0.5
    assert_allclose(formula(row).context_factor, [0.5 * expected], rtol=1e-15)


def test_the_context_is_clipped() -> None:
    row = np.ones((1, 45))
    assert formula(row).context_factor[0] == 1.0


@pytest.mark.parametrize("name", [name for name in FEATURE_NAMES if name.startswith(("context_", "timing_"))])
def test_a_missing_multiplier_is_left_out(name: str) -> None:
    """Missing equals the value at which the multiplier is 1, or, in a sum, the neutral value."""
    row = np.full((1, 45), 0.6)
    without = row.copy()
    without[0, FEATURE_NAMES.index(name)] = np.nan
    summed = ("context_network_effects", "context_community_patterns")
    substitute = 0.5 if name in summed else 0.6 if name == "context_location_proximity" else 1.0
    row[0, FEATURE_NAMES.index(name)] = substitute
    rows_equal(formula(without), formula(row))


def test_a_missing_vibe_or_assessment_is_a_half() -> None:
    features, assessment = table(200, missing=0.5)
    summed = [*range(24), 28, 29]
    filled, good = features.copy(), np.where(np.isnan(assessment), 0.5, assessment)
    filled[:, summed] = np.where(np.isnan(features[:, summed]), 0.5, features[:, summed])
    rows_equal(formula(features, assessment), formula(filled, good))
    rows_equal(formula(features), formula(features, np.full((200, 5), 0.5)))


def test_history_and_unused_context_do_not_matter() -> None:
    features, assessment = table(100)
    changed = features.copy()
    changed[:, [30, 31, 32, 33, 38, *range(39, 45)]] = 0.123
    rows_equal(formula(features, assessment), formula(changed, assessment))
    rows_equal(formula(features, assessment), formula(features[:, :39], assessment))


def one_by_one(features: np.ndarray, assessment: np.ndarray) -> FormulaBreakdown:
    """Return the breakdown of a table computed a row at a time."""
    parts = [formula(features[index : index + 1], assessment[index : index + 1]) for index in range(len(features))]
    return FormulaBreakdown(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in TERMS})


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rows": np.ascontiguousarray,
    "columns": np.asfortranarray,
    "every other": lambda values: np.repeat(values, 2, axis=0)[::2],
    "backwards": lambda values: np.ascontiguousarray(values[::-1])[::-1],
    "wider": lambda values: np.hstack([values, values])[:, : values.shape[1]],
    "read only": lambda values: np.frombuffer(values.tobytes()).reshape(values.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_one_row_equals_the_batch_in_every_bit(layout: str, rows: int) -> None:
    features, assessment = table(rows, seed=3)
    batch = formula(LAYOUTS[layout](features), LAYOUTS[layout](assessment))
    rows_equal(batch, one_by_one(features, assessment))


def test_the_order_of_rows_does_not_matter() -> None:
    features, assessment = table(2000, seed=4)
    order = np.random.default_rng(9).permutation(2000)
    found, shuffled = formula(features, assessment), formula(features[order], assessment[order])
    for name in TERMS:
        assert_array_equal(getattr(shuffled, name), getattr(found, name)[order])


def test_user_and_spot_change_places_in_the_compatibility() -> None:
    features, _ = table(500, seed=6)
    swapped = features.copy()
    swapped[:, :24] = features[:, [*range(12, 24), *range(12)]]
    first, second = formula(features), formula(swapped)
    assert_allclose(first.vibe_compatibility, second.vibe_compatibility, rtol=1e-14)
    assert_allclose(first.fulfilment, second.fulfilment, rtol=1e-14)
    assert not np.allclose(first.connection, second.connection)


@given(ROW, GOOD)
def test_every_term_stays_in_its_range(row: list[float], assessment: list[float] | None) -> None:
    found = formula(np.array([row]), None if assessment is None else np.array([assessment]))
    for name, values in found.columns().items():
        assert -1e-15 <= values[0] <= 1 + 1e-15, name
    assert 0 <= found.formula_score[0] <= 1


def test_nothing_is_changed() -> None:
    features, assessment = table(50)
    before = features.copy(), assessment.copy()
    formula(features, assessment)
    assert_array_equal(features, before[0])
    assert_array_equal(assessment, before[1])


def test_the_score_is_the_sum_of_its_contributions() -> None:
    features, assessment = table(300)
    found = formula(features, assessment)
    assert WEIGHTS == {
        "vibe_compatibility": 0.40,
        "life_betterment": 0.30,
        "connection": 0.15,
        "context_factor": 0.10,
        "timing_factor": 0.05,
    }
    assert list(found.contributions()) == list(WEIGHTS)
    assert_allclose(sum(found.contributions().values()), found.formula_score, rtol=1e-14)
    assert len(found) == 300 and set(found.columns()) == set(TERMS)
    assert "mean of 300" in found._repr_html_() and "value" in formula(features[:1])._repr_html_()


def test_no_rows_give_no_scores() -> None:
    assert formula(np.zeros((0, 45))).formula_score.shape == (0,)
    assert formula(np.zeros((0, 39)), np.zeros((0, 5))).formula_score.shape == (0,)


def test_whole_numbers_and_short_floats_are_taken() -> None:
    rows_equal(formula(np.ones((2, 39), dtype=int)), formula(np.ones((2, 39))))
    rows_equal(formula(np.full((2, 39), 0.25, dtype=np.float32)), formula(np.full((2, 39), 0.25)))


@pytest.mark.parametrize("shape", [(39,), (2, 38), (2, 40), (2, 46), (2, 3, 39), ()])
def test_other_shapes_of_features_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"features has shape .*: it must be n x 39 or n x 45"):
        formula(np.zeros(shape))


@pytest.mark.parametrize("shape", [(5,), (2, 4), (1, 5), (3, 5)])
def test_other_shapes_of_assessments_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"assessment has shape .*: it must be 2 x 5"):
        formula(np.zeros((2, 39)), np.zeros(shape))


def boost_oracle(row: list[float]) -> float:
    """Return the trend boost of one row in plain Python; a missing trend adds nothing."""
    emerging, community, cultural, life = [0.0 if math.isnan(item) else item for item in row]
    return clip(0.30 * emerging + 0.30 * community + 0.20 * cultural + 0.20 * life, -0.1, 0.2)


TREND = st.lists(st.one_of(st.just(NAN), st.sampled_from([-1.0, 0.0, 1.0]), st.floats(-1, 1)), min_size=4, max_size=4)


@given(TREND)
def test_the_trend_boost_agrees_with_the_oracle(row: list[float]) -> None:
    assert_allclose(trend_boost(np.array([row])), [boost_oracle(row)], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1, 1, 1, 1], 0.2),
        ([-1, -1, -1, -1], -0.1),
        ([0.1, 0.2, 0.3, -0.4], 0.07),
        ([0.2, 0.2, 0.2, 0.2], 0.2),
        ([-0.1, NAN, NAN, NAN], -0.03),
        ([NAN] * 4, 0.0),
    ],
)
def test_trend_boosts_by_hand(row: list[float], expected: float) -> None:
    assert_allclose(trend_boost(np.array([row])), [expected], rtol=1e-14, atol=1e-17)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_trend_equals_the_batch_in_every_bit(layout: str) -> None:
    trend = np.random.default_rng(2).uniform(-0.3, 0.3, (3000, 4))
    batch = trend_boost(LAYOUTS[layout](trend))
    assert_array_equal(batch, [trend_boost(trend[index : index + 1])[0] for index in range(len(trend))])


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 5), (1, 2, 4)])
def test_other_shapes_of_trends_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"trend has shape .*: it must be n x 4"):
        trend_boost(np.zeros(shape))


def test_a_million_rows_in_one_call() -> None:
    features = np.random.default_rng(1).random((1_000_000, 45), dtype=np.float64)
    found = formula(features).formula_score
    assert found.shape == (1_000_000,) and np.isfinite(found).all()
    chosen = np.random.default_rng(2).integers(0, 1_000_000, 200)
    assert_allclose(
        found[chosen], [oracle(list(features[index]), None)["formula_score"] for index in chosen], rtol=1e-12
    )


def test_the_logged_score_of_the_reference_data_is_another_formula(shared: object) -> None:
    """The reference generator logged a simplified formula; ours is the full one and agrees in tendency."""
    import pandas as pd

    frame = pd.read_csv(shared / "data" / "hybrid_v1.csv.gz")  # type: ignore[operator]
    features = feature_table(frame).values
    logged = frame["formula_calling_score"].to_numpy()
    vibes = 1 - np.abs(features[:, :12] - features[:, 12:24]).mean(axis=1)
    simplified = 0.5 * vibes + 0.3 * features[:, 24:30].mean(axis=1) + 0.2 * features[:, 34:38].mean(axis=1)
    assert_allclose(simplified, logged, atol=2e-4)
    assert np.corrcoef(formula(features).formula_score, logged)[0, 1] > 0.6
