"""The log of decisions: nothing lost, nothing doubled, whole or not at all, and the same on both databases."""

import concurrent.futures
import contextlib
import datetime as dt
import functools
import math
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import threading
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from calling_ai.core.errors import CallingError, InputError, InputTypeError, NotFoundError, SettingsError, StorageError
from calling_ai.store.bulk import Conflict
from calling_ai.store.database import reading, writing
from calling_ai.store.decisions import (
    Decision,
    DecisionLog,
    ErasedRows,
    LogCounts,
    Outcome,
    Written,
    example_decisions,
    example_outcomes,
)
from calling_ai.store.identity import pseudonym, uuid7
from calling_ai.store.schema import DECISION_COLUMNS, OUTCOME_COLUMNS, decisions, outcomes

SECRET = b"the secret of the tests"
NOON = dt.datetime(2025, 3, 3, 12, tzinfo=dt.UTC)
MINUTE, HOUR, DAY = dt.timedelta(minutes=1), dt.timedelta(hours=1), dt.timedelta(days=1)


def decision(**changes: Any) -> dict[str, Any]:
    """Return a decision of one person at noon."""
    row = example_decisions(1, users=1).iloc[0].dropna().to_dict()
    return {**row, "id": str(uuid7()), "decided_at": NOON, "recorded_at": NOON, "seed": 0, **changes}


