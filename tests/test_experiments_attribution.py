"""From the log to one row a user: the query and the frame agree, and the clock is the judge."""

import datetime as dt
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose

from calling_ai.core.errors import InputError, NotFoundError
from calling_ai.experiments.attribution import (
    MEASURES,
    METRICS,
    attribute,
    ends_of,
    log_units,
    measured,
    stage_begins,
    summarise_log,
)
from calling_ai.experiments.inference import compare
from calling_ai.experiments.summaries import summarise
from calling_ai.store.database import reading
from calling_ai.store.decisions import DecisionLog, example_decisions, example_outcomes
from calling_ai.store.identity import pseudonyms

START = dt.datetime(2025, 1, 6, tzinfo=dt.UTC)
SECRET = b"a secret of the tests, long enough"


def filled(url: str, rows: int = 800, users: int = 80, seed: int = 0) -> DecisionLog:
    """Return a log with decisions, outcomes, and an experiment in three stages that users come back to."""
    log = DecisionLog(url, SECRET)
    made = example_decisions(rows, users=users, seed=seed, start=START, days=28)
    log.record_frame(made)
    log.record_outcomes(example_outcomes(made, seed=seed))
    rng = np.random.default_rng(seed)
    keys = pseudonyms([f"person-{i}" for i in range(users)], SECRET)
    bucket, rows_ = rng.random(users), []
    for number, (stage, share) in enumerate((("10%", 0.1), ("50%", 0.5), ("100%", 0.9))):
        for i in np.flatnonzero(rng.random(users) < 0.7):
            treated = bucket[i] < share
            when = START + dt.timedelta(days=8 + 5 * number, hours=float(rng.uniform(0, 100)))
            rows_.append(
                {
                    "experiment": "e",
                    "stage": stage,
                    "user_key": keys[i],
                    "arm": "treatment" if treated else "control",
                    "share": share if treated else 1 - share,
                    "exposed_at": when,
                }
            )
    of_user = dict(list(log.decisions(columns=["id", "user_key", "decided_at"]).groupby("user_key")))
    for number, row in enumerate(rows_):
        own = of_user.get(row["user_key"])
        if number % 5 == 0 and own is not None:  # exposed at a decision, a moment after it on the clock
            at = own.iloc[len(own) // 2]
            row.update(decision_id=at["id"], exposed_at=at["decided_at"] + pd.Timedelta(milliseconds=7))
        else:
            row["decision_id"] = None
    log.expose(rows_)
    return log


TOTALS = (
    "decisions",
    "called",
    "positive",
    "negative",
    "outcomes",
    "outcome_score",
    "calling_score",
    "formula_alone",
    "explored",
    "latency_us",
    "any_positive",
)
COVARIATES = ("decisions", "positive", "outcome_score", "calling_score")


@pytest.mark.parametrize("as_of", [None, START + dt.timedelta(days=16)])
def test_the_query_and_the_frame_agree(database_url: str, as_of: dt.datetime | None) -> None:
    log = filled(database_url)
    frame = attribute(
        log.exposed("e"), measured(log.joined(as_of=as_of)), TOTALS, COVARIATES, window_days=6, before_days=5
    )
    ends = ends_of({stage: group.exposed_at.min() for stage, group in log.exposed("e").groupby("stage")})
    with reading(log.database) as connection:
        assert ends_of(stage_begins(connection, "e")) == ends
        query = log_units(log, "e", TOTALS, COVARIATES, window_days=6, before_days=5, ends=ends, as_of=as_of)
        rows = (
            pd.DataFrame(connection.execute(query).mappings().all())
            .sort_values(["user_key", "stage"])
            .reset_index(drop=True)
        )
    columns = [*TOTALS, *(f"before_{name}" for name in COVARIATES)]
    frame = frame.sort_values(["user_key", "stage"]).reset_index(drop=True)
    assert (
        rows[["user_key", "arm", "stage", "day"]].equals(
            frame[["user_key", "arm", "stage", "day"]].astype(rows[["day"]].dtypes.iloc[0], errors="ignore")
        )
        or (
            rows[["user_key", "arm", "stage", "day"]].to_numpy()
            == frame[["user_key", "arm", "stage", "day"]].to_numpy()
        ).all()
    )
    assert_allclose(rows[columns].to_numpy(dtype=float), frame[columns].to_numpy(dtype=float), rtol=1e-9, atol=1e-9)
    assert (rows[["decisions", "positive", "before_decisions", "before_positive"]].sum() > 0).all()
    totals, covariates = ("positive", "outcomes", "any_positive"), ("positive", "decisions")
    asked = summarise_log(log, "e", totals, covariates, window_days=6, before_days=5, as_of=as_of)
    known = summarise(frame, totals, [f"before_{name}" for name in covariates])
    assert asked.cells == known.cells and asked.shared.cells == known.shared.cells and len(known.shared)
    assert_allclose(asked.scatter, known.scatter, rtol=1e-7, atol=1e-7)
    assert_allclose(asked.shared.scatter, known.shared.scatter, rtol=1e-7, atol=1e-7)
    found = compare(asked, METRICS["positive rate"], adjust="cuped", covariates=("before_positive", "before_decisions"))
    assert np.isfinite([found.lower, found.upper]).all()
    log.database.dispose()


def small() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return one user's exposure and four decisions around it."""
    exposed = pd.DataFrame(
        [
            {
                "experiment": "e",
                "stage": "1",
                "user_key": "u",
                "arm": "a",
                "share": 0.5,
                "decision_id": "d3",
                "exposed_at": START,
            }
        ]
    )
    hour = pd.Timedelta(hours=1)
    at = pd.DatetimeIndex([START - 3 * hour, START - 2 * hour, START - 1 * hour, START + 5 * hour])
    events = pd.DataFrame(
        {
            "user_key": "u",
            "id": ["d1", "d2", "d3", "d4"],
            "decided_at": at,
            "happened_at": at + hour,
            "received_at": [at[0] + hour, START + hour, at[2] + hour, at[3] + hour],
            "decisions": 1.0,
            "positive": 1.0,
        }
    )
    return exposed, events


def test_before_is_what_was_decided_and_known_before() -> None:
    exposed, events = small()
    found = attribute(exposed, events, ("decisions", "positive"), ("decisions", "positive")).iloc[0]
    assert (found["decisions"], found["positive"]) == (2, 2)  # the decision of the exposure itself, and the later one
    assert found["before_decisions"] == 2
    assert found["before_positive"] == 1  # the outcome of the second arrived after the exposure: it may be an effect


def test_a_user_without_decisions_counts() -> None:
    exposed, events = small()
    found = attribute(exposed, events.iloc[:0], ("decisions",), ("decisions",))
    assert len(found) == 1 and found[["decisions", "before_decisions"]].to_numpy().tolist() == [[0.0, 0.0]]


def test_the_window_and_the_stage_end_what_counts() -> None:
    exposed, events = small()
    assert attribute(exposed, events, ("decisions",), window_days=0.1).decisions.iloc[0] == 1
    other = exposed.assign(user_key="v", stage="2", decision_id=None, exposed_at=START + pd.Timedelta(hours=4))
    both = attribute(pd.concat([exposed, other], ignore_index=True), events, ("decisions",))
    assert both.decisions.tolist() == [1.0, 0.0]  # the stage ended for everyone when the next one began


def test_what_the_treatment_did_is_no_covariate() -> None:
    exposed, events = small()
    again = exposed.assign(stage="2", decision_id=None, exposed_at=START + pd.Timedelta(hours=9))
    both = attribute(pd.concat([exposed, again], ignore_index=True), events, ("decisions",), ("decisions",))
    assert both.before_decisions.tolist() == [2.0, 2.0]  # from before the first exposure, in every stage


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"totals": ("clicks",)}, "measure is 'clicks'"),
        ({"totals": ()}, "at least one measure"),
        ({"covariates": ("any_positive",)}, "measure is 'any_positive'"),
        ({"window_days": 0}, "window_days is 0"),
        ({"before_days": float("nan")}, "before_days is nan"),
    ],
)
def test_bad_questions_are_refused(options: dict[str, Any], message: str, tmp_path: Any) -> None:
    exposed, events = small()
    with pytest.raises(InputError, match=message):
        attribute(exposed, events, **options)
    with pytest.raises(InputError, match=message):
        log_units(DecisionLog(f"sqlite:///{tmp_path}/log.db", SECRET), "e", **options)


def test_an_unknown_experiment_is_named(tmp_path: Any) -> None:
    with pytest.raises(NotFoundError, match="experiment 'e' has no exposures"):
        summarise_log(DecisionLog(f"sqlite:///{tmp_path}/log.db", SECRET), "e")
    assert all(set(metric.columns) <= set(MEASURES) for metric in METRICS.values())
