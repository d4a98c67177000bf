"""Actions and feedback become outcomes as the domain says."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calling_ai.core.errors import InputError, InputTypeError
from calling_ai.store.outcomes import ACTION_SCORES, outcome_of, outcomes_of, type_of


@pytest.mark.parametrize(
    ("action", "kind", "score"),
    [
        ("visit", "positive", 0.8),
        ("accept", "positive", 0.9),
        ("reject", "negative", 0.2),
        ("ignore", "neutral", 0.5),
        ("Visit", "neutral", 0.5),
        ("é", "neutral", 0.5),
    ],
)
def test_actions(action: str, kind: str, score: float) -> None:
    assert outcome_of(action) == (kind, score)


@given(st.floats(0, 1))
def test_feedback_is_its_own_score(feedback: float) -> None:
    kind = "positive" if feedback >= 0.7 else "negative" if feedback <= 0.3 else "neutral"
    assert outcome_of(feedback=feedback) == outcome_of("visit", feedback) == (kind, feedback)
    assert type_of(feedback) == kind


@given(st.lists(st.tuples(st.sampled_from([*ACTION_SCORES, "other", None]), st.none() | st.floats(0, 1)), max_size=20))
def test_many_are_the_same_as_one_by_one(given_rows: list) -> None:
    rows = [row for row in given_rows if row != (None, None)]
    types, scores = outcomes_of([row[0] for row in rows], [row[1] for row in rows])
    assert list(zip(types, scores)) == [outcome_of(*row) for row in rows]


@pytest.mark.parametrize("wrong", [-0.01, 1.01, math.nan, math.inf, 10**400])
def test_feedback_out_of_range(wrong: float) -> None:
    with pytest.raises((InputError, OverflowError)) as caught:
        outcome_of(feedback=wrong)
    assert isinstance(caught.value, InputError)


def test_what_is_no_feedback_or_action() -> None:
    for wrong in (True, "0.5", [0.5]):
        with pytest.raises(InputTypeError, match="feedback"):
            outcome_of(feedback=wrong)  # type: ignore[arg-type]
    for wrong in (7, "", "x" * 1_000_000, "\0"):
        with pytest.raises(InputError, match="action"):
            outcome_of(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="needs one of them"):
        outcome_of()
    with pytest.raises(InputError, match="need one of them"):
        outcomes_of()
    with pytest.raises(InputError, match="row 1 has neither"):
        outcomes_of(["visit", None], [np.nan, None])
    with pytest.raises(InputError, match="must agree"):
        outcomes_of(["visit"], [0.1, 0.2])