def outcome(of: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return an outcome of a decision, an hour later."""
    made = {"id": f"key-{uuid7()}", "decision_id": of["id"], "outcome_type": "positive", "outcome_score": 0.8}
    at = of["decided_at"] + HOUR
    return {**made, "action": "visit", "happened_at": at, "received_at": at + MINUTE, **changes}


def content(log: DecisionLog) -> dict[str, list[tuple]]:
    """Return every row of every table."""
    with reading(log.database) as connection:
        names = [name for name in sa.inspect(connection).get_table_names() if name != "alembic_version"]
        return {name: sorted(map(str, connection.execute(sa.text(f"SELECT * FROM {name}")))) for name in names}  # noqa: S608


# ------------------------------------------------------------------------------------------------- there and back


def test_every_column_comes_back_as_it_went_in(log: DecisionLog) -> None:
    frame = example_decisions(
        3_000, users=40, reason="text with 'quotes', \"more\",\ttabs,\nlines, \\N, \\ and ünïcode 🙂"
    )
    frame["trend_emerging"] = np.linspace(-1, 1, len(frame))
    frame["latency_us"] = np.where(np.arange(len(frame)) % 2, np.nan, 1e-300)
    frame["seed"] = np.arange(len(frame)) + 2**62
    frame["arm"] = [None if row % 3 else "NULL" for row in range(len(frame))]
    assert log.record_frame(frame) == Written(3_000, 3_000, 0)
    back = log.decisions()
    assert list(back.columns) == list(DECISION_COLUMNS)
    frame["user_key"] = [pseudonym(user, SECRET) for user in frame["user_id"]]
    frame = frame.sort_values(["decided_at", "id"], ignore_index=True)
    for name in DECISION_COLUMNS:
        if name not in frame:
            assert back[name].isna().all() or not back[name].any(), name
        elif DECISION_COLUMNS[name].kind == "number":
            np.testing.assert_array_equal(back[name].to_numpy(), frame[name].to_numpy())
        else:
            there = [None if value is None or value != value else value for value in back[name]]
            given = [None if value is None or value != value else value for value in frame[name]]
            assert there == given, name
    assert (
        log.decisions(columns=["id", "called"], until=frame["decided_at"][100])["id"].tolist()
        == frame["id"].tolist()[:100]
    )


def test_outcomes_come_back_as_they_went_in(log: DecisionLog) -> None:
    frame = example_decisions(500)
    messages = example_outcomes(frame)
    log.record_frame(frame)
    assert log.record_outcomes(messages) == Written(len(messages), len(messages), 0)
    assert log.record_outcomes(messages.sample(frac=1, random_state=1)) == Written(len(messages), 0, len(messages))
    back = log.outcomes().drop(columns="corrects")
    expected = messages.sort_values(["received_at", "id"], ignore_index=True)
    pd.testing.assert_frame_equal(back, expected[back.columns], check_dtype=False)


@pytest.mark.parametrize("form", ["frame", "records", "dictionaries", "columns", "rows", "polars-like"])
def test_every_form_of_the_same_rows_is_the_same(form: str, log: DecisionLog) -> None:
    frame = example_decisions(20)
    log.record_frame(frame)
    rows = [{k: v for k, v in row.items() if v == v} for row in frame.to_dict("records")]
    keyed = [{**row, "user_key": pseudonym(row["user_id"], SECRET), "user_id": None} for row in rows]
    defaults = {"refused": False, "explored": False, "seed": 0}
    given: Any = {
        "frame": frame,
        "records": [Decision(**row) for row in rows],
        "dictionaries": rows,
        "columns": {name: frame[name].tolist() for name in frame},
        "rows": [tuple({**defaults, **row}.get(name) for name in DECISION_COLUMNS) for row in keyed],
        "polars-like": __import__("pyarrow").Table.from_pandas(frame),
    }[form]
    written = log.write_rows("decision", given) if form == "rows" else log.record_frame(given)
    assert written == Written(20, 0, 20)


def test_nothing_is_fine(log: DecisionLog) -> None:
    assert log.record_frame([]) == Written(0, 0, 0) == log.write_rows("outcome", [])
    assert log.record_outcomes(example_outcomes(example_decisions(5)).iloc[:0]) == Written(0, 0, 0)
    assert log.decisions().empty and log.joined().empty and log.counts() == LogCounts(0, 0, 0, 0, 0, 0)
    with pytest.raises(NotFoundError, match="is not in the log"):
        log.decision(str(uuid7()))


def test_one_person_by_raw_id_or_pseudonym(log: DecisionLog) -> None:
    frame = example_decisions(100, users=5)
    log.record_frame(frame)
    log.record_outcomes(example_outcomes(frame))
    theirs = frame.loc[frame["user_id"] == "person-2", "id"].tolist()
    assert log.decisions(user="person-2")["id"].tolist() == theirs
    assert log.joined(user_key=pseudonym("person-2", SECRET))["id"].tolist() == theirs
    assert set(log.outcomes(user="person-2")["decision_id"]) <= set(theirs)
    with pytest.raises(InputError, match="give one of them"):
        log.decisions(user="a", user_key="b")
    with pytest.raises(InputError, match="no such column"):
        log.decisions(columns=["mood"])


# --------------------------------------------------------------------------------------------- the same key again


def test_other_content_under_the_same_key_is_refused_and_both_are_shown(log: DecisionLog) -> None:
    first = decision()
    kept = outcome(first)
    log.record(first)
    log.record_outcome(kept)
    before = content(log)
    later = NOON + HOUR + 10 * MINUTE
    for change in ({"outcome_score": 0.2}, {"action": None}, {"happened_at": later}, {"corrects": "another"}):
        with pytest.raises(Conflict, match="with other content") as caught:
            log.record_outcomes([outcome(first), kept | change, outcome(first)])
        [(name, value)] = change.items()
        assert (caught.value.row, caught.value.given[name], caught.value.kept[name]) == (1, value, kept.get(name))
        assert name in str(caught.value) and "row 1" in str(caught.value)
        assert pickle.loads(pickle.dumps(caught.value)).kept == caught.value.kept  # noqa: S301 - our own
    with pytest.raises(Conflict, match="calling_score is .* there and 0.125 here"):
        log.record(first | {"calling_score": 0.125})
    assert content(log) == before


def test_when_it_arrived_is_not_content(log: DecisionLog) -> None:
    first = decision()
    log.record(first)
    assert log.record(first | {"recorded_at": NOON + DAY}).repeated == 1
    assert log.decision(first["id"]).recorded_at == NOON
    late, early = outcome(first), outcome(first)
    twice = [late | {"received_at": NOON + 3 * HOUR}, early, late]
    assert log.record_outcomes(twice) == Written(3, 2, 1)
    kept = log.outcomes().set_index("id")["received_at"]
    assert kept[late["id"]] == late["received_at"], "of two arrivals in a frame the first counts"


def test_a_conflict_within_a_frame_is_found(log: DecisionLog) -> None:
    first = outcome(decision())
    with pytest.raises(Conflict, match="row 1"):
        log.record_outcomes([first, first | {"outcome_score": 0.1}])
    assert log.counts().outcomes == 0


def test_a_large_repeat_with_one_difference_is_found(log: DecisionLog) -> None:
    frame = example_decisions(2_000)
    log.record_frame(frame)
    more = pd.concat([example_decisions(100, seed=1), frame], ignore_index=True)
    assert log.record_frame(more) == Written(2_100, 100, 2_000)
    more.loc[1_234, "hybrid_score"] = np.nextafter(more.loc[1_234, "hybrid_score"], 1)
    with pytest.raises(Conflict) as caught:
        log.record_frame(pd.concat([example_decisions(100, seed=2), more], ignore_index=True))
    assert caught.value.row == 1_334
    assert log.counts().decisions == 2_100


def test_exposures(log: DecisionLog) -> None:
    row = {
        "experiment": "weight",
        "stage": "10",
        "user_id": "ada",
        "arm": "treatment",
        "exposed_at": NOON,
        "share": 0.1,
    }
    assert log.expose([row, row | {"user_id": "ben"}]) == Written(2, 2, 0)
    assert log.expose([row | {"exposed_at": NOON + DAY, "share": 0.2}]) == Written(1, 0, 1)
    assert log.expose([row | {"stage": "50"}]).written == 1
    with pytest.raises(Conflict, match="arm is 'treatment' there and 'control' here"):
        log.expose([row | {"user_id": "eva"}, row | {"arm": "control"}])
    assert log.exposed("weight", "10")["exposed_at"].tolist() == [NOON, NOON]
    assert len(log.exposed("weight")) == 3


# ------------------------------------------------------------------------------------------------------ bad input

BAD_TEXT = [
    ("x" * 1_000_000, "1,000,000 characters"),
    ("x\0y", "NUL"),
    ("\ud800", "half a character"),
    ("", "empty"),
    (b"bytes", "bytes"),
    (7, "int"),
    (True, "bool"),
    (["a"], "list"),
]
BAD_SCORE = [
    (1.5, "outside"),
    (-0.1, "outside"),
    (math.inf, "not finite"),
    (True, "not a number"),
    ("0.5", "not a number"),
]
BAD_SCORE += [(10**400, "not finite"), (None, "nothing is given"), (math.nan, "nothing is given"), (1j, "not a number")]
BAD_TIME = [
    (dt.datetime(2125, 1, 1, tzinfo=dt.UTC), "cannot come from the future"),
    (dt.datetime(2025, 3, 3), "no time zone"),
    (dt.datetime(1960, 1, 1, tzinfo=dt.UTC), "before 1970"),
    (1_700_000_000, "not a time"),
    ("yesterday", "not a time"),
    (None, "nothing is given"),
    (pd.NaT, "nothing is given"),
    (True, "not a time"),
]
BAD_ID = [
    ("x", "UUID"),
    ("é" * 36, "UUID"),
    ("x" * 1_000_000, "UUID"),
    (7, "UUID"),
    (None, "nothing"),
    ("\0" * 36, "UUID"),
]
BAD = [
    *(("outcome", "id", value, words) for value, words in BAD_TEXT),
    *(("outcome", "action", value, words) for value, words in BAD_TEXT),
    *(("outcome", "outcome_score", value, words) for value, words in BAD_SCORE),
    *(("outcome", "happened_at", value, words) for value, words in BAD_TIME),
    *(("outcome", "decision_id", value, words) for value, words in BAD_ID),
    ("outcome", "outcome_type", "great", "is none of"),
    ("outcome", "outcome_type", None, "nothing is given"),
    ("outcome", "received_at", dt.datetime(2125, 1, 1, tzinfo=dt.UTC), "lies in the future"),
    ("outcome", "mood", "good", "unknown column 'mood'"),
    *(("decision", "opportunity_id", value, words) for value, words in BAD_TEXT),
    *(("decision", "propensity", value, words) for value, words in BAD_SCORE),
    *(("decision", "user_overall_energy", value, words) for value, words in BAD_SCORE if "nothing" not in words),
    *(("decision", "decided_at", value, words) for value, words in BAD_TIME),
    *(("decision", "id", value, words) for value, words in BAD_ID),
    ("decision", "weight", 0.6, "outside [0, 0.5]"),
    ("decision", "trend_cultural", -1.1, "outside [-1, 1]"),
    ("decision", "called", 1, "not true or false"),
    ("decision", "called", None, "nothing is given"),
    ("decision", "seed", 2**63, "64 bits"),
    ("decision", "seed", 10**400, "64 bits"),
    ("decision", "seed", 1.0, "not a whole number"),
    ("decision", "user_id", True, "bool"),
    ("decision", "user_id", None, "nothing is given"),
    ("decision", "user_id", 1.5, "float"),
    ("decision", "user_id", 10**300, "digits"),
    ("decision", "user_id", "x" * 1_000_000, "1,000,000 characters"),
    ("decision", "user_id", "x\0", "NUL"),
    ("decision", "user_id", "\udfff", "half a character"),
    ("decision", "user_id", [1], "list"),
]


def short(value: Any) -> str:
    """Return a value as the name of a test."""
    return ascii(value)[:20]


@pytest.mark.parametrize("kind", ["sqlite"])
def test_bad_input_names_row_and_field_and_changes_nothing(kind: str, _migrated: Any, tmp_path: Any) -> None:
    import shutil

    shutil.copy(_migrated, tmp_path / "log.db")
    log = DecisionLog(f"sqlite:///{tmp_path / 'log.db'}", SECRET)
    known = decision()
    log.record(known)
    before = content(log)
    for what, name, value, words in BAD:
        good = [decision(), decision()] if what == "decision" else [outcome(known), outcome(known)]
        write = log.record_frame if what == "decision" else log.record_outcomes
        rows = [good[0], good[1] | {name: value}]
        try:
            write(rows)
        except InputError as error:
            caught = error
        else:
            pytest.fail(f"{what} {name} {short(value)} was taken")
        shown = (what, name, short(value), str(caught)[:300])
        assert words in str(caught) and name in str(caught), shown
        assert caught.column == name, shown
        assert (caught.row == 1 and "row 1" in str(caught)) or name == "mood", shown
        assert len(str(caught)) < 400 and "\0" not in str(caught), shown
        if isinstance(value, bool | str | bytes | complex) and "not a" in words and what == "outcome":
            assert isinstance(caught, InputTypeError) or name == "happened_at", shown
    assert content(log) == before


def test_no_error_shows_a_raw_user_id(log: DecisionLog) -> None:
    canary = "ada.lovelace@example.com"
    for user in (canary + "\0", canary + "\ud800", canary * 1_000):
        with pytest.raises(InputError) as caught:
            log.record(decision(user_id=user))
        assert "lovelace" not in str(caught.value)
    first = decision(user_id=canary)
    log.record(first)
    with pytest.raises(Conflict) as conflict:
        log.record(first | {"calling_score": 0.001})
    told = "".join(traceback.format_exception(conflict.value)) + repr(conflict.value.given)
    assert canary not in told and canary not in str(content(log))


def test_whole_frames_are_refused(log: DecisionLog) -> None:
    frame = example_decisions(1_000)
    frame.loc[777, "propensity"] = 1.25
    with pytest.raises(InputError, match="row 777, column propensity: 1.25 is outside"):
        log.record_frame(frame)
    frame.loc[777, "propensity"] = 0.5
    messages = example_outcomes(frame, share=1.0)
    messages.loc[500, "happened_at"] = messages["happened_at"][500] - pd.Timedelta(days=60)
    log.record_frame(frame)
    with pytest.raises(InputError, match="row 500, column happened_at: the outcome happened .* before its decision"):
        log.record_outcomes(messages)
    assert log.counts() == LogCounts(1_000, 0, 0, 0, 0, 0)


def test_tables_without_what_must_be_there() -> None:
    log = DecisionLog("sqlite:///nowhere/at/all.db", SECRET)
    row = decision()
    for name in ("id", "decided_at", "opportunity_id", "called", "formula_score"):
        with pytest.raises(InputError, match=f"column {name} is not given"):
            log.record({key: value for key, value in row.items() if key != name})
    with pytest.raises(InputError, match="columns user_id and user_key are both given"):
        log.record(row | {"user_key": pseudonym("ada", SECRET)})
    with pytest.raises(InputError, match="not a pseudonym"):
        log.record({key: value for key, value in row.items() if key != "user_id"} | {"user_key": "ada"})
    with pytest.raises(InputTypeError, match="data is a int"):
        log.record_frame(7)
    with pytest.raises(InputError, match="has 1 values: a outcome has 8"):
        log.write_rows("outcome", [("x",)])
    with pytest.raises(InputError, match="kind is 'row'"):
        log.write_rows("row", [])


# -------------------------------------------------------------------------------------------------- wrong orders


def test_an_outcome_may_come_before_its_decision(log: DecisionLog) -> None:
    first = decision()
    early = outcome(first)
    assert log.record_outcome(early).written == 1
    assert log.counts().waiting == 1 and log.current_outcomes().empty
    log.record(first)
    assert log.counts().waiting == 0
    assert log.current_outcomes()["id"].tolist() == [early["id"]]
    with pytest.raises(InputError, match="row 0, column decision_id: .* is a decision that the log does not know"):
        log.record_outcome(outcome(decision()), strict=True)
    assert log.record_outcome(early, strict=True).repeated == 1


def test_an_outcome_that_happened_before_its_decision(log: DecisionLog) -> None:
    first = decision()
    log.record(first)
    fine = outcome(first, happened_at=NOON - 20 * MINUTE)
    wrong = outcome(first, happened_at=NOON - 20 * MINUTE - dt.timedelta(microseconds=1))
    assert log.record_outcome(fine).written == 1
    with pytest.raises(InputError, match="1,200 seconds before its decision; two clocks may differ by 1200 seconds"):
        log.record_outcomes([outcome(first), wrong])
    assert log.counts().outcomes == 1
    second = decision()
    wrong = outcome(second, happened_at=NOON - HOUR)
    log.record_outcome(wrong)  # nobody can know yet
    assert log.record(second).written == 1, "a decision is never lost because an outcome is wrong"
    assert log.counts().impossible == 1
    assert log.joined()["outcome_score"].notna().tolist() == [True, False]


def test_late_messages_do_not_change_what_is_settled(new_database: Callable[..., str]) -> None:
    log = DecisionLog(new_database(), SECRET, attribution_days=7)
    first = decision()
    log.record(first)
    last = NOON + 7 * DAY - dt.timedelta(microseconds=1)
    log.record_outcome(
        outcome(first, happened_at=NOON + DAY, received_at=last, outcome_score=0.4, outcome_type="neutral")
    )
    log.record_outcome(outcome(first, happened_at=NOON + 2 * DAY, received_at=NOON + 7 * DAY, outcome_score=1.0))
    log.record_outcome(outcome(first, happened_at=NOON + 3 * DAY, received_at=NOON + 30 * DAY, outcome_score=0.9))
    [row] = log.joined().to_dict("records")
    assert (row["outcome_score"], row["settled"], row["delay_seconds"]) == (0.4, True, 86_400.0)
    open_still = log.joined(as_of=NOON + 7 * DAY - dt.timedelta(microseconds=1))
    assert not open_still["settled"].any() and open_still["outcome_score"].isna().all()
    assert log.joined(as_of=NOON + 7 * DAY)["settled"].all()


def test_corrections(log: DecisionLog) -> None:
    first, second = decision(), decision()
    log.record_frame([first, second])
    one = outcome(first)
    two = outcome(first, corrects=one["id"], outcome_score=0.1, outcome_type="negative")
    three = outcome(first, corrects=two["id"], outcome_score=0.6, outcome_type="neutral")
    for message, score in ((one, 0.8), (three, 0.6), (two, 0.6)):  # the correction of a correction overtakes
        log.record_outcome(message)
        assert log.current_outcomes().query("decision_id == @first['id']")["outcome_score"].max() >= score
    assert log.current_outcomes()["id"].tolist() == [three["id"]]
    with reading(log.database) as connection:
        view = connection.execute(sa.text("SELECT id FROM current_outcomes")).scalars().all()
    assert view == [three["id"]]
    for wrong, words in (
        (outcome(second, corrects=one["id"]), "is an outcome of another decision"),
        (one | {"id": "self", "corrects": "self"}, "would correct itself"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            log.record_outcomes([outcome(second), wrong])
        assert (caught.value.row, caught.value.column) == (1, "corrects")
    ring = [outcome(second, id=f"ring-{n}", corrects=f"ring-{(n + 1) % 3}") for n in range(3)]
    log.record_outcomes(ring[:2])
    with pytest.raises(InputError, match="'ring-2' would correct itself by way of 'ring-0'"):
        log.record_outcome(ring[2])
    with pytest.raises(InputError, match="would correct itself"):
        log.record_outcomes([outcome(second, id=f"loop-{n}", corrects=f"loop-{(n + 1) % 4}") for n in range(4)])


@dataclass
class Model:
    """The log as a few dictionaries, as simple as can be."""

    decisions: dict[str, dict] = field(default_factory=dict)
    outcomes: dict[str, dict] = field(default_factory=dict)

    def write(self, table: str, row: dict, own: tuple[str, ...]) -> str:
        """Write a row and say what became of it: written, repeated, conflict or wrong."""
        kept = getattr(self, table).get(row["id"])
        if kept is not None:
            return "repeated" if all(kept[name] == row[name] for name in row if name not in own) else "conflict"
        if table == "outcomes":
            of, target = self.decisions.get(row["decision_id"]), self.outcomes.get(row["corrects"])
            if of is not None and row["happened_at"] < of["decided_at"] - 20 * MINUTE:
                return "wrong"
            if row["corrects"] == row["id"] or (target is not None and target["decision_id"] != row["decision_id"]):
                return "wrong"
            step, steps = row["corrects"], 0
            while step in self.outcomes and steps < 100:
                step, steps = self.outcomes[step]["corrects"], steps + 1
                if step == row["id"]:
                    return "wrong"
        getattr(self, table)[row["id"]] = row
        return "written"

    def current(self, as_of: dt.datetime) -> dict[str, str]:
        """Return the key of the outcome that counts, by decision."""
        found = {}
        for name, of in self.decisions.items():
            limit = min(as_of, of["decided_at"] + 14 * DAY)
            counting = [
                row for row in self.outcomes.values() if row["decision_id"] == name and row["received_at"] < limit
            ]
            counting = [row for row in counting if row["happened_at"] >= of["decided_at"] - 20 * MINUTE]
            corrected = {row["corrects"] for row in counting}
            left = [row for row in counting if row["id"] not in corrected]
            if left:
                found[name] = max(left, key=lambda row: (row["happened_at"], row["id"]))["id"]
        return found


steps = st.lists(
    st.tuples(
        st.sampled_from(["decision", "outcome", "outcome", "outcome"]),
        st.integers(0, 2),  # which decision
        st.integers(0, 5),  # which key
        st.sampled_from([-HOUR, -10 * MINUTE, MINUTE, HOUR, HOUR, 13 * DAY, 20 * DAY]),  # when it happened
        st.sampled_from([-5 * MINUTE, MINUTE, HOUR, 14 * DAY]),  # when it came
        st.sampled_from([0.2, 0.8]),
        st.sampled_from([None, None, 0, 1, 2, 3, 4, 5]),  # what it corrects
    ),
    max_size=14,
)


def test_any_order_gives_what_a_simple_model_gives(log: DecisionLog) -> None:
    @settings(max_examples=25)
    @given(steps=steps, size=st.integers(1, 3))
    def run(steps: list[tuple], size: int) -> None:
        mark = str(uuid.uuid4())
        names = [str(uuid.uuid4()) for _ in range(3)]
        model = Model()
        base = decision(user_id=mark)
        for kind, which, key, happened, came, score, corrects in steps:
            at = NOON + which * DAY
            if kind == "decision":
                row = base | {"id": names[which], "decided_at": at, "recorded_at": at + MINUTE, "calling_score": 0.5}
                expected = model.write("decisions", row, ("recorded_at",))
            else:
                row = outcome({"id": names[which], "decided_at": at}, id=f"{mark}-{key}", outcome_score=score)
                row |= {"happened_at": at + happened, "received_at": at + happened + came}
                row |= {"corrects": None if corrects is None else f"{mark}-{corrects}"}
                expected = model.write("outcomes", row, ("received_at",))
            rows = [row] * size  # a repeat within the frame is a repeat
            write = log.record_frame if kind == "decision" else log.record_outcomes
            if expected == "conflict":
                with pytest.raises(Conflict):
                    write(rows)
            elif expected == "wrong":
                with pytest.raises(InputError):
                    write(rows)
            else:
                written = int(expected == "written")
                assert write(rows) == Written(size, written, size - written)
        for as_of in (NOON + 2 * HOUR, NOON + 15 * DAY, NOON + 400 * DAY):
            found = log.joined(as_of=as_of, user=mark)
            expected_now = model.current(as_of)
            assert dict(zip(found["id"], found["outcome_id"])) == {
                name: expected_now.get(name) for name in model.decisions
            }
            assert found["settled"].tolist() == [t + 14 * DAY <= as_of for t in found["decided_at"]]
        with reading(log.database) as connection:
            kept = connection.scalars(sa.select(outcomes.c.id).where(outcomes.c.decision_id.in_(names))).all()
        assert set(kept) == set(model.outcomes)

    run()


# ----------------------------------------------------------------------------------------------- B14: permutations


@pytest.mark.slow
def test_metrics_are_bit_identical_after_the_window_however_outcomes_arrived(log: DecisionLog) -> None:
    """1,000 permutations of late, doubled, shuffled messages: each has people of its own, all are written together."""
    permutations, generator = 1_000, random.Random(3)
    plain = example_decisions(12, users=3, days=5)
    messages = example_outcomes(plain, share=0.9).drop(columns="received_at").to_dict("records")
    messages += [m | {"id": m["id"] + "-again", "corrects": m["id"], "outcome_score": 0.25} for m in messages[::3]]
    pieces: list[list[dict]] = [[] for _ in range(5)]
    frames = []
    for number in range(permutations):
        tag = f"{number:08x}"
        frames.append(plain.assign(id=[tag + item[8:] for item in plain["id"]], user_id=f"permutation-{number}"))
        own = [{**m, "id": f"{tag}-{m['id']}", "decision_id": tag + m["decision_id"][8:]} for m in messages]
        own = [m | ({"corrects": f"{tag}-{m['corrects']}"} if m.get("corrects") else {"corrects": None}) for m in own]
        sent = own + generator.sample(own, 5)  # some come twice
        generator.shuffle(sent)
        arrival = sorted(generator.uniform(0, 3) for _ in sent)
        for place, (message, day) in enumerate(zip(sent, arrival)):
            at = max(message["happened_at"], pd.Timestamp("2025-01-11", tz="UTC")) + dt.timedelta(days=day)
            pieces[place * 5 // len(sent)].append(message | {"received_at": at})
    log.record_outcomes(pieces[0])
    log.record_frame(pd.concat(frames))  # a fifth of the messages was here before the decisions
    for piece in pieces[1:]:
        log.record_outcomes(piece)

    def metrics(as_of: dt.datetime) -> pd.DataFrame:
        found = log.joined(as_of=as_of, columns=["user_key", "decided_at", "calling_score"])
        found["order"] = found.groupby("user_key").cumcount()
        found["error"] = (found["calling_score"] - found["outcome_score"]).abs()
        return found.groupby("user_key", sort=False).agg(
            mean=("outcome_score", "mean"),
            error=("error", "mean"),
            positive=("outcome_type", lambda kinds: (kinds == "positive").sum()),
            known=("outcome_score", "count"),
            outstanding=("settled", lambda settled: (~settled).sum()),
        )

    after = metrics(dt.datetime(2025, 3, 1, tzinfo=dt.UTC))
    assert len(after) == permutations and len(after.drop_duplicates()) == 1, "one permutation gave other bits"
    assert after["outstanding"].max() == 0 and (after["known"] >= 1).all()
    during = metrics(dt.datetime(2025, 1, 12, tzinfo=dt.UTC))
    assert len(during.drop_duplicates()) > 10 and (during["outstanding"] == 12).all(), "provisional, and says so"


# ------------------------------------------------------------------------------------------------------ B15: clocks


def test_clocks_that_are_wrong_by_ten_minutes_and_jump(log: DecisionLog) -> None:
    """Both clients are off by up to ten minutes and jump: nothing is refused, nothing takes less than no time."""
    generator, rows, messages = random.Random(1), [], []
    for number in range(200):
        true = NOON + number * MINUTE
        row = decision(decided_at=true + generator.uniform(-10, 10) * MINUTE, recorded_at=true)
        seen = true + generator.uniform(0, 3) * MINUTE
        rows.append(row)
        messages.append(outcome(row, happened_at=seen + generator.uniform(-10, 10) * MINUTE, received_at=seen))
    assert log.record_frame(rows).written == log.record_outcomes(messages).written == 200
    found = log.joined()
    assert (
        found["outcome_score"].notna().all()
        and (found["delay_seconds"] >= 0).all()
        and (found["delay_seconds"] == 0).any()
    )


def test_summer_time_ends_and_an_hour_happens_twice(log: DecisionLog) -> None:
    from zoneinfo import ZoneInfo

    berlin = ZoneInfo("Europe/Berlin")
    first = dt.datetime(2024, 10, 27, 2, 30, tzinfo=berlin)
    second = first.replace(fold=1)  # the same hands of the clock, an hour later
    row = decision(decided_at=first, recorded_at=second)
    log.record(row)
    log.record_outcome(outcome(row, happened_at=second, received_at=second.astimezone(dt.UTC) + MINUTE))
    frame = log.joined()
    assert frame["delay_seconds"].tolist() == [3_600.0]
    assert log.decision(row["id"]).decided_at == dt.datetime(2024, 10, 27, 0, 30, tzinfo=dt.UTC)


def test_our_clock_is_filled_in_and_its_own(log: DecisionLog) -> None:
    before = dt.datetime.now(dt.UTC) - MINUTE
    row = {name: value for name, value in decision().items() if name != "recorded_at"}
    log.record(row | {"decided_at": dt.datetime.now(dt.UTC) + 10 * MINUTE})  # a clock that is ahead
    message = outcome(row, happened_at=dt.datetime.now(dt.UTC) + 5 * MINUTE)
    log.record_outcome({name: value for name, value in message.items() if name != "received_at"})
    [kept] = log.joined().to_dict("records")
    assert before < kept["recorded_at"] <= kept["received_at"] < dt.datetime.now(dt.UTC) + MINUTE
    assert kept["delay_seconds"] == 0 and not kept["settled"]


# ---------------------------------------------------------------------------------------------- B8: many at once


def in_processes(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run `work(number, *arguments)` in forked processes at once and return what each said."""
    context = multiprocessing.get_context("fork")
    queue, start = context.Queue(), context.Event()

    def run(number: int) -> None:
        start.wait()
        try:
            queue.put((number, work(number, *arguments)))
        except BaseException as error:
            queue.put((number, f"{type(error).__name__}: {error}"))

    made = [context.Process(target=run, args=(number,)) for number in range(count)]
    for process in made:
        process.start()
    start.set()
    said = dict(queue.get(timeout=300) for _ in made)
    for process in made:
        process.join()
    return [said[number] for number in range(count)]


def send(number: int, log: DecisionLog, messages: list[dict]) -> tuple[int, int]:
    """Send the thousand messages of a pair of processes, in an order of one's own, some alone and most in frames."""
    own = messages[number // 2 * 1_000 : (number // 2 + 1) * 1_000]
    random.Random(number).shuffle(own)
    written = [log.record_outcome(message) for message in own[:10]]
    written += [log.record_outcomes(own[start : start + 90]) for start in range(10, 1_000, 90)]
    return sum(item.written for item in written), sum(item.repeated for item in written)


@pytest.mark.slow
def test_eight_processes_send_each_key_twice(log: DecisionLog) -> None:
    frame = example_decisions(400)
    log.record_frame(frame)
    rows = frame[["id", "decided_at"]].to_dict("records")
    messages = [outcome(rows[number % 400], id=f"key-{number}") for number in range(4_000)]
    said = in_processes(8, send, log, messages)
    assert all(isinstance(item, tuple) for item in said), said
    assert (sum(item[0] for item in said), sum(item[1] for item in said)) == (4_000, 4_000)
    assert log.counts().outcomes == 4_000
    with pytest.raises(Conflict):
        log.record_outcome(messages[7] | {"outcome_score": 0.3, "outcome_type": "negative"})
    print(f"8 processes x 1,000 outcomes, each key twice: 4,000 rows, 0 errors in 8,000 (95 % below {3 / 8_000:.2%})")


def test_a_deadlock_is_resolved_and_not_shown(log: DecisionLog) -> None:
    """Two transactions that take two rows crosswise: PostgreSQL ends one of them, and the log does it again."""
    if log.database.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time: there is no deadlock")
    log.counts()
    both_hold, attempts = threading.Barrier(2), [0, 0]

    def cross(me: int, connection: sa.engine.Connection) -> str:
        attempts[me] += 1
        for step, name in enumerate(("left", "right") if me == 0 else ("right", "left")):
            connection.execute(sa.text(f"INSERT INTO facts VALUES ('{name}', 'x') ON CONFLICT (name) DO NOTHING"))
            if step == 0 and attempts[me] == 1:
                both_hold.wait(60)
        return "done"

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda me: log._write(functools.partial(cross, me)), (0, 1)))
    assert said == ["done", "done"] and sorted(attempts) == [1, 2]


