"""History features: against a slow per-row oracle, from batch and from state, and never from the future."""

import datetime as dt
import math
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calling_ai.core.errors import InputError
from calling_ai.store.columns import read_columns
from calling_ai.store.decisions import DecisionLog, example_decisions, example_outcomes
from calling_ai.store.history import (
    HistoryState,
    Messages,
    Past,
    counting,
    days,
    history_features,
    messages_select,
    standings,
    to_messages,
    user_history,
)
from calling_ai.store.identity import pseudonym
from calling_ai.store.migrations import upgrade

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


# ------------------------------------------------------------------------------------------------ on the log


def expected(known, at):
    "Return the features of outcomes (dated, score, code) at a moment, by the definition."
    if not known:
        return [math.nan, math.nan, math.nan, 0.0, math.nan, math.nan]
    return oracle(0, at, [(0, dated, dated, score, code) for dated, score, code in known])


def as_known(messages, user, at):
    "Return what counted for a user at a moment, by reading the rule aloud."
    seen = [m for m in messages if m["user"] == user and max(m["received"], m["happened"], m["recorded"]) < at]
    counted = []
    for decision in sorted({m["decision"] for m in seen}):
        own = [m for m in seen if m["decision"] == decision]
        gone = {m["corrects"] for m in own}
        alive = [m for m in own if m["key"] not in gone]
        if alive:
            best = max(alive, key=lambda m: (m["happened"], m["key"]))
            counted.append((min(best["received"], best["happened"]), best["score"], best["code"]))
    return counted


def to_arrays(rows):
    received, happened, recorded = (np.array([m[name] for m in rows], float) for name in BOTH)
    return Messages(
        user=np.array([m["user"] for m in rows], np.int64),
        decision=np.array([m["decision"] for m in rows], np.int64),
        key=[m["key"] for m in rows],
        corrects=[m["corrects"] for m in rows],
        seen=np.maximum(np.maximum(received, happened), recorded),
        happened=happened,
        dated=np.minimum(received, happened),
        score=np.array([m["score"] for m in rows], float),
        code=np.array([m["code"] for m in rows], float),
    )


BOTH = ("received", "happened", "recorded")
quarter = st.integers(0, 60).map(lambda n: 20_000 + n / 4)  # ties between all clocks are common


@st.composite
def message_logs(draw):
    "Return messages about nine decisions of three users: second opinions, corrections, corrections of corrections."
    rows = []
    recorded = [draw(quarter) for _ in range(9)]
    for number in range(draw(st.integers(0, 25))):
        decision = draw(st.integers(0, 8))
        others = [m["key"] for m in rows if m["decision"] == decision]
        rows.append(
            {
                "user": decision % 3,
                "decision": decision,
                "key": f"m{draw(st.integers(0, 9))}-{number}",
                "corrects": draw(st.sampled_from([None, *others])),
                "received": draw(quarter),
                "happened": draw(quarter),
                "recorded": recorded[decision],
                "score": draw(st.floats(0, 1)),
                "code": draw(st.sampled_from((-1, 0, 1))),
            }
        )
    return rows


@settings(max_examples=80, deadline=None)
@given(message_logs(), st.lists(st.tuples(st.integers(0, 3), quarter), min_size=1, max_size=12), st.randoms())
def test_the_past_is_what_was_known_then(rows, questions, random):
    """Corrections, late and early messages, ties: as the rule says, in any order, and the future changes no bit."""
    order = random.sample(range(len(rows)), len(rows))
    messages = to_arrays([rows[i] for i in order])
    user, at = (np.array(part) for part in zip(*questions, strict=True))
    asked = np.where(user < 3, user, -1)
    answer = Past(standings(messages)).features(asked, at.astype(float))
    np.testing.assert_allclose(
        answer, [expected(as_known(rows, u, t), t) for u, t in questions], rtol=0, atol=1e-9, equal_nan=True
    )
    for place, (who, when) in enumerate(questions):
        then = [m for m in rows if max(m[name] for name in BOTH) < when]
        alone = Past(standings(to_arrays([m for m in then if m["user"] == who]))).features(np.array([who % 3]), [when])
        np.testing.assert_array_equal(alone[0] if who < 3 else answer[place], answer[place])


def test_many_corrections_of_one_user_cost_little():
    rows = 2_000
    rng = np.random.default_rng(0)
    when = np.sort(rng.uniform(0, 300, rows))
    decision = np.repeat(np.arange(rows // 2), 2)
    keys = [f"m{i:05d}" for i in range(rows)]
    corrects = [None if i % 2 == 0 else keys[i - 1] for i in range(rows)]
    messages = Messages(
        np.zeros(rows, np.int64), decision, keys, corrects, when, when, when, rng.random(rows), np.ones(rows)
    )
    answer = Past(standings(messages)).features(np.zeros(2, np.int64), np.array([150.0, 400.0]))
    assert answer[1, 2] == pytest.approx(messages.score[1::2].mean()) and answer[0, 3] == 1.0


@pytest.fixture
def filled(database_url):
    "Return a log with corrections, and its decisions."
    log = DecisionLog(database_url, b"a secret of the tests")
    if log.database.dialect.name == "postgresql":
        upgrade(log.database)
    made = example_decisions(rows=600, users=12)
    log.record_frame(made)
    told = example_outcomes(made)
    log.record_outcomes(told)
    fixed = told.sample(frac=0.2, random_state=1)
    log.record_outcomes(
        fixed.assign(
            id="fix-" + fixed["id"],
            corrects=fixed["id"],
            outcome_score=0.5,
            outcome_type="neutral",
            received_at=fixed["received_at"] + pd.Timedelta(days=2),
        )
    )
    return log, made


def test_one_user_and_all_users_agree_in_every_bit(filled):
    log, made = filled
    users = {}
    past = Past(standings(to_messages(counting(read_columns(log.database, messages_select()), 1_200), users)))
    assert len(past.users), "the test needs users with superseded messages"
    for number, moment in enumerate(made["decided_at"].iloc[::40]):
        key = pseudonym(f"person-{number % 12}", log.secret)
        batch = past.features(np.array([users[key]]), days([moment]))[0]
        alone = user_history(log.database, key, moment.to_pydatetime())
        np.testing.assert_array_equal(alone, batch)
        berlin = moment.tz_convert("Europe/Berlin").to_pydatetime()
        np.testing.assert_array_equal(user_history(log.database, key, berlin), batch)


def test_the_microsecond_of_receipt_is_not_yet_after_it(filled):
    log, _ = filled
    first = log.outcomes(user="person-1").sort_values("received_at").iloc[0]
    at = first["received_at"].to_pydatetime()
    key = pseudonym("person-1", log.secret)
    assert user_history(log.database, key, at)[3] == 0.0
    assert user_history(log.database, key, at + dt.timedelta(microseconds=1))[3] == 0.01


def test_scoring_path_imports_nothing_heavy():
    code = (
        "import sys, calling_ai.store.history; print([m for m in ('pandas', 'pyarrow', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
