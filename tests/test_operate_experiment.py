"""Experiments from a protocol on disk: from a table, from the log, on the command line, and as a notebook."""

import datetime as dt
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from calling_ai.core.errors import InputError, NotFoundError
from calling_ai.core.settings import settings
from calling_ai.experiments.assignment import Experiment
from calling_ai.experiments.inference import Metric
from calling_ai.experiments.simulate import Scenario
from calling_ai.experiments.verdict import Protocol
from calling_ai.operate.experiment import (
    analyse,
    described,
    design,
    example_protocol,
    example_table,
    read_protocol,
    simulate,
    summaries_of,
)
from calling_ai.operate.notebooks import run_notebook
from calling_ai.store.decisions import DecisionLog


@pytest.fixture
def files(workspace: Path) -> tuple[Path, Path]:
    """Return a protocol and a table on disk."""
    protocol, table = workspace / "protocol.json", workspace / "users.csv"
    protocol.write_text(json.dumps(example_protocol().to_dict()))
    example_table(1).to_csv(table, index=False)
    return protocol, table


def call(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    program = Path(sys.executable).with_name("calling-ai")
    return subprocess.run(
        [program, "experiment", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=120
    )


def test_a_table_gives_the_same_verdict_from_disk_and_from_memory(files: tuple[Path, Path], workspace: Path) -> None:
    protocol = read_protocol(files[0], settings(workspace))
    assert protocol == example_protocol()
    one, two = (
        analyse(settings(workspace), protocol, files[1]),
        analyse(settings(workspace), protocol, example_table(1)),
    )
    assert one.verdict == two.verdict == "promote" and one.reasons == two.reasons
    assert described(one)["title"].startswith("weight-0.3: promote hybrid")


def test_defaults_come_from_the_settings(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = workspace / "protocol.json"
    file.write_text(json.dumps({"experiment": example_protocol().experiment.to_dict(), "maximum": 5_000, "harm": 0.01}))
    monkeypatch.setenv("CALLING_AI_EXPERIMENT__ALPHA", "0.05")
    monkeypatch.setenv("CALLING_AI_EXPERIMENT__SPENDING", "pocock")
    found = read_protocol(file, settings(workspace))
    assert (found.alpha, found.harm, found.spending.family) == (0.05, 0.01, "pocock")
    monkeypatch.setenv("CALLING_AI_EXPERIMENT__SPENDING", "magic")
    with pytest.raises(InputError, match="family is 'magic'"):
        read_protocol(file, settings(workspace))


def test_the_log_counts_users_once_their_window_has_closed(workspace: Path) -> None:
    start = dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC)
    rows = [
        {
            "experiment": "log",
            "stage": "all",
            "user_key": f"{day:02d}{user:062d}",
            "arm": ("control", "hybrid")[user % 2],
            "exposed_at": start + dt.timedelta(days=day),
            "share": 0.5,
        }
        for day in range(6)
        for user in range(40)
    ]
    DecisionLog.open(workspace).expose(pd.DataFrame(rows))
    experiment = Experiment("log", "log", {"control": 0.5, "hybrid": 0.5}, "control")
    protocol = Protocol(experiment, 1_000, Metric("positive", "decisions"))
    for days, users in ((14, 0), (15, 40), (18, 160), (40, 240)):
        found = summaries_of(settings(workspace), protocol, as_of=start + dt.timedelta(days=days, hours=1))
        assert found.users() == users, days
    verdict = analyse(settings(workspace), protocol, as_of=start + dt.timedelta(days=40))
    assert verdict.verdict == "cannot tell" and "Not enough data" in str(verdict)
    with pytest.raises(NotFoundError, match="has no exposures"):
        analyse(settings(workspace), example_protocol())


def test_a_plan_keeps_its_word_in_simulation(workspace: Path) -> None:
    planned = design(settings(workspace), 0.2, 0.06, power=0.8, looks=10)
    daily = planned.maximum // 10
    scenario = Scenario(rate=0.2, effect=0.06, stages=((0.5, 10),), users=daily, looks=1)
    row = simulate(settings(workspace), scenario, 1_500, 10, seed=3)
    assert row["sequential"].lower <= 0.8 + 0.02 and row["sequential"].upper >= 0.8 - 0.02
    assert abs(row["sample"] * planned.maximum / planned.expected - 1) < 0.06


def test_the_command_line(files: tuple[Path, Path], workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from calling_ai.cli import main

    def machine(*arguments: str) -> dict[str, Any]:
        assert main(["experiment", *arguments, "--json"]) == 0
        return json.loads(capfd.readouterr().out)

    judged = call("analyse", "--protocol", files[0], "--data", files[1], cwd=workspace)
    assert judged.returncode == 0 and judged.stdout.startswith("weight-0.3: promote hybrid") and not judged.stderr
    found = machine("analyse", "--protocol", str(files[0]), "--data", str(files[1]))
    assert found["verdict"] == "promote" and found["arms"][0]["guardrails"][0]["state"] == "kept"
    planned = machine("design", "--baseline", "0.1", "--effect", "0.1", "--daily", "2000", "--ramp", "0.1:5,0.5")
    assert planned["stages"][0] == 5 and planned["maximum"] > planned["fixed"] > planned["expected"]
    wrong = machine("simulate", "--runs", "300", "--baseline", "step")
    assert wrong["promoted"]["share"] < 0.1 < 0.4 < wrong["pooled"]["share"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["analyse", "--protocol", "nowhere.json"], 1, "protocol nowhere.json does not exist"),
        (["analyse", "--protocol", "users.csv"], 1, "users.csv"),
        (["analyse", "--protocol", "protocol.json"], 1, "'weight-0.3' has no exposures in the log"),
        (
            ["analyse", "--protocol", "protocol.json", "--data", "users.csv", "--as-of", "yesterday"],
            1,
            "as-of is 'yesterday'",
        ),
        (["design", "--baseline", "2", "--effect", "0.1"], 1, "proportion is 2"),
        (["simulate", "--ramp", "a:b"], 1, "ramp is 'a:b'"),
        (["simulate", "--runs", "5"], 2, "--runs"),
    ],
)
def test_a_wrong_command_is_one_line(
    arguments: list[str],
    code: int,
    message: str,
    files: tuple[Path, Path],
    workspace: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from calling_ai.cli import main

    if arguments[0] == "analyse":
        arguments = [str(workspace / item) if item.endswith((".json", ".csv")) else item for item in arguments]
    assert main(["experiment", *arguments]) == code
    error = capfd.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_the_notebook_runs_on_a_table_and_writes_its_record(
    files: tuple[Path, Path], workspace: Path, root: Path
) -> None:
    record = workspace / "record.json"
    harmful = workspace / "harm.csv"
    example_table(2, effect=-0.3).to_csv(harmful, index=False)
    source = root / "nbs" / "pipelines" / "experiment.ipynb"
    values = {"protocol": str(files[0]), "data": str(harmful), "record": str(record)}
    run_notebook(source, values, workspace / "executed.ipynb")
    found = json.loads(record.read_text())
    assert found["verdict"]["verdict"] == "roll back" and found["users"] == 12 * 1_600
    assert np.isfinite(found["verdict"]["fraction"])
