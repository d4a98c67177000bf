"""The main job end to end: real kernels, a real database, real files; and the same as a Prefect flow."""

import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pandas as pd
import pytest

COMMAND = Path(sys.executable).with_name("calling-ai")
SMALL = """
[town]
people = 300
weeks = 3
further_weeks = 1
[evaluation]
test_weeks = 1
replicates = 100
[training]
epochs = 4
"""


def environment(**more: str) -> dict[str, str]:
    """Return the environment without settings from outside."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("CALLING_AI_", "PREFECT_"))}
    return clean | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"} | more


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `calling-ai` in a folder."""
    return subprocess.run(
        [str(COMMAND), *arguments], cwd=folder, env=environment(), capture_output=True, text=True, timeout=600
    )


def make_workspace(folder: Path, root: Path) -> Path:
    """Return a small workspace."""
    (folder / "nbs").mkdir(parents=True)
    shutil.copytree(root / "nbs" / "pipelines", folder / "nbs" / "pipelines")
    shutil.copytree(root / "flows", folder / "flows")
    (folder / "settings.ini").write_text(SMALL)
    return folder


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory, root: Path) -> tuple[Path, dict, dict]:
    """Return a workspace in which the main job ran twice, and both results."""
    folder = make_workspace(tmp_path_factory.mktemp("job") / "workspace", root)
    results = []
    for _ in range(2):
        done = call(folder, "run", "--json")
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    return folder, results[0], results[1]


def test_versions_are_numbered_and_judged(lived: tuple[Path, dict, dict]) -> None:
    folder, first, second = lived
    assert set(first["versions"].values()) == {"v1.0-town"} and set(second["versions"].values()) == {"v1.1-town"}
    assert set(first["verdicts"].values()) == {"first"}
    assert set(second["verdicts"].values()) <= {"better", "worse", "cannot tell"}
    for model, word in second["verdicts"].items():
        difference = second["compared"][model]["difference"]
        assert difference["lower"] <= difference["value"] <= difference["upper"]
        excludes = difference["lower"] > 0 or difference["upper"] < 0
        assert excludes == (word != "cannot tell")
        assert second["champions"][model] == ("v1.1-town" if word == "better" else "v1.0-town")
    listed = json.loads(call(folder, "versions", "--json").stdout)
    assert [(item["model"], item["version"]) for item in listed if item["parent"]] == [
        (item["model"], "v1.1-town") for item in listed if item["parent"]
    ]
    assert len(listed) == 4 and all(item["snapshot_digest"] and item["notebook_digests"] for item in listed)


def test_snapshots_and_files_are_what_their_digest_says(lived: tuple[Path, dict, dict]) -> None:
    from calling_ai.core.files import sha256_file

    folder, first, _ = lived
    files = [*(folder / "var" / "models").glob("*.onnx"), *(folder / "var" / "snapshots").glob("*.parquet")]
    assert len(files) == 8  # two models, a snapshot and a truth, twice
    for file in files:
        assert sha256_file(file) == file.stem
    frame = pd.read_parquet(folder / "var" / "snapshots" / f"{first['prepared']['snapshot']['digest']}.parquet")
    assert not [name for name in frame.columns if name.startswith("truth_")]
    people = {part: set(frame.loc[frame["split"] == part, "user_key"]) for part in ("train", "validation", "test")}
    assert not people["train"] & people["test"] and not people["validation"] & people["test"]


def test_the_log_grows_by_what_is_new_and_knows_nobody_by_name(lived: tuple[Path, dict, dict]) -> None:
    from calling_ai.store.privacy import search

    folder, first, second = lived
    before, after = first["prepared"], second["prepared"]
    assert before["recorded"]["known"] == 0 and before["recorded"]["decisions"] == before["decisions"]
    assert after["recorded"]["known"] == before["decisions"]
    with sqlite3.connect(folder / "var" / "calling_ai.db") as connection:
        ((rows, distinct),) = connection.execute("SELECT count(*), count(DISTINCT id) FROM decisions")
    assert rows == distinct == after["decisions"] == after["snapshot"]["rows"]
    assert after["snapshot"]["counts"]["history_differs"] == 0, "the log and the town remember differently"
    found = search([folder / "var", folder / "reports"], [b"person-0001", b"person-0042"])
    assert found.files > 20 and found.total == 0, found.found


def test_reports_are_whole_and_offline(lived: tuple[Path, dict, dict]) -> None:
    folder, first, second = lived
    index = (folder / "reports" / "index.html").read_text()
    assert first["run_id"] in index and second["run_id"] in index and "v1.1-town" in index
    names = {path.stem for path in (folder / "reports" / second["run_id"]).glob("*.html")}
    assert names == {"prepare", "train-calling_score", "train-outcome", "evaluate", "compare"}
    for path in (folder / "reports").rglob("*.html"):
        text = path.read_text()
        assert path.stat().st_size < 2_000_000
        assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
        assert str(folder) not in text, path.name
        assert "Warning" not in text, path.name


