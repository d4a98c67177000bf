"""Monitoring: late labels do not bias fresh days, what is withdrawn is withdrawn, and alerts say what to run next."""

import dataclasses
import datetime as dt
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from calling_ai.cli import main
from calling_ai.core.errors import InputError, NotFoundError
from calling_ai.core.plots import figure
from calling_ai.core.settings import AlertSettings, MonitoringSettings, Settings, settings
from calling_ai.operate.alerts import open_alerts
from calling_ai.operate.monitoring import (
    WATCHED,
    change_since,
    daily_rows,
    example_log,
    findings,
    json_of,
    live_of,
    measure_log,
    monitor,
    plot_calibration,
    plot_days,
    plot_drift,
    plot_groups,
    plot_service,
    read_frame,
    read_monitored,
    rows_of_drift,
    rows_of_findings,
    rows_of_groups,
    told_in_words,
    watch_drift,
    write_report,
)
from calling_ai.operate.performance import (
    calibration_of,
    delay_curve,
    delays_of,
    foresee,
    label_weights,
    measure_groups,
    share_of_people,
)
from calling_ai.store.decisions import DecisionLog, example_decisions, example_outcomes

START = dt.datetime(2026, 3, 2, tzinfo=dt.UTC)
SECRET = "the pseudonyms decide which row of a user counts"


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every test the same pseudonyms."""
    monkeypatch.setenv("CALLING_AI_USER_SECRET", SECRET)


def calls(seed: int, rows: int = 8_000, people: int = 500, days: float = 28, wrong: float = 0.0) -> pd.DataFrame:
    """Return calls whose positive outcomes come days late and the others within hours."""
    random = np.random.default_rng(seed)
    person = random.integers(0, people, rows)
    stated = np.clip(random.beta(4, 4, rows) + 0.1 * random.standard_normal(people)[person], 0.02, 0.98)
    good = random.random(rows) < np.clip(stated + wrong, 0, 1)
    age = random.uniform(0, days, rows)
    delay = np.where(good, random.gamma(2, 1.2, rows), random.exponential(0.3, rows))
    known = (delay < age) & (delay < 14) & (random.random(rows) < 0.9)
    return pd.DataFrame(
        {
            "user_key": person.astype(str),
            "called": True,
            "age": age,
            "delay": np.where(known, delay, np.nan),
            "positive": np.where(known, good, np.nan),
            "outcome_probability": stated,
            "calling_score": stated,
            "fallback": False,
            "error": False,
            "latency_us": 30.0,
            "truth": good,
            "day": np.floor(days - age).astype(int),
        }
    )


# ------------------------------------------------------------------------------------------------- late labels


def test_the_delay_curve_is_the_product_limit_backwards_in_time() -> None:
    random = np.random.default_rng(0)
    delay = np.round(random.exponential(2, 400), 1)
    age = random.uniform(0, 14, 400)
    seen = delay <= age
    points, known = delay_curve(delay[seen], age[seen])
    for point, value in zip(points[::7], known[::7], strict=True):
        product = 1.0
        for later in points[points > point]:
            at_risk = ((delay[seen] <= later) & (age[seen] >= later)).sum()
            product *= 1 - (delay[seen] == later).sum() / at_risk
        np.testing.assert_allclose(value, product, rtol=1e-10, atol=1e-12)


def test_the_delay_curve_finds_the_truth_that_the_plain_share_misses() -> None:
    random = np.random.default_rng(1)
    delay, age = random.gamma(2, 1.5, 40_000), random.uniform(0, 14, 40_000)
    seen = delay <= age
    points, known = delay_curve(delay[seen], age[seen])
    grid = np.array([1.0, 2.0, 4.0, 6.0])
    truth = stats.gamma.cdf(grid, 2, scale=1.5) / stats.gamma.cdf(14, 2, scale=1.5)
    found = known[np.searchsorted(points, grid, side="right") - 1]
    plain = np.array([(delay[seen] <= point).mean() for point in grid])
    print("truth", truth.round(3), "corrected", found.round(3), "plain", plain.round(3))
    np.testing.assert_allclose(found, truth, atol=0.02)
    assert np.abs(plain - truth).max() > 0.05


def test_fresh_days_are_not_biased() -> None:
    """The last four days of 40 logs: the interval holds the truth as often as promised."""
    inside, errors, naive = 0, [], []
    for seed in range(40):
        frame = calls(seed)
        delays = delays_of(frame, 14)
        weights = label_weights(frame, delays)
        fresh = ((frame["age"] < 4) & (delays.least(frame["age"].to_numpy()) >= 0.1)).to_numpy()
        part = frame[fresh]
        found = share_of_people(part["positive"].fillna(0), part["user_key"], weights[fresh])
        truth = part["truth"].mean()
        inside += found.lower <= truth <= found.upper
        errors.append(found.value - truth)
        naive.append(part["positive"].mean() - truth)
    print(
        f"bias {np.mean(errors):+.4f} corrected, {np.mean(naive):+.4f} so far; {inside} of 40 intervals hold the truth"
    )
    assert abs(np.mean(errors)) < 0.01 < 0.08 < -np.mean(naive) and inside >= 36


def test_without_old_outcomes_nothing_is_corrected() -> None:
    frame = calls(0, days=5)
    delays = delays_of(frame, 14)
    assert not delays.corrected
    weights = label_weights(frame, delays)
    assert set(np.unique(weights)) == {0.0, 1.0} and weights.sum() == frame["positive"].notna().sum()
    with pytest.raises(InputError, match="could not have been seen"):
        delay_curve(np.array([3.0]), np.array([2.0]))


def test_intervals_are_over_people_and_cover() -> None:
    inside = 0
    for seed in range(300):
        random = np.random.default_rng(seed)
        level = random.beta(2, 2, 80)
        person = np.repeat(np.arange(80), random.integers(1, 15, 80))
        found = share_of_people(random.random(len(person)) < level[person], person)
        inside += found.lower <= 0.5 <= found.upper
    print(f"{inside / 300:.3f} of the 95 % intervals over people hold the truth")
    assert 0.91 <= inside / 300 <= 0.985
    assert share_of_people([0] * 50, range(50)).upper < 0.08 and math.isnan(share_of_people([], []).value)


# --------------------------------------------------------------------------------- calibration, and what it allows


def test_estimates_before_labels_are_withdrawn_when_calibration_fails() -> None:
    held, withdrawn, caught = 0, 0, 0
    for seed in range(20):
        for wrong in (0.0, -0.08):
            frame = calls(seed, wrong=wrong)
            calibration = calibration_of(frame, label_weights(frame, delays_of(frame, 14)))
            today = frame[(frame["age"] < 1).to_numpy()]
            found = foresee(today, calibration)
            if wrong:
                withdrawn += found is None
            elif found is not None:
                held += 1
                caught += found.lower <= today["truth"].mean() <= found.upper
    print(f"calibrated: {held} of 20 given, {caught} hold what came; off by 0.08: {withdrawn} of 20 withdrawn")
    assert held >= 18 and withdrawn >= 19 and caught >= 0.7 * held  # the truth of one day varies by itself


def test_a_group_that_is_off_is_found_where_the_whole_agrees() -> None:
    frame = calls(3, rows=20_000, days=60)
    high = (frame["outcome_probability"] > 0.5).to_numpy()
    stated = np.where(high, frame["outcome_probability"] - 0.1, frame["outcome_probability"] + 0.1)
    frame = frame.assign(outcome_probability=stated.clip(0.01, 0.99))
    calibration = calibration_of(frame, label_weights(frame, delays_of(frame, 14)))
    assert not calibration.holds and abs(calibration.gap.value) < 0.02 and "a group is off" in calibration.why


def test_too_little_is_not_enough() -> None:
    frame = calls(4)
    few = frame[:60]
    assert "too few" in calibration_of(few, np.ones(60)).why
    nothing = frame.assign(outcome_probability=np.nan)
    assert calibration_of(nothing, np.ones(len(frame))).why == "no probability was stated"
    one = frame.assign(user_key="same")
    calibration = calibration_of(frame, label_weights(frame, delays_of(frame, 14)))
    assert measure_groups(one, one["day"], delays_of(frame, 14), calibration) == ()


# ------------------------------------------------------------------------------------------------------- the log


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, dt.datetime]:
    """Return a workspace with the log of a small town, and the end of the log."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALLING_AI_USER_SECRET", SECRET)
        workspace = settings(tmp_path_factory.mktemp("town"))
        return workspace, example_log(workspace)


