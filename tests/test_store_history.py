"""History features: against a slow per-row oracle, from batch and from state, and never from the future."""

import math
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calling_ai.core.errors import InputError
from calling_ai.store.history import HistoryState, days, history_features

WORDS = {1: "positive", 0: "neutral", -1: "negative"}


def oracle(user, at, outcomes):
    "Answer one question by reading the definition aloud, one outcome after the other."
    known = [o for o in outcomes if o[0] == user and o[1] < at and o[2] < at]
    if not known:
        return [math.nan, math.nan, math.nan, 0.0, math.nan, math.nan]
    dated = [min(received, happened) for _, received, happened, _, _ in known]
    positive = [day for day, o in zip(dated, known, strict=True) if o[4] == 1]
    c = math.fsum(0.5 ** ((at - day) / 7) for day in dated)
    return [
        len(positive) / len(known),
        sum(o[4] == -1 for o in known) / len(known),
        math.fsum(o[3] for o in known) / len(known),
        min(1.0, len(known) / 100),
        0.5 ** ((at - max(positive)) / 14) if positive else math.nan,
        1 - 0.5 ** (c / 5),
    ]


def ask(questions, outcomes, **options):
    user, received, happened, score, code = zip(*outcomes, strict=True) if outcomes else ([], [], [], [], [])
    who, at = zip(*questions, strict=True)
    return history_features(
        user=np.array(who),
        decided_at=np.array(at, float),
        outcome_user=np.array(user, np.array(who).dtype),
        outcome_received_at=np.array(received, float),
        outcome_happened_at=np.array(happened, float),
        outcome_score=np.array(score, float),
        outcome_type=np.array([WORDS[c] for c in code], object),
        **options,
    )


# Quarter days make ties between asking, happening and being received common; the wide ones reach over centuries.
moment = st.one_of(st.integers(0, 240).map(lambda quarter: 20_000 + quarter / 4), st.floats(-40_000, 80_000))
outcome = st.tuples(st.integers(0, 3), moment, moment, st.floats(0, 1), st.sampled_from((-1, 0, 1)))
question = st.tuples(st.integers(0, 4), moment)


@settings(max_examples=150, deadline=None)
@given(st.lists(question, min_size=1, max_size=20), st.lists(outcome, max_size=40))
def test_batch_equals_oracle(questions, outcomes):
    expected = np.array([oracle(user, at, outcomes) for user, at in questions])
    np.testing.assert_allclose(ask(questions, outcomes), expected, rtol=0, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(question, min_size=1, max_size=10), st.lists(outcome, max_size=30), st.randoms(use_true_random=False))
def test_order_of_rows_and_names_of_users_change_no_bit(questions, outcomes, random):
    before = ask(questions, outcomes)
    shuffled = list(outcomes)
    random.shuffle(shuffled)
    np.testing.assert_array_equal(ask(questions, shuffled), before)
    if outcomes:
        named = [(f"user-{9 - user}", *rest) for user, *rest in shuffled]
        np.testing.assert_array_equal(ask([(f"user-{9 - user}", at) for user, at in questions], named), before)


@settings(max_examples=100, deadline=None)
@given(st.lists(question, min_size=1, max_size=10), st.lists(outcome, max_size=30), st.randoms(use_true_random=False))
def test_future_is_invisible(questions, outcomes, random):
    "Rewriting, adding or deleting what a question cannot see yet, or what others did, changes no bit of its answer."
    for user, at in questions:
        past = [o for o in outcomes if o[0] == user and max(o[1:3]) < at]
        spoilt = [
            o if o in past else (o[0], at + random.random() * 9 if o[0] == user else o[1], o[2], random.random(), 1)
            for o in outcomes
        ]
        answer = ask([(user, at)], outcomes)
        np.testing.assert_array_equal(ask([(user, at)], spoilt), answer)
        np.testing.assert_array_equal(ask([(user, at)], past), answer)
        np.testing.assert_array_equal(
            ask([(user, at)], [*outcomes, (user, at, at - 1, 1.0, 1), (user, at - 1, at, 1.0, 1)]), answer
        )


@settings(max_examples=100, deadline=None)
@given(
    st.lists(question, min_size=1, max_size=25),
    st.lists(outcome, max_size=40),
    st.integers(1, 6),
    st.randoms(use_true_random=False),
)
def test_state_equals_oracle(questions, outcomes, size, random):
    "Questions come in time order in batches; outcomes are announced at any earlier point, in any order."
    questions = sorted(questions, key=lambda pair: pair[1])
    batches = [questions[i : i + size] for i in range(0, len(questions), size)]
    state, answers, told = HistoryState(5), [], set()
    for index, batch in enumerate(batches):
        last = batch[-1][1]
        due = [i for i, o in enumerate(outcomes) if i not in told and (max(o[1:3]) < last or random.random() < 0.3)]
        random.shuffle(due)
        if index == 0 or due:
            told.update(due)
            rows = [outcomes[i] for i in due]
            state.update(
                np.array([o[0] for o in rows], int),
                *(np.array([o[k] for o in rows], float) for k in (1, 2, 3)),
                np.array([o[4] for o in rows], int),
            )
        random.shuffle(batch)
        answers += [
            (pair, row)
            for pair, row in zip(batch, state.features(*map(np.array, zip(*batch, strict=True))), strict=True)
        ]
    for (user, at), row in answers:
        np.testing.assert_allclose(row, oracle(user, at, outcomes), rtol=0, atol=1e-9)