def disagree(number: int, log: DecisionLog, rows: list[dict]) -> str:
    """Send one key with a content of one's own."""
    try:
        log.record_outcome(outcome(rows[0], id="contested", outcome_score=0.01 * number))
        return "written"
    except Conflict:
        return "conflict"


def test_one_of_those_who_disagree_wins_and_the_others_are_told(log: DecisionLog) -> None:
    row = decision()
    log.record(row)
    said = in_processes(6, disagree, log, [row])
    assert sorted(said) == ["conflict"] * 5 + ["written"]
    assert log.counts().outcomes == 1


def cross(number: int, log: DecisionLog, frames: list[pd.DataFrame]) -> int:
    """Send the same decisions as the others, in an order of one's own."""
    return sum(log.record_frame(frame.sample(frac=1, random_state=number)).written for frame in frames)


def test_frames_that_cross_do_not_fail(log: DecisionLog) -> None:
    frames = [example_decisions(60, seed=seed) for seed in range(4)]
    said = in_processes(4, cross, log, frames)
    assert sum(said) == log.counts().decisions == 240, said


def test_a_writer_waits_for_a_reader_and_a_reader_for_a_writer(log: DecisionLog) -> None:
    log.record_frame(example_decisions(50))
    with reading(log.database) as connection:
        connection.execute(sa.select(decisions)).first()
        command = (
            "import sys; from calling_ai.store.decisions import DecisionLog, example_decisions as made; "
            "print(DecisionLog(sys.argv[1], bytes.fromhex(sys.argv[2])).record_frame(made(50, seed=1)).written)"
        )
        url = log.database.url.render_as_string(hide_password=False)
        child = subprocess.Popen([sys.executable, "-c", command, url, log.secret.hex()], stdout=subprocess.PIPE)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(5.0)  # SQLite makes it wait for the reader, PostgreSQL does not
    assert child.communicate(timeout=60)[0] == b"50\n" and log.counts().decisions == 100


