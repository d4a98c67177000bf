"""The tables are what the migrations make, and the outcome that counts is what the rules say, also in SQL."""

import datetime as dt
import random

import pytest
import sqlalchemy as sa

from calling_ai.core.contract import ASSESSMENT_NAMES, FEATURE_NAMES, TREND_NAMES
from calling_ai.core.errors import InputError
from calling_ai.store.database import Moment, database_time, day, engine, micros, reading
from calling_ai.store.decisions import DecisionLog, example_decisions, example_outcomes
from calling_ai.store.schema import DECISION_COLUMNS, EXPOSURE_COLUMNS, KINDS, OUTCOME_COLUMNS, TERMS, Column, decisions


def test_every_feature_has_its_column_in_order() -> None:
    names = [name for name in DECISION_COLUMNS if name in {*FEATURE_NAMES, *ASSESSMENT_NAMES, *TREND_NAMES}]
    assert names == [*FEATURE_NAMES, *ASSESSMENT_NAMES, *TREND_NAMES]
    assert [name for name in DECISION_COLUMNS if name in TERMS] == list(TERMS)


@pytest.mark.parametrize(
    "columns", [DECISION_COLUMNS, OUTCOME_COLUMNS, EXPOSURE_COLUMNS], ids=["decision", "outcome", "exposure"]
)
def test_every_column_says_what_it_is(columns: dict[str, Column]) -> None:
    for name, column in columns.items():
        assert column.name == name and column.kind in KINDS and column.meaning and column.low < column.high
    with pytest.raises(TypeError):
        columns["more"] = column  # type: ignore[index]
    with pytest.raises(InputError, match="kind is 'text'"):
        Column("x", "text", "")


def test_times_are_exact_in_sql(database_url: str) -> None:
    database, generator = engine(database_url), random.Random(0)
    start = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
    moments = [start + dt.timedelta(microseconds=generator.randrange(4 * 10**15)) for _ in range(50)]
    moments += [
        dt.datetime(2025, 12, 31, 23, 59, 59, 999_999, tzinfo=dt.UTC),
        start,
        dt.datetime(9999, 1, 1, tzinfo=dt.UTC),
    ]
    with reading(database) as connection:
        for moment in moments:
            at = sa.literal(moment, Moment)
            expected = ((moment - start) // dt.timedelta(microseconds=1), moment.date().isoformat())
            assert connection.execute(sa.select(micros(at), day(at))).one() == expected
        ours = database_time(connection)
    assert abs(ours - dt.datetime.now(dt.UTC)) < dt.timedelta(minutes=1)


def test_the_view_is_the_query_without_a_window(log: DecisionLog) -> None:
    frame = example_decisions(100)
    messages = example_outcomes(frame)
    corrections = messages[::4].assign(id="c-" + messages["id"][::4], corrects=messages["id"][::4], outcome_score=0.5)
    log.record_frame(frame)
    log.record_outcomes(messages)
    log.record_outcomes(corrections)
    log.attribution_days = 3_000
    with reading(log.database) as connection:
        view = dict(connection.execute(sa.text("SELECT decision_id, id FROM current_outcomes")).tuples().all())
    current = log.current_outcomes()
    assert {str(key): value for key, value in view.items()} == dict(zip(current["decision_id"], current["id"]))
    assert len(current) == len(messages) and current["id"].str.startswith("c-").sum() == len(corrections)


def test_one_person_and_one_period_are_found_by_index(log: DecisionLog) -> None:
    log.record_frame(example_decisions(50))
    if log.database.dialect.name != "sqlite":
        pytest.skip("PostgreSQL reads a small table as a whole, whatever its indexes")
    with reading(log.database) as connection:
        for where in (decisions.c.user_key == "x", decisions.c.decided_at >= dt.datetime(2025, 1, 1, tzinfo=dt.UTC)):
            query = sa.select(decisions).where(where).compile(connection, compile_kwargs={"literal_binds": True})
            plan = connection.execute(sa.text(f"EXPLAIN QUERY PLAN {query}")).all()
            assert "USING INDEX ix_decisions" in str(plan)
