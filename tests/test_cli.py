"""The command line as a person meets it: real processes, real files, wrong input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from calling_ai.core.contract import FEATURE_NAMES

COMMAND = Path(sys.executable).with_name("calling-ai")


def call(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `calling-ai` in a folder and return what it printed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CALLING_AI_")}
    return subprocess.run(
        [str(COMMAND), *map(str, arguments)],
        cwd=cwd,
        env=clean | {"COLUMNS": "120", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def one_line(result: subprocess.CompletedProcess[str], code: int) -> str:
    """Assert that a call failed with one line and no stack trace; return the line."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace with 1,500 generated records and a model trained on them."""
    folder = tmp_path_factory.mktemp("cli")
    made = call("generate", "--kind", "hybrid", "--rows", 1500, "--seed", 3, "--output", "records.csv.gz", cwd=folder)
    assert made.returncode == 0, made.stderr
    trained = call("train", "--model", "calling_score", "--data", "records.csv.gz", "--epochs", 3, cwd=folder)
    assert trained.returncode == 0, trained.stderr
    assert re.search(r"\bv1\.0-records\b", trained.stdout)
    return folder


def test_help_names_every_command(tmp_path: Path) -> None:
    shown = call("--help", cwd=tmp_path)
    assert shown.returncode == 0
    for command in ("run", "train", "score", "generate", "versions", "doctor"):
        assert command in shown.stdout
        assert call(command, "--help", cwd=tmp_path).returncode == 0
    assert list(tmp_path.iterdir()) == []  # asking for help leaves nothing behind


def test_help_is_quick_and_light() -> None:
    code = (
        "import sys, calling_ai.cli\n"
        "heavy = {'torch', 'pandas', 'prefect', 'scipy', 'sklearn', 'matplotlib', 'sqlalchemy', 'onnxruntime'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("kind", ["hybrid", "synthetic", "town"])
def test_generate_makes_the_rows_asked_for_and_repeats(kind: str, tmp_path: Path) -> None:
    for name in ("one.csv.gz", "two.csv.gz"):
        assert (
            call("generate", "--kind", kind, "--rows", 700, "--seed", 9, "--output", name, cwd=tmp_path).returncode == 0
        )
    assert (tmp_path / "one.csv.gz").read_bytes() == (tmp_path / "two.csv.gz").read_bytes()
    assert len(pd.read_csv(tmp_path / "one.csv.gz")) == 700


def test_score_writes_every_row_in_order(folder: Path) -> None:
    scored = call("score", "--input", "records.csv.gz", "--output", "scores.csv", cwd=folder)
    assert scored.returncode == 0 and scored.stdout == ""
    records, scores = pd.read_csv(folder / "records.csv.gz"), pd.read_csv(folder / "scores.csv")
    assert len(scores) == len(records)
    columns = ["formula_score", "network_score", "outcome_probability", "calling_score", "called", "path"]
    assert set(columns) <= set(scores.columns)
    np.testing.assert_array_equal(scores["record_id"], records["record_id"])
    assert scores["formula_score"].between(0, 1).all() and scores["network_score"].between(0, 1).all()
    assert scores["outcome_probability"].isna().all()  # no outcome model is registered
    order = np.random.default_rng(0).permutation(len(records))
    records.iloc[order].to_parquet(folder / "shuffled.parquet", index=False)
    assert call("score", "--input", "shuffled.parquet", "--output", "shuffled.csv", cwd=folder).returncode == 0
    shuffled = pd.read_csv(folder / "shuffled.csv")
    np.testing.assert_allclose(shuffled["network_score"], scores["network_score"].to_numpy()[order], atol=1e-6)


def test_score_without_any_model_is_the_formula(folder: Path, tmp_path: Path) -> None:
    scored = call("score", "--input", folder / "records.csv.gz", "--output", "scores.csv", cwd=tmp_path)
    assert scored.returncode == 0
    scores = pd.read_csv(tmp_path / "scores.csv")
    np.testing.assert_allclose(scores["calling_score"], scores["formula_score"])
    assert scores["path"].str.startswith("formula").all() and scores["network_score"].isna().all()


def test_versions_and_machines(folder: Path, tmp_path: Path) -> None:
    listed = json.loads(call("versions", "--json", cwd=folder).stdout)
    assert [item["version"] for item in listed] == ["v1.0-records"]
    assert listed[0]["metrics"]["mean_squared_error"]["lower"] < listed[0]["metrics"]["mean_squared_error"]["upper"]
    nothing = call("versions", cwd=tmp_path)
    assert nothing.returncode == 0 and "calling-ai run" in nothing.stderr


def test_wrong_usage_ends_with_two(folder: Path) -> None:
    one_line(call("scroe", cwd=folder), 2)
    one_line(call("train", "--model", "magic", "--data", "records.csv.gz", cwd=folder), 2)
    one_line(call("train", "--model", "outcome", cwd=folder), 2)
    one_line(call("generate", "--kind", "town", "--rows", "0", "--output", "x.csv", cwd=folder), 2)


def test_wrong_files_are_named(folder: Path, tmp_path: Path) -> None:
    def attempt(name: str) -> str:
        return one_line(call("score", "--input", tmp_path / name, "--output", tmp_path / "out.csv", cwd=folder), 1)

    assert "missing.csv does not exist" in attempt("missing.csv")
    assert "must end with" in attempt("table.xlsx")
    (tmp_path / "empty.csv").write_text("")
    assert "empty.csv is empty" in attempt("empty.csv")
    (tmp_path / "rowless.csv").write_text(",".join(FEATURE_NAMES) + "\n")
    assert "holds no rows" in attempt("rowless.csv")
    (tmp_path / "column.csv").write_text("user_overal_energy\n0.5\n")
    assert "did you mean user_overall_energy" in attempt("column.csv")
    (tmp_path / "text.csv").write_text("user_overall_energy\n0.5\nhigh\n")
    assert "row 1, column user_overall_energy: 'high'" in attempt("text.csv")
    (tmp_path / "infinite.csv").write_text("user_overall_energy\n0.5\n0.1\ninf\n")
    assert "row 2, column user_overall_energy: inf is not finite" in attempt("infinite.csv")
    (tmp_path / "range.csv").write_text("user_overall_energy\n1.5\n")
    assert "1.5 is outside [0, 1]" in attempt("range.csv")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and nothing more")
    assert "cut.parquet cannot be read as parquet" in attempt("cut.parquet")
    assert not (tmp_path / "out.csv").exists()


def test_training_needs_outcomes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "blind.csv").write_text("user_overall_energy\n0.5\n")
    assert "outcome_score" in one_line(
        call("train", "--model", "outcome", "--data", tmp_path / "blind.csv", cwd=folder), 1
    )