def test_the_faulty_feature_is_named_first(town: tuple[Settings, dt.datetime]) -> None:
    workspace, end = town
    measured = measure_log(workspace, end, keep=False)
    named = [item for item in measured.features if item.named]
    print("named, first to last:", [item.name for item in named])
    assert named[0].name == "context_user_receptivity" and not any(item.name.startswith("user_") for item in named)
    assert (end.date() - dt.date.fromisoformat(named[0].named or "")).days <= 5
    warned = [item for item in findings(measured, workspace) if item.severity == "warning"]
    assert [item.key for item in warned] == ["drift:context_user_receptivity"]
    assert warned[0].command == "calling-ai retrain" and "expected false alarms at most" in warned[0].text


def test_the_watch_is_the_same_continued_interrupted_and_recomputed(town: tuple[Settings, dt.datetime]) -> None:
    workspace, end = town
    book = DecisionLog.open(workspace)
    live = live_of(workspace, book, end)
    fresh = watch_drift(workspace, book, WATCHED, live.reference, end, 0.05)
    for days in (18, 11, 10, 3, 0, 0):
        kept = watch_drift(workspace, book, WATCHED, live.reference, end - dt.timedelta(days=days), 0.05, keep="again")
    assert kept.to_dict() == fresh.to_dict()
    path = workspace.var / "monitoring" / "drift-again.json"
    path.write_text("{broken", encoding="utf-8")
    again = watch_drift(workspace, book, WATCHED, live.reference, end, 0.05, keep="again")
    assert again.to_dict() == fresh.to_dict() and json.loads(path.read_text())["state"]["days"] == fresh.days
    other = watch_drift(workspace, book, WATCHED, live.reference, end, 0.05, number=2, keep="again")
    assert other.level < fresh.level and other.days == fresh.days