def test_a_forked_child_has_connections_of_its_own(log: DecisionLog) -> None:
    log.record_frame(example_decisions(10))
    child = os.fork()
    if child == 0:
        try:
            good = log.record_frame(example_decisions(10, seed=1)).written == 10 and log.counts().decisions == 20
        except BaseException:
            good = False
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert log.counts().decisions == 20


# ------------------------------------------------------------------------------------------ only added, forgotten


def test_the_database_refuses_to_change_or_delete(log: DecisionLog) -> None:
    frame = example_decisions(5)
    log.record_frame(frame)
    log.record_outcomes(example_outcomes(frame, share=1.0))
    log.expose([{"experiment": "e", "stage": "s", "user_id": "person-0", "arm": "a", "exposed_at": NOON}])
    log.erase(user="nobody")
    before = content(log)
    for table, column in (
        ("decisions", "path"),
        ("outcomes", "action"),
        ("exposures", "arm"),
        ("forgotten", "user_key"),
    ):
        changes = [f"UPDATE {table} SET {column} = 'x'", f"DELETE FROM {table}"]
        if log.database.dialect.name == "postgresql":
            changes.append(f"TRUNCATE {table}")
        for change in changes:
            with pytest.raises(sa.exc.DBAPIError, match="only ever added"), writing(log.database) as connection:
                connection.execute(sa.text(change))
    assert content(log) == before


