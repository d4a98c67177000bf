"""Trained again: the same weights bit by bit, or what is different, said item by item; and nothing is changed by it."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from calling_ai.cli import main
from calling_ai.core.errors import IntegrityError, NotFoundError
from calling_ai.core.files import sha256_file
from calling_ai.core.settings import Settings, settings
from calling_ai.operate import reproduce as module
from calling_ai.operate.commands import train_file
from calling_ai.operate.reproduce import Reproduced, reproduce
from calling_ai.registry.versions import Registry, VersionDraft
from calling_ai.world.hybrid import generate


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Settings:
    """Return a workspace with v1.0 trained by a command, and v1.1 the same with the notebook of the main job."""
    folder = tmp_path_factory.mktemp("reproduce")
    (folder / "nbs" / "pipelines").mkdir(parents=True)
    shutil.copy(root / "nbs" / "pipelines" / "train.ipynb", folder / "nbs" / "pipelines")
    generate("hybrid", 900, 5).to_csv(folder / "records.csv", index=False)
    workspace, registry = settings(folder), Registry(folder)
    train_file(workspace, "outcome", folder / "records.csv", epochs=2)
    known = registry.get("outcome", "v1.0-records")
    kept = folder / "var" / "runs" / "a-run" / "train-outcome.ipynb"
    kept.parent.mkdir(parents=True)
    notebook = json.loads((folder / "nbs" / "pipelines" / "train.ipynb").read_text(encoding="utf-8"))
    injected = {"cell_type": "code", "metadata": {"tags": ["injected-parameters"]}, "source": ["epochs = 2"]}
    notebook["cells"].insert(3, injected)
    kept.write_text(json.dumps(notebook), encoding="utf-8")
    draft = VersionDraft(
        "outcome",
        "records",
        registry.load_file(known),
        known.metrics,
        known.snapshot_digest,
        {"train-outcome": sha256_file(kept)},
        known.parameters | {"run_id": "a-run"},
    )
    registry.register([draft])
    return workspace


def items(found: Reproduced) -> dict[str, tuple[str, bool | None]]:
    return {item.name: (item.found, item.same) for item in found.items}


def test_the_same_bit_by_bit_and_nothing_is_registered(made: Settings) -> None:
    registry = Registry(made.root)
    before = registry.list(), registry.events()
    [found] = reproduce(made, "v1.1-records")
    told = items(found)
    assert found.is_same and found.largest == 0 and all(same for _, same in told.values())
    assert {"snapshot", "notebook as executed", "notebook today", "environment", "weights", "metrics"} < set(told)
    assert (registry.list(), registry.events()) == before
    print(f"weights {told['weights'][0]}, answers {told['answers'][0]}")


def test_a_notebook_that_changed_and_an_environment_that_differs_are_said(
    made: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(made.root, tmp_path / "place")
    source = folder / "nbs" / "pipelines" / "train.ipynb"
    source.write_text(
        source.read_text(encoding="utf-8").replace("fit(rows, model", "fit( rows, model"), encoding="utf-8"
    )
    monkeypatch.setattr(module, "environment", lambda: {"torch": "9.9"})
    [found] = reproduce(settings(folder), "v1.1-records")
    told = items(found)
    assert told["notebook today"] == ("has changed since", False) and told["notebook as executed"][1]
    assert not told["environment"][1] and "9.9 now" in told["environment"][0]
    assert found.is_same  # weights and metrics are the same all the same
    known = Registry(folder).get("outcome", "v1.1-records")
    kept = folder / "var" / "runs" / "a-run" / "train-outcome.ipynb"
    kept.write_text(kept.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert module._notebook(settings(folder), known)[0].same is False
    kept.unlink()
    assert [item.same for item in module._notebook(settings(folder), known)] == [None]


def test_other_weights_are_found(made: Settings) -> None:
    registry = Registry(made.root)
    known = registry.get("outcome", "v1.0-records")
    options = known.parameters["options"] | {"seed": 8}
    found = module._again(
        made, registry, dataclasses.replace(known, parameters=known.parameters | {"options": options})
    )
    told = items(found)
    assert not found.is_same and found.largest > 1e-4
    assert not told["weights"][1] and not told["metrics"][1] and not told["answers"][1]
    assert known.digest[:12] in told["weights"][0] and "registered" in told["metrics"][0]


def test_what_cannot_be_trained_again_says_why(made: Settings, tmp_path: Path) -> None:
    folder = shutil.copytree(made.root, tmp_path / "place")
    registry, workspace = Registry(folder), settings(folder)
    known = registry.get("outcome", "v1.0-records")
    file, digest = registry.load_file(known), known.snapshot_digest
    registry.register([VersionDraft("outcome", "bare", file)])
    registry.register([VersionDraft("outcome", "plain", file, snapshot_digest=digest)])
    registry.register([VersionDraft("outcome", "learned", file, parameters={"online": True}, parent="v1.0-records")])
    for version, why in (
        ("v2.0-bare", "names no snapshot"),
        ("v3.0-plain", "names no specification"),
        ("v4.0-learned", "reproduce that one"),
        ("v9.9-moon", "has no version v9.9-moon"),
    ):
        with pytest.raises(NotFoundError, match=why):
            reproduce(workspace, version, "outcome")
    snapshot = workspace.var / "snapshots" / f"{digest}.parquet"
    snapshot.chmod(0o644)
    data = bytearray(snapshot.read_bytes())
    data[len(data) // 2] ^= 1
    snapshot.write_bytes(data)
    with pytest.raises(IntegrityError):
        reproduce(workspace, "v1.0-records")
    snapshot.unlink()
    with pytest.raises(NotFoundError, match="is not there any more"):
        reproduce(workspace, "v1.0-records")


def test_the_command_ends_with_one_when_something_differs(
    made: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CALLING_AI_WORKSPACE", str(made.root))
    assert main(["versions", "reproduce", "v1.0-records"]) == 0
    assert "reproduced" in capsys.readouterr().out
    real = module.fit

    def another(*arguments: object, **options: object) -> object:
        options["options"] = dataclasses.replace(options["options"], seed=9)  # type: ignore[type-var]
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "fit", another)
    assert main(["versions", "reproduce", "v1.0-records", "--model", "outcome", "--json"]) == 1
    [told] = json.loads(capsys.readouterr().out)
    assert told["is_same"] is False and told["largest"] > 0
