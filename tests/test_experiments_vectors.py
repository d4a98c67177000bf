"""The published numbers are reproduced, wrong ones are found, and false positives on a log are counted honestly."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from calling_ai.cli import main
from calling_ai.core.errors import InputError
from calling_ai.experiments import anytime, balance, design, inference, off_policy, sequential, vectors
from calling_ai.experiments.summaries import Cell, from_sums
from calling_ai.experiments.vectors import VECTORS, Vector, check, looks_of, permute, permute_log, rate, several, verify


def test_every_published_number_is_reproduced(shared: Path) -> None:
    checks = verify(shared / "data" / "open_bandit")
    wrong = [(item.group, item.name, item.value, item.published, item.note) for item in checks if item.status != "ok"]
    assert not wrong and len(checks) == len(VECTORS) >= 110


def test_the_numbers_of_the_shared_files_are_among_them(shared: Path) -> None:
    """Spot checks against the files themselves, so that a number cannot be carried wrongly."""
    carried = {item.published for item in VECTORS}
    text = (shared / "vectors" / "statistics.md").read_text() + (shared / "vectors" / "off_policy.md").read_text()
    for number in carried - {"0", "1"}:
        bare = number.removeprefix("-").removeprefix("0")
        rounded = bare.rstrip("0") if "." in bare else bare
        assert bare in text.replace(",", "") or rounded in text.replace(",", ""), number
    for number in (
        "12.60056",
        "-.55844",
        "2.54e-10",
        "-19.964845210904",
        ".1934",
        "2.4132",
        "2.0310",
        "2.0253",
        ".100911275049",
        "7663.0",
        "655.71",
    ):
        assert number in carried or number.replace(".", "0.", 1) in carried


def test_data_that_is_not_here_is_skipped_never_passed(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        checks = verify(folder)
        assert {item.status for item in checks} == {"ok", "skipped"}
        assert all(item.value is None and "data set" in item.note for item in checks if item.status == "skipped")


@pytest.mark.parametrize(
    ("module", "name", "broken", "group"),
    [
        (anytime, "mixture_rho", lambda *a, **k: 12.5, "normal mixture"),
        (balance, "log_multinomial", lambda *a: -1.0, "sequential mismatch"),
        (sequential, "exact_boundary", lambda *a, **k: np.array([1.96]), "group sequential"),
        (sequential, "peeking_error", lambda *a, **k: 0.05, "peeking"),
        (design, "proportion", lambda value: design.Baseline(value, 0.5, True), "power"),
    ],
)
def test_a_broken_module_is_found(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, broken: Any, group: str
) -> None:
    monkeypatch.setattr(module, name, broken)
    fresh = vectors._anytime() if module is anytime else VECTORS
    failed = {item.group for item in (check(vector) for vector in fresh if not vector.data) if item.status == "failed"}
    assert group in failed


def test_broken_estimators_are_found(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(off_policy, "snips", off_policy.ips)
    failed = [item.name for item in verify(shared / "data" / "open_bandit") if item.status == "failed"]
    assert failed == ["uniform from BTS, all: SNIPS", "uniform from BTS, men: SNIPS"]


@pytest.mark.parametrize(
    ("text", "unit"), [("12.60056", 5e-6), ("-0.6510052", 5e-8), ("2.54e-10", 5e-13), ("40", 0.5), ("0.00146220", 5e-9)]
)
def test_a_print_says_how_exact_it_is(text: str, unit: float) -> None:
    vector = Vector("g", "n", text, "s", lambda: float(text) + 0.9 * unit)
    assert_allclose(vector.unit, unit, rtol=1e-3)
    assert check(vector).status == "ok"
    assert check(Vector("g", "n", text, "s", lambda: float(text) + 1.1 * unit)).status == "failed"
    assert check(Vector("g", "n", text, "s", lambda: math.nan)).status == "failed"


def test_several_keeps_its_numbers_apart() -> None:
    made = several("g", "s", ["one", "two"], ["1.0", "2.0"], lambda: [1.0, 3.0])
    assert [check(item).status for item in made] == ["ok", "failed"]


# ------------------------------------------------------------------------------------------------------- permutation


def log_of(users: int, days: int, seed: int) -> pd.DataFrame:
    """Return a log with users who come on different days and differ from each other, with heavy tails."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, 8, users)
    user = np.repeat(np.arange(users), rows)
    taste = rng.normal(size=users)
    day = np.clip(rng.integers(0, days, users).repeat(rows) + rng.integers(0, 6, rows.sum()), 0, days + 5)
    return pd.DataFrame({"user": user.astype(str), "day": day, "value": taste[user] + rng.lognormal(0, 0.8, len(user))})