def test_a_forgotten_person_is_gone_and_stays_gone(log: DecisionLog) -> None:
    frame = example_decisions(300, users=10)
    messages = example_outcomes(frame, share=1.0)
    log.record_frame(frame)
    log.record_outcomes(messages)
    shown = {"experiment": "e", "stage": "s", "arm": "a", "exposed_at": NOON}
    log.expose([shown | {"user_id": f"person-{number}"} for number in range(10)])
    theirs = frame["user_id"] == "person-4"
    key = pseudonym("person-4", SECRET)
    erased = log.erase(user="person-4")
    assert erased == ErasedRows(theirs.sum(), theirs.sum(), 1, erased.decision_ids)
    assert set(erased.decision_ids) == set(frame.loc[theirs, "id"])
    everything = content(log)
    assert key not in str(everything)
    assert {name for name, rows in everything.items() if any(erased.decision_ids[0] in row for row in rows)} == {
        "forgotten_decisions"
    }
    if log.database.dialect.name == "sqlite":
        with open(str(log.database.url.database), "rb") as stream:  # noqa: PTH123
            assert key.encode() not in stream.read()
    assert log.record_frame(frame) == Written(300, 0, 300 - theirs.sum(), theirs.sum())
    assert log.record_outcomes(messages) == Written(300, 0, 300 - theirs.sum(), theirs.sum())
    assert log.expose([shown | {"user_id": "person-4"}]) == Written(1, 0, 0, 1)
    assert log.erase(user="person-4") == ErasedRows(0, 0, 0, ())
    counts = log.counts()
    assert (counts.decisions, counts.outcomes, counts.exposures, counts.forgotten) == (
        300 - theirs.sum(),
        300 - theirs.sum(),
        9,
        1,
    )


