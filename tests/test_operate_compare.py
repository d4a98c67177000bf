"""Two versions side by side: on decisions that neither has learned from, or not at all."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from calling_ai.cli import main
from calling_ai.core.contract import feature_table
from calling_ai.core.errors import IntegrityError
from calling_ai.core.settings import Settings, settings
from calling_ai.operate.commands import train_file
from calling_ai.operate.compare import held_out, newest_snapshot
from calling_ai.registry.versions import Registry, VersionDraft
from calling_ai.score.formula import formula
from calling_ai.store.snapshots import user_shares
from calling_ai.world.hybrid import generate


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Settings:
    """Return a workspace with two versions trained without the people of the test, and one that knows them."""
    folder = tmp_path_factory.mktemp("compare")
    shutil.copytree(root / "nbs" / "pipelines", folder / "nbs" / "pipelines")
    (folder / "settings.ini").write_text("[evaluation]\nreplicates = 60\n")
    records, workspace = generate("hybrid", 1_500, 5), settings(folder)
    people = [f"person {number % 300}" for number in range(len(records))]
    share = user_shares(people)
    part = np.where(share < 0.3, "test", np.where(share < 0.5, "validation", "train"))
    records = records.drop(columns=["user_id", "split"], errors="ignore").assign(user_key=people)
    records.to_parquet(folder / "everybody.parquet")
    records.assign(split=part).to_parquet(folder / "divided.parquet")
    for epochs in (1, 3):
        train_file(workspace, "outcome", folder / "divided.parquet", epochs=epochs, promote=epochs == 1)
    train_file(workspace, "outcome", folder / "everybody.parquet", epochs=1, promote=False)
    return workspace


def run(workspace: Settings, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setenv("CALLING_AI_WORKSPACE", str(workspace.root))
    return main(["versions", "compare", *map(str, arguments)])


def test_side_by_side(made: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(made, monkeypatch, "champion", "v1.1-divided", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["model"], told["first"], told["second"]) == ("outcome", "v1.0-divided", "v1.1-divided")
    assert told["people"] == len(held_out(newest_snapshot(made))) and told["verdict"] in (
        "better",
        "worse",
        "cannot tell",
    )
    for item in told["metrics"].values():
        assert item["challenger"]["value"] - item["champion"]["value"] == pytest.approx(item["difference"]["value"])
        assert item["difference"]["lower"] <= item["difference"]["value"] <= item["difference"]["upper"]
    assert set(told["importance"]) == {"v1.0-divided", "v1.1-divided"}
    page = made.reports / "versions" / "outcome-v1.0-divided-v1.1-divided.html"
    text = page.read_text(encoding="utf-8")
    assert text.count("<img") == 2 and "How calibrated" in text and "What they look at" in text
    assert len(text) < 2_000_000 and str(made.root) not in text


def test_the_formula_takes_part(
    made: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert run(made, monkeypatch, "formula", "v1.1-divided", "--report", page, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["first"], told["second"]) == ("formula", "v1.1-divided")
    assert page.is_file() and "formula" in page.read_text(encoding="utf-8")
    frame = pd.read_parquet(newest_snapshot(made))
    frame = frame[(frame["split"] == "test") & frame["outcome_score"].notna()]
    said = formula(feature_table(frame.reset_index(drop=True)).values[:, :45]).formula_score
    assert told["metrics"]["auc"]["champion"]["value"] == pytest.approx(
        roc_auc_score(frame["outcome_score"] >= 0.7, said)
    )


def test_who_knows_the_people_is_refused(
    made: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for pair in (("champion", "v2.0-everybody"), ("v2.0-everybody", "champion")):
        assert run(made, monkeypatch, *pair) == 1
        assert "was trained on" in capsys.readouterr().err
    registry = Registry(made.root)
    file = registry.load_file(registry.get("outcome"))
    registry.register([VersionDraft("outcome", "learned", file, parameters={"online": {}})])
    assert run(made, monkeypatch, "champion", "v3.0-learned") == 1
    assert "was learned online, from everybody" in capsys.readouterr().err


def test_wrong_names_and_tables_are_one_sentence(
    made: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = shutil.copy(
        next(path for path in (made.var / "snapshots").glob("*.parquet") if path != newest_snapshot(made)), tmp_path
    )
    for arguments, why in (
        (("champion", "v9.9-moon"), "has no version v9.9-moon"),
        (("champion", "v1.0-divided"), "name two versions"),
        (("champion", "v1.1-divided", "--snapshot", tmp_path / "none.parquet"), "none.parquet does not exist"),
        (("champion", "v1.1-divided", "--snapshot", bare), "has no column split"),
    ):
        assert run(made, monkeypatch, *arguments) in (1, 2)
        message = capsys.readouterr().err.strip()
        assert why in message and len(message.splitlines()) == 1, message


def test_a_damaged_model_file_is_refused(made: Settings, tmp_path: Path) -> None:
    from calling_ai.operate.compare import compare_versions

    folder = shutil.copytree(made.root, tmp_path / "place")
    registry = Registry(folder)
    path = registry.load_file(registry.get("outcome", "v1.1-divided"))
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError):
        compare_versions(settings(folder), "champion", "v1.1-divided")