def test_the_statistic_is_that_of_the_analysis() -> None:
    frame = log_of(200, 10, 1)
    user = np.unique(frame["user"], return_inverse=True)[1]
    arm = np.random.default_rng(2).random((3, 200)) < 0.5
    z, seen = looks_of(user, frame["day"].to_numpy(), frame["value"].to_numpy(), arm)
    first = np.full(200, 99)
    np.minimum.at(first, user, frame["day"].to_numpy())
    total = np.bincount(user, frame["value"])
    days = np.unique(first)
    assert seen.tolist() == [(first <= day).sum() for day in days]
    for run in range(3):
        for look in (len(days) // 2, len(days) - 1):
            came = first <= days[look]
            groups = [total[came & ~arm[run]], total[came & arm[run]]]
            arms = from_sums(
                ["y"],
                [Cell("control"), Cell("treatment")],
                [len(g) for g in groups],
                [[g.sum()] for g in groups],
                [[[(g**2).sum()]] for g in groups],
            )
            found = inference.compare(arms)
            assert_allclose(z[run, look], found.effect / found.error, rtol=1e-9)
            assert_allclose(z[run, look], stats.ttest_ind(groups[1], groups[0], equal_var=False).statistic, rtol=1e-9)


@pytest.mark.slow
def test_promised_rates_hold_and_peeking_does_not() -> None:
    found = permute(*(log_of(1_500, 30, 3)[name] for name in ("user", "day", "value")), permutations=4_000)
    print(found)
    assert found.holds and found.looks >= 30
    assert found.fixed.lower < 0.05 < found.fixed.upper + 0.005
    assert found.peeking.lower > 0.15
    assert found.group_sequential.upper < 0.065 and found.anytime.upper < 0.05


def test_a_rate_beyond_the_promise_does_not_hold() -> None:
    from dataclasses import replace

    found = permute(*(log_of(300, 10, 4)[name] for name in ("user", "day", "value")), permutations=400)
    assert found.holds
    assert not replace(found, group_sequential=rate(60, 400)).holds
    assert replace(found, peeking=rate(200, 400)).holds, "peeking promises nothing"


@pytest.mark.parametrize(("hits", "trials"), [(0, 50), (50, 50), (3, 40), (200, 4000)])
def test_the_interval_of_a_rate_is_exact(hits: int, trials: int) -> None:
    theirs = stats.binomtest(hits, trials).proportion_ci(method="exact")
    found = rate(hits, trials)
    assert_allclose([found.lower, found.upper], [theirs.low, theirs.high], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"permutations": 10}, "permutations is 10"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"user": ["a"] * 3, "day": [1, 2, 3], "value": [1, 2, 3]}, "the log has 1 users"),
        ({"user": [], "day": [], "value": []}, "the log has 0 users"),
        ({"user": ["a", "b"], "day": [1, 2], "value": [math.nan, math.inf]}, "the log has 0 users"),
    ],
)
def test_a_log_that_cannot_tell_is_refused(change: dict[str, Any], why: str) -> None:
    frame = log_of(150, 5, 0)
    arguments = {name: frame[name] for name in ("user", "day", "value")} | {"permutations": 100} | change
    with pytest.raises(InputError, match=why):
        permute(**arguments)