def test_a_late_decision_of_a_forgotten_person_takes_its_waiting_outcomes_along(log: DecisionLog) -> None:
    row = decision(user_id="ada")
    log.erase(user="ada")
    log.record_outcome(outcome(row))
    other = decision(user_id="ben")
    assert log.record_frame([row, other]) == Written(2, 1, 0, 1)
    assert log.counts() == LogCounts(1, 0, 0, 0, 0, 1)
    assert log.record_outcome(outcome(row)).forgotten == 1
    with pytest.raises(Conflict) as caught:  # rows keep their numbers when others are dropped
        log.record_frame([row, other, other | {"calling_score": 0.001}])
    assert caught.value.row == 2


# --------------------------------------------------------------------------------------------------------- opening


def test_a_log_of_another_secret_is_not_continued(database_url: str) -> None:
    DecisionLog(database_url, SECRET).record(decision())
    with pytest.raises(SettingsError, match="not the one that this log was begun with"):
        DecisionLog(database_url, b"quite another secret").record(decision())


def test_a_log_takes_the_settings_of_its_workspace(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALLING_AI_STORE__ATTRIBUTION_DAYS", "3")
    monkeypatch.setenv("CALLING_AI_STORE__CLOCK_SKEW_SECONDS", "60")
    log = DecisionLog.open(workspace)
    assert (log.attribution_days, log.clock_skew_seconds) == (3.0, 60.0)
    assert not (workspace / "var" / "calling_ai.db").exists(), "opening touches no database"
    row = decision()
    assert log.record(row).written == 1 and (workspace / "var" / "user.secret").stat().st_mode & 0o777 == 0o600
    with pytest.raises(InputError, match="two clocks may differ by 60 seconds"):
        log.record_outcome(outcome(row, happened_at=NOON - 2 * MINUTE))


def test_a_database_that_is_away_is_said_so(tmp_path: Any) -> None:
    pytest.importorskip("psycopg")
    away = DecisionLog(f"postgresql://nobody@/nothing?host={tmp_path}", SECRET)
    with pytest.raises(StorageError, match="cannot be reached"):
        away.record(decision())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError):
        DecisionLog(f"sqlite:///{tmp_path / 'file' / 'log.db'}", SECRET).record(decision())


def test_a_shared_database_is_not_upgraded_behind_ones_back(postgresql: Any) -> None:
    url = postgresql.new(empty=True)
    with pytest.raises(StorageError, match="run calling-ai db upgrade"):
        DecisionLog(url, SECRET).record(decision())
    postgresql.drop(url)


def test_records_have_the_columns_of_the_tables() -> None:
    row = decision()
    made = Decision(**row)
    assert made.to_dict() | {"user_id": None} == {**dict.fromkeys(DECISION_COLUMNS), **made.to_dict(), "user_id": None}
    assert set(Outcome.__dataclass_fields__) == set(OUTCOME_COLUMNS) == set(outcomes.c.keys())
    assert set(Decision.__dataclass_fields__) - {"user_id"} == set(DECISION_COLUMNS) == set(decisions.c.keys())
    assert "person-" not in repr(made)
    with pytest.raises(CallingError, match="secret is empty"):
        DecisionLog("sqlite://", b"")