def test_one_row_a_user_and_day(town: tuple[Settings, dt.datetime]) -> None:
    workspace, end = town
    book = DecisionLog.open(workspace)
    frame = read_frame(book, START, end)
    rows = daily_rows(book, ["formula_score"], START, START + dt.timedelta(days=10))
    people = frame.groupby("day")["user_key"].nunique()
    assert {day.isoformat(): len(found) for day, found in rows.items()} == people[:10].to_dict()
    narrow = daily_rows(book, ["formula_score"], START + dt.timedelta(days=3), START + dt.timedelta(days=4))
    np.testing.assert_array_equal(narrow[dt.date(2026, 3, 5)], rows[dt.date(2026, 3, 5)])
    live = daily_rows(book, ["formula_score"], START, START + dt.timedelta(days=2), "v1.0-town")
    assert [len(found) for found in live.values()] == [0, 0]


def test_what_was_not_known_then_does_not_exist(town: tuple[Settings, dt.datetime]) -> None:
    workspace, end = town
    before = end - dt.timedelta(days=9)
    measured = measure_log(workspace, before, keep=False)
    frame = read_frame(DecisionLog.open(workspace), START, before)
    assert measured.live.last < before and (frame["age"] > 0).all()
    assert not (frame["delay"] > frame["age"]).any()
    assert "context_user_receptivity" not in measured.watch.named
    assert measured.overall.provisional <= measured.overall.outcomes and measured.overall.outstanding > 0