def test_rates_of_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="hits is 3 of 2"):
        rate(3, 2)


# ------------------------------------------------------------------------------------- the command and the own log


def town_log(workspace: Path) -> None:
    """Write some days of a town into the decision log of a workspace."""
    from calling_ai.core.contract import FEATURE_NAMES
    from calling_ai.score.formula import formula
    from calling_ai.store.decisions import DecisionLog
    from calling_ai.store.identity import uuid7s
    from calling_ai.world.people import bfi_people
    from calling_ai.world.town import Town

    lived = Town(bfi_people().head(150), seed=1).simulate(1)
    frame = lived.decisions
    ids = [str(item) for item in uuid7s(len(frame))]
    parts = formula(frame[list(FEATURE_NAMES)].to_numpy())
    names = (
        "vibe_compatibility",
        "connection",
        "fulfilment",
        "positive_influence",
        "trajectory",
        "life_betterment",
        "context_factor",
        "timing_factor",
    )
    rows = frame.drop(
        columns=["record_id", "action", "outcome_type", "outcome_score", "happened_at", "received_at"]
    ).assign(
        id=ids,
        refused=False,
        hybrid_score=frame["formula_score"],
        boosted_score=frame["formula_score"],
        weight=0.0,
        gate=0.7,
        threshold=0.7,
        exploration=0.02,
        seed=0,
        path="formula",
        **{name: getattr(parts, name) for name in names},
    )
    log = DecisionLog.open(workspace)
    log.record_frame(rows)
    known = frame["outcome_score"].notna()
    outcomes = frame.loc[known, ["outcome_type", "outcome_score", "action", "happened_at", "received_at"]].assign(
        id=[f"o{index}" for index in np.flatnonzero(known)], decision_id=[ids[index] for index in np.flatnonzero(known)]
    )
    log.record_outcomes(outcomes)


def run(workspace: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a workspace."""
    import os

    command = [sys.executable, "-c", "import sys; from calling_ai.cli import main; sys.exit(main())", *words]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=workspace,
        env={**os.environ, "CALLING_AI_WORKSPACE": str(workspace)},
    )


def test_verify_says_what_it_found(workspace: Path, shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert permute_log(workspace) == (None, "there is no decision log yet")
    town_log(workspace)
    found, why = permute_log(workspace, 200)
    assert found is not None and why == "" and found.users > 100
    result = run(
        workspace, "verify", "--json", "--permutations", "200", "--open-bandit", str(shared / "data" / "open_bandit")
    )
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert (
        answer["good"]
        and {item["status"] for item in answer["vectors"]} == {"ok"}
        and answer["permutation"]["users"] == found.users
    )
    assert main(["verify", "--permutations", "200"]) == 0
    table = capsys.readouterr().out
    assert "published number" in table and "0 failed" in table and "skipped for want of data" in table
    assert "False positives on your own log: 200 random divisions" in table


def test_policies_are_compared_on_the_real_log(workspace: Path) -> None:
    from calling_ai.score.policy import Policy
    from calling_ai.store.decisions import DecisionLog

    town_log(workspace)
    frame = DecisionLog.open(workspace).joined()
    found = off_policy.compare_policies(
        off_policy.call_log(frame), {"champion": Policy(), "looser": Policy(threshold=0.66)}
    )
    champion = found.values["champion"].require()
    earned = np.where(frame["outcome_score"].notna(), frame["outcome_score"] - 0.5, 0).mean()
    assert champion.lower < earned < champion.upper and abs(found.values["champion"].diagnostics.mean_weight - 1) < 0.05


def test_verify_ends_with_one_when_a_number_is_wrong(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sequential, "peeking_error", lambda *a, **k: 0.05)
    assert main(["verify", "--permutations", "0"]) == 1
    assert "failed" in capsys.readouterr().out