def test_long_log_of_one_user_is_exact():
    rng = np.random.default_rng(0)
    when = np.sort(rng.uniform(0, 3650, 30_000))
    score, code = rng.uniform(0, 1, 30_000), rng.integers(-1, 2, 30_000)
    outcomes = [(0, *row) for row in zip(when + 1, when, score, code, strict=True)]
    questions = [(0, at) for at in (0.5, 1800.3, 3651.0, 7300.0)]
    np.testing.assert_allclose(ask(questions, outcomes), [oracle(*q, outcomes) for q in questions], rtol=0, atol=1e-9)


def test_doubled_outcomes_count_once():
    rows = [(0, 5.0, 4.0, 0.8, 1), (0, 7.0, 4.0, 0.8, 1), (0, 6.0, 5.0, 0.2, -1)]
    once = ask([(0, 5.5), (0, 9.0)], [rows[0], rows[2]])
    np.testing.assert_array_equal(ask([(0, 5.5), (0, 9.0)], rows, outcome_id=np.array(["a", "a", "b"])), once)
    assert not np.array_equal(ask([(0, 9.0)], rows), once[1:])


def test_cost_grows_no_faster_than_n_log_n():
    rng = np.random.default_rng(1)

    def seconds(n):
        user, when = rng.integers(0, max(1, n // 100), n), rng.uniform(0, 365, n)
        best = math.inf
        for _ in range(3):
            start = time.perf_counter()
            history_features(
                user=user,
                decided_at=when,
                outcome_user=user,
                outcome_received_at=when + 1,
                outcome_happened_at=when,
                outcome_score=rng.random(n),
                outcome_type=rng.integers(-1, 2, n),
            )
            best = min(best, time.perf_counter() - start)
        return best

    small, large = seconds(20_000), seconds(200_000)
    assert large < 10 * math.log(200_000) / math.log(20_000) * 3 * small  # three times the slack, for a busy machine


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outcome_score": [0.5, 1.5]}, r"score of outcome 1 is 1.5: it must be in \[0, 1\]"),
        ({"outcome_score": [0.5, math.nan]}, "score of outcome 1 is nan"),
        (
            {"outcome_received_at": [1.0, math.nan]},
            "received_at of outcome 1 is nan: it must be a finite number of days",
        ),
        ({"outcome_happened_at": [math.inf, 1.0]}, "happened_at of outcome 0 is inf"),
        (
            {"outcome_type": ["positive", "splendid"]},
            "outcome_type of outcome 1 is splendid: it must be one of negative, neutral, positive",
        ),
        ({"outcome_type": [1, 2]}, "outcome_type of outcome 1 is 2"),
        ({"outcome_score": [0.5]}, "different lengths"),
        ({"decided_at": [math.nan]}, "decided_at of row 0 is not a finite"),
        ({"user": ["a", "b"]}, "both pairs must agree"),
        ({"outcome_user": ["a", None]}, "user is missing in item 2"),
    ],
)
def test_wrong_input_is_named(change, message):
    good = {
        "user": ["a"],
        "decided_at": [9.0],
        "outcome_user": ["a", "b"],
        "outcome_received_at": [1.0, 2.0],
        "outcome_happened_at": [1.0, 2.0],
        "outcome_score": [0.5, 0.8],
        "outcome_type": ["neutral", "positive"],
    }
    history_features(**good)
    with pytest.raises(InputError, match=message):
        history_features(**{**good, **change})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.features([5], [9.0]), "from 0 to 2"),
        (lambda s: s.features(["a"], [9.0]), "indices must be integers"),
        (lambda s: s.features([0], [1.0]), "it must not lie before 5.0"),
        (lambda s: s.features([0], [math.nan]), "it must not lie before"),
        (lambda s: s.features([0, 1], [9.0]), "they must agree"),
        (lambda s: s.update([0], [4.0], [3.0], [0.5], [0]), "announce outcomes before asking"),
        (lambda s: s.update([0, 1], [9.0], [9.0], [0.5], [0]), "they must agree"),
    ],
)
def test_state_refuses_what_would_change_the_past(call, message):
    state = HistoryState(3)
    state.features([0], [5.0])
    with pytest.raises(InputError, match=message):
        call(state)
    state.update([1], [4.0], [3.0], [0.5], [0])  # nobody asked about user 1 yet
    assert state.features([1], [5.0])[0, 3] == 0.01


def test_empty_and_days():
    assert ask([(0, 3.0)], []).tolist()[0][3] == 0.0
    assert HistoryState(2).features(np.array([], int), np.array([])).shape == (0, 6)
    times = pd.to_datetime(["2026-03-29 00:59:59.999999", "1969-12-31 12:00:00.000000"])
    np.testing.assert_allclose(days(times), [t.timestamp() / 86400 for t in times.tz_localize("UTC")], rtol=1e-15)
    np.testing.assert_allclose(days(times.tz_localize("Europe/Berlin"))[1], -0.5 - 1 / 24, rtol=1e-12)


def test_ties_are_broken_by_content_not_by_order():
    rng = np.random.default_rng(2)
    rows = [(0, 5.0, *row, 0) for row in zip(rng.choice([4.0, 4.5], 60), rng.random(60), strict=True)]
    first = ask([(0, 9.0)], rows)
    for _ in range(20):
        rng.shuffle(rows)
        rows = [tuple(row) for row in rows]
        np.testing.assert_array_equal(ask([(0, 9.0)], rows), first)
