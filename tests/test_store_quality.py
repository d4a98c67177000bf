"""Quality: each check finds what it is named for, on both databases, and nothing else."""

import datetime as dt

import numpy as np
import pandas as pd
import pytest

from calling_ai.store.decisions import DecisionLog, example_decisions, example_outcomes
from calling_ai.store.quality import check_frame, check_log, judge

END = dt.datetime(2025, 2, 3, tzinfo=dt.UTC)


def spoilt(name: str, made: pd.DataFrame) -> pd.DataFrame:
    """Return decisions with one thing wrong."""
    rows = np.arange(len(made))
    if name == "missing":
        return made.assign(context_weather_context=np.where(rows % 2 == 0, np.nan, made["context_weather_context"]))
    if name == "freshness":
        return made.assign(decided_at=made["decided_at"] - pd.Timedelta(days=5))
    if name == "duplicates":
        again = made.head(30).assign(id=[f"01890a5d-ac96-774b-bcce-{n:012x}" for n in range(30)])
        return pd.concat([made, again])
    if name == "propensity":
        return made.assign(called=False)
    if name == "rows":
        return made.head(50)
    return made


@pytest.mark.parametrize(
    "name", ["", "missing", "freshness", "duplicates", "propensity", "rows", "outcomes", "orphans"]
)
def test_each_check_finds_its_own(name: str, log: DecisionLog) -> None:
    made = example_decisions(rows=1_500, users=40)
    told = example_outcomes(made)
    log.record_frame(spoilt(name, made))
    if name == "orphans":
        told = told.assign(decision_id=np.where(np.arange(len(told)) % 20 == 0, LOST, told["decision_id"]))
    log.record_outcomes(told.head(100) if name in ("outcomes", "rows") else told)
    found = {check.name: check for check in check_log(log, now=END + dt.timedelta(hours=1)).checks}
    bad = {check for check, item in found.items() if item.status != "pass"}
    if name:
        assert name in bad
    allowed = {"rows": {"orphans", "outcomes", "freshness"}, "propensity": {"outcomes"}, "": {"outcomes"}}.get(
        name, set()
    )
    assert bad <= {name} | allowed, {check: found[check].text for check in bad}


LOST = "01890a5d-ac96-774b-bcce-b302099a8057"


def test_numbers_are_those_of_the_frame(log: DecisionLog) -> None:
    made = example_decisions(rows=400, users=9)
    log.record_frame(made)
    found = check_log(log, now=END)
    share = made.filter(regex="^(user|spot|context|timing)_").drop(columns="user_id").isna().mean()
    assert found.get("missing").value == pytest.approx(share.max())
    age = (pd.Timestamp(END) - made["decided_at"].max()) / pd.Timedelta(days=1)
    assert found.get("freshness").value == pytest.approx(age)
    chance = made["propensity"]
    distance = abs(made["called"].sum() - chance.sum()) / np.sqrt((chance * (1 - chance)).sum())
    assert found.get("propensity").value == pytest.approx(distance)
    half = made["decided_at"].iloc[200].to_pydatetime()
    assert check_log(log, since=half, now=END).get("rows").value == (made["decided_at"] >= half).sum()
    assert check_log(log, until=half, now=END).get("rows").value == (made["decided_at"] < half).sum()


def test_an_empty_log_fails_in_one_check(log: DecisionLog) -> None:
    found = check_log(log, now=END)
    assert found.status == "fail" and [check.name for check in found.checks] == ["rows"]


def test_a_frame_is_held_against_the_contract() -> None:
    made = example_decisions(rows=50)
    assert check_frame(made) == ()
    found = check_frame(made.drop(columns="user_overall_energy"))
    assert [(check.name, check.status) for check in found] == [("user_overall_energy", "fail")]


@pytest.mark.parametrize(("value", "word"), [(0.0, "pass"), (0.5, "pass"), (0.6, "warn"), (1.1, "fail")])
def test_limits_are_beyond_and_not_at(value: float, word: str) -> None:
    assert judge("x", value, 0.5, 1.0, "").status == word