def test_unknown_version_and_setting_are_named(folder: Path) -> None:
    line = one_line(
        call("score", "--input", "records.csv.gz", "--output", "x.csv", "--version", "v9.9-moon", cwd=folder), 1
    )
    assert "v9.9-moon" in line and "v1.0-records" in line
    assert "weigth" in one_line(call("versions", cwd=folder, CALLING_AI_POLICY__WEIGTH="0.2"), 1)
    assert "must lie in [0, 0.5]" in one_line(call("versions", cwd=folder, CALLING_AI_POLICY__WEIGHT="0.9"), 1)


def test_a_tampered_model_file_falls_back_and_says_so(folder: Path, tmp_path: Path) -> None:
    from shutil import copytree

    copy = tmp_path / "copy"
    copytree(folder, copy)
    (model,) = (copy / "var" / "models").glob("*.onnx")
    (release,) = (copy / "var" / "releases").glob("*.onnx")  # scoring needs no more than this one
    for file in (model, release):
        file.chmod(0o644)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    scored = call("score", "--input", "records.csv.gz", "--output", "after.csv", cwd=copy)
    assert scored.returncode == 0
    scores = pd.read_csv(copy / "after.csv")
    assert scores["path"].str.startswith("formula").all() and scores["network_score"].isna().all()
    assert call("doctor", cwd=copy).returncode == 1


def test_full_disk_leaves_no_half_version(folder: Path, tmp_path: Path) -> None:
    code = (
        "import resource, sys, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from calling_ai.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["train", "--model", "calling_score", "--data", str(folder / "records.csv.gz"), "--epochs", "2"]
    result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert "file size" in one_line(result, 1) or "full" in result.stderr
    assert json.loads(call("versions", "--json", cwd=tmp_path).stdout) == []
    assert not list((tmp_path / "var").rglob("*.onnx"))


def test_ctrl_c_during_training_is_clean(folder: Path, tmp_path: Path) -> None:
    records = pd.read_csv(folder / "records.csv.gz")
    pd.concat([records] * 60).to_parquet(tmp_path / "many.parquet", index=False)
    told = tmp_path / "progress.jsonl"
    process = subprocess.Popen(
        [str(COMMAND), "train", "--model", "calling_score", "--data", "many.parquet"],
        cwd=tmp_path,
        env={**os.environ, "CALLING_AI_PROGRESS": str(told), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not told.exists() or "training" not in told.read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and "Ctrl-C" in errors
    assert json.loads(call("versions", "--json", cwd=tmp_path).stdout) == []
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("*.onnx"))


def test_doctor_finds_and_removes_leftovers(folder: Path) -> None:
    assert call("doctor", cwd=folder).returncode == 0
    orphan = folder / "var" / "models" / ("0" * 64 + ".onnx")
    orphan.write_bytes(b"left behind by a crash")
    long_ago = time.time() - 7200
    os.utime(orphan, (long_ago, long_ago))
    assert call("doctor", cwd=folder).returncode == 1
    assert call("doctor", "--fix", cwd=folder).returncode == 0
    assert not orphan.exists()


def test_reference_bar(shared: Path, tmp_path: Path) -> None:
    """Train both models on the shared records; people of a fresh generation are records that nobody has seen."""
    data = shared / "data" / "hybrid_v1.csv.gz"
    for model in ("calling_score", "outcome"):
        trained = call("train", "--model", model, "--data", data, cwd=tmp_path)
        assert trained.returncode == 0, trained.stderr
    arguments = ["--kind", "hybrid", "--rows", "4000", "--seed", "77", "--output", "unseen.csv.gz"]
    assert call("generate", *arguments, cwd=tmp_path).returncode == 0
    assert call("score", "--input", "unseen.csv.gz", "--output", "scores.csv", cwd=tmp_path).returncode == 0
    records, scores = pd.read_csv(tmp_path / "unseen.csv.gz"), pd.read_csv(tmp_path / "scores.csv")
    error = ((records["outcome_score"] - scores["network_score"]) ** 2).mean()
    assert error <= 0.0240, error
    surprise = -np.log(
        np.where(records["outcome_score"] >= 0.7, scores["outcome_probability"], 1 - scores["outcome_probability"])
    )
    share = (records["outcome_score"] >= 0.7).mean()
    assert surprise.mean() < -(share * np.log(share) + (1 - share) * np.log(1 - share))  # better than knowing the share
    assert (scores["path"] == "network").all()