def test_a_run_leaves_the_checkout_clean(lived: tuple[Path, dict, dict]) -> None:
    folder, _, _ = lived
    assert {path.name for path in folder.iterdir()} == {"nbs", "flows", "settings.ini", "var", "reports"}
    assert not list(folder.rglob("*.part"))


def test_a_person_sees_one_table(lived: tuple[Path, dict, dict]) -> None:
    from calling_ai.operate.pipeline import summary

    _, _, second = lived
    text = summary(second)
    assert text["columns"][1:] == ["formula", "network", "best possible"]
    assert all(re.search(r"\[-?[\d.]+, -?[\d.]+\]", row[2]) for row in text["rows"])
    assert any("v1.1-town" in line for line in text["notes"])


def test_a_failing_step_is_told_in_one_line_and_leaves_no_version(root: Path, tmp_path: Path) -> None:
    folder = make_workspace(tmp_path / "workspace", root)
    (folder / "settings.ini").write_text(SMALL.replace("test_weeks = 1", "test_weeks = 3"))
    done = call(folder, "run", "--quiet")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and "test_weeks is 3" in done.stderr and len(done.stderr.splitlines()) == 1
    assert json.loads(call(folder, "versions", "--json").stdout) == []
    assert "test_weeks is 3" in (folder / "reports" / "index.html").read_text()
    assert len(list((folder / "reports").glob("*/prepare.html"))) == 1


def test_ctrl_c_during_a_run(root: Path, tmp_path: Path) -> None:
    import psutil

    folder = make_workspace(tmp_path / "workspace", root)
    process = subprocess.Popen(
        [str(COMMAND), "run"], cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not any("ipykernel" in " ".join(child.cmdline()) for child in psutil.Process(process.pid).children(True)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in errors and "Ctrl-C" in errors
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert json.loads(call(folder, "versions", "--json").stdout) == []
    assert "interrupted" in (folder / "reports" / "index.html").read_text()


def test_a_model_that_has_a_champion_is_compared_though_the_other_has_none(root: Path, tmp_path: Path) -> None:
    folder = make_workspace(tmp_path / "workspace", root)
    assert call(folder, "generate", "--kind", "hybrid", "--rows", "1500", "--output", "var/records.csv").returncode == 0
    assert call(folder, "train", "--model", "calling_score", "--data", "var/records.csv").returncode == 0
    done = call(folder, "run", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["verdicts"]["outcome"] == "first" and set(result["compared"]) == {"calling_score"}
    assert result["verdicts"]["calling_score"] == result["compared"]["calling_score"]["verdict"] != "first"
    assert result["before"] == {"calling_score": "v1.0-records"}


def run_flow(folder: Path, home: Path, **more: str) -> None:
    """Run the flow once, as a person would."""
    done = subprocess.run(
        [sys.executable, "flows/retrain.py"],
        cwd=folder,
        env=environment(PREFECT_HOME=str(home), **more),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    listed = json.loads(call(folder, "versions", "--json").stdout)
    assert {item["version"] for item in listed} == {"v1.0-town"} and len(listed) == 2
    (record,) = (folder / "reports").glob("*/record.json")
    assert json.loads(record.read_text())["kind"] == "retrain"


def test_flow_without_a_server(root: Path, tmp_path: Path) -> None:
    run_flow(make_workspace(tmp_path / "workspace", root), tmp_path / "prefect")


def ask(url: str, body: dict | None = None) -> object:
    """Ask the API of a server."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        return json.load(answer)


def test_flow_with_a_server(root: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home, api = tmp_path / "prefect", f"http://127.0.0.1:{port}/api"
    quiet = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "PREFECT_HOME": str(home)}
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "prefect",
            "server",
            "start",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ],
        env=environment(**quiet),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for _ in range(120):
            try:
                ask(f"{api}/health")
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.5)
        run_flow(make_workspace(tmp_path / "workspace", root), home, PREFECT_API_URL=api)
        (flow,) = ask(f"{api}/flow_runs/filter", {})
        assert flow["state_type"] == "COMPLETED"
        steps = {"prepare", "train calling score", "train outcome", "evaluate", "compare", "register", "report"}
        tasks: dict[str, str] = {}
        for _ in range(60):  # task runs are recorded a little after they ended
            found = ask(f"{api}/task_runs/filter", {})
            tasks = {item["name"].rsplit("-", 1)[0]: item["state_type"] for item in found}
            if steps <= set(tasks) and set(tasks.values()) == {"COMPLETED"}:
                break
            time.sleep(0.5)
        assert steps <= set(tasks) and set(tasks.values()) == {"COMPLETED"}
        artifacts = {item["key"] for item in ask(f"{api}/artifacts/filter", {})}
        assert {"retrain-metrics", "retrain-verdict"} <= artifacts
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