def test_alerts_open_once_and_close_by_themselves(town: tuple[Settings, dt.datetime]) -> None:
    workspace, end = town
    quiet, silent = monitor(workspace, end, report=False), end + dt.timedelta(days=5)
    assert quiet.hours_silent < 24 and not any(item.key == "stale" for item in open_alerts(workspace))
    monitor(workspace, silent, report=False)
    stale = next(item for item in open_alerts(workspace) if item.key == "stale")
    assert stale.severity == "critical" and stale.command == "calling-ai doctor"
    monitor(workspace, end, report=False)
    assert not any(item.key == "stale" for item in open_alerts(workspace))
    drift = next(item for item in open_alerts(workspace) if item.key == "drift:context_user_receptivity")
    assert drift.count == 3 and drift.facts["call_effect"] > 0.01
    record = read_monitored(workspace)
    assert record is not None and "stale" in record["closed"] and record["as_of"] == end.isoformat(timespec="seconds")
    lines = [json.loads(line) for line in (workspace.var / "alerts.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines if line["alert"]["key"] == "stale"] == ["opened", "closed"]


def test_no_pseudonym_in_records_states_and_alerts(town: tuple[Settings, dt.datetime]) -> None:
    workspace, end = town
    monitor(workspace, end, report=False)
    keys = read_frame(DecisionLog.open(workspace), START, end)["user_key"].unique()
    texts = [
        path.read_text() for path in [*(workspace.var / "monitoring").glob("*.json"), workspace.var / "alerts.jsonl"]
    ]
    assert len(texts) >= 4 and not any(key in text for key in keys for text in texts)


# ------------------------------------------------------------------------------------------ harm, fallbacks, quality


def written(
    folder: Path, days: int = 42, rows: int = 6_000, users: int = 600, good: float = 0.0, **late: Any
) -> Settings:
    """Return a workspace with made-up decisions; after four weeks a version is live with columns of its own."""
    workspace = settings(folder)
    frame = example_decisions(rows, users, seed=5, start=START, days=days)
    live = (frame["decided_at"] >= START + dt.timedelta(days=28)).to_numpy()
    random = np.random.default_rng(6)
    frame = frame.assign(called=True, latency_us=random.lognormal(4, 0.2, rows), outcome_probability=np.nan)
    frame["calling_score_version"] = pd.Series([("v1.0-x" if flag else None) for flag in live], dtype=object)
    for name, value in late.items():
        old = frame[name] if name in frame else pd.Series([None] * rows, dtype=object)
        frame[name] = old.astype(object).where(~live, value(frame) if callable(value) else value)
    book = DecisionLog.open(workspace)
    frame["latency_us"] = frame["latency_us"].astype(float)
    book.record_frame(frame)
    outcomes = example_outcomes(frame, 0.9, seed=7)
    after = outcomes["decision_id"].isin(set(frame["id"][live])).to_numpy()
    score = np.clip(outcomes["outcome_score"] + np.where(after, good, 0), 0, 1)
    kind = np.select([score >= 0.7, score <= 0.3], ["positive", "negative"], "neutral").astype(object)
    outcomes = outcomes.assign(outcome_score=score, outcome_type=kind)
    book.record_outcomes(outcomes[(outcomes["received_at"] < START + dt.timedelta(days=days)).to_numpy()])
    return workspace


END = START + dt.timedelta(days=42)


def test_a_version_that_does_harm_is_critical_and_the_command_is_rollback(tmp_path: Path) -> None:
    workspace = written(tmp_path, good=-0.12)
    measured = measure_log(workspace, END, keep=False)
    assert measured.live.label == "v1.0-x" and measured.change is not None
    print("change:", measured.change["difference"], "upper", measured.change["upper"])
    harm = next(item for item in findings(measured, workspace) if item.key == "performance")
    assert (
        harm.severity == "critical" and harm.command == "calling-ai versions rollback" and "no experiment" in harm.text
    )


def test_fallbacks_errors_and_latency_are_told(tmp_path: Path) -> None:
    random = np.random.default_rng(8)
    broken = written(
        tmp_path,
        days=42,
        rows=18_000,
        reason=lambda frame: np.where(random.random(len(frame)) < 0.06, "outcome model gave no usable number", None),
        latency_us=lambda frame: frame["latency_us"] * 3,
    )
    measured = measure_log(broken, END, keep=False)
    found = {item.key: item for item in findings(measured, broken)}
    assert {"fallback", "errors", "latency"} <= set(found) and found["fallback"].command == "calling-ai doctor"
    assert 0.05 < measured.overall.fallback.value < 0.07


def test_arms_versions_and_the_formula_have_names(tmp_path: Path) -> None:
    workspace = written(
        tmp_path,
        experiment="weights",
        stage="10",
        arm=lambda frame: np.where(np.arange(len(frame)) % 2 == 0, "control", "challenger"),
    )
    measured = measure_log(workspace, END, keep=False)
    assert [item.name for item in measured.arms] == ["weights: challenger", "weights: control"]
    assert [item.name for item in measured.versions] == ["v1.0-x"] and measured.live.number == 2
    assert len(measured.days) in (14, 15) and all(item.people >= 20 for item in measured.days)
    keys = [item.key for item in findings(measured, workspace)]
    assert not [key for key in keys if key in ("performance", "fallback", "errors", "latency", "calibration", "stale")]
    assert measured.change is not None and measured.change["upper"] > 0  # it does nothing, and is not accused


def test_nothing_to_monitor_and_wrong_questions(tmp_path: Path) -> None:
    workspace = settings(tmp_path)
    with pytest.raises(NotFoundError, match="nothing to monitor"):
        measure_log(workspace)
    with pytest.raises(InputError, match="time zone"):
        measure_log(workspace, dt.datetime(2026, 1, 1))


def test_few_people_are_never_shown(tmp_path: Path) -> None:
    workspace = settings(tmp_path)
    book = DecisionLog.open(workspace)
    frame = example_decisions(300, 10, start=START, days=30)
    book.record_frame(frame)
    measured = measure_log(workspace, START + dt.timedelta(days=31), keep=False)
    assert (
        measured.days == () == measured.versions and measured.overall.positive_rate is None and measured.before is None
    )
    assert measured.change is None and not measured.calibration.holds


@pytest.mark.filterwarnings("error")
def test_a_log_of_three_days_can_be_drawn_and_told(tmp_path: Path) -> None:
    workspace = settings(tmp_path)
    frame = example_decisions(600, 100, start=START, days=3)
    book = DecisionLog.open(workspace)
    book.record_frame(frame)
    book.record_outcomes(example_outcomes(frame))
    measured = measure_log(workspace, START + dt.timedelta(days=12), keep=False)
    record = measured.to_dict() | {"findings": json_of(findings(measured, workspace))}
    fig, axes = figure(columns=2)
    for draw in (plot_days, plot_groups, plot_calibration, plot_drift):
        draw(axes[0], record)
        axes[0].clear()
    plot_service(axes, record)
    fig.canvas.draw()
    text = "\n".join(told_in_words(record))
    assert measured.features == () and "nothing was looked at yet" in text and "formula, live since" in text
    assert [row[0] for row in rows_of_findings(record)] == ["The log is stale"]
    assert rows_of_drift(record) == [] and rows_of_groups(record)[0][0] == "all"


def test_the_change_needs_people_on_both_sides(town: tuple[Settings, dt.datetime]) -> None:
    workspace, end = town
    book = DecisionLog.open(workspace)
    live = live_of(workspace, book, end)
    frame = read_frame(book, live.reference[0], end)
    weights = np.where(frame["called"], 1.0, 0.0) * frame["positive"].notna()
    assert change_since(frame, weights.to_numpy(), live, 0.025) is not None
    assert change_since(frame[:100], weights.to_numpy()[:100], live, 0.025) is None


# --------------------------------------------------------------------------------------------- report and command


def test_the_command_writes_record_report_and_alerts(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor", "--no-report"]) == 1 and "nothing to monitor" in capsys.readouterr().err
    end = example_log(settings(workspace), people=90, weeks=6)
    moment = f"{end:%Y-%m-%dT%H:%M:%S}"
    assert main(["monitor", "--as-of", moment]) == 0
    text = capsys.readouterr().out
    page = (workspace / "reports" / "monitor" / "index.html").read_text()
    assert "v1.0-town, live since" in text and "reports/monitor/index.html" in text
    assert "Has the world changed?" in page and "http" not in page.replace("http-equiv", "").replace(
        "http://www.w3.org", ""
    )
    assert main(["monitor", "--as-of", moment, "--no-report", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["live"]["label"] == "v1.0-town" and {"findings", "features", "days"} <= set(record)
    assert all(item.report == "reports/monitor/index.html" for item in open_alerts(settings(workspace)))


def test_a_report_that_cannot_be_drawn_does_not_keep_alerts_back(tmp_path: Path) -> None:
    workspace = dataclasses.replace(
        settings(tmp_path), alerts=AlertSettings(), monitoring=MonitoringSettings(fresh_hours=1)
    )
    end = example_log(workspace, people=60, weeks=5)
    monitor(workspace, end + dt.timedelta(days=2))
    keys = {item.key for item in open_alerts(workspace)}
    assert {"stale", "report:monitor"} <= keys
    with pytest.raises(Exception, match="monitor.ipynb"):
        write_report(workspace, workspace.var / "monitoring" / "latest.json")


def test_postgresql_says_the_same(tmp_path: Path, postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    records, alerts = [], []
    for name, url in (("one", ""), ("other", postgresql_url)):
        (tmp_path / name).mkdir()
        monkeypatch.setenv("CALLING_AI_STORE__URL", url)
        workspace = settings(tmp_path / name)
        end = example_log(workspace, people=80, weeks=6)
        monitor(workspace, end, report=False)
        records.append(read_monitored(workspace))
        alerts.append(sorted((item.key, item.severity, item.count) for item in open_alerts(workspace, True)))
    assert alerts[0] == alerts[1] and alerts[0]
    one, other = records
    assert one is not None and other is not None and one["watch"] == other["watch"]
    assert [item["key"] for item in one["findings"]] == [item["key"] for item in other["findings"]]
    for first, second in zip(one["days"], other["days"], strict=True):
        assert first["outcomes"] == second["outcomes"]
        np.testing.assert_allclose(first["call_rate"]["value"], second["call_rate"]["value"], rtol=1e-12)
