"""What is not what was trained never becomes a version: a fresh process reads the file and must answer alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calling_ai.core.errors import RefusedError
from calling_ai.models import networks
from calling_ai.models.graph import export
from calling_ai.models.networks import build, default_spec
from calling_ai.operate.candidates import GOLDEN, answer_afresh, check_golden, golden_moments, predict
from calling_ai.registry.versions import Registry, VersionDraft

MODEL = "calling_score"


def made(folder: Path, model: str = MODEL, seed: int = 1) -> tuple[Path, dict[str, Any]]:
    """Export a network with random weights, and return its file and the moments to check it with."""
    network = build(default_spec(model), seed=seed)
    file = folder / f"{model}-{seed}.onnx"
    export(network, file)
    width = default_spec(model).features
    moments = golden_moments(np.random.default_rng(seed).random((500, width)))
    kept = np.where(np.isnan(moments), -1, moments)
    return file, {"model": model, "features": kept.tolist(), "answers": networks.predict(network, moments).tolist()}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return a sound export."""
    return made(tmp_path_factory.mktemp("good"))


def weights(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[onnx.ModelProto], None]:
    """Return a sabotage of all weights."""

    def work(model: onnx.ModelProto) -> None:
        for item in model.graph.initializer:
            array = numpy_helper.to_array(item)
            if array.ndim == 2 and array.dtype.kind == "f":
                item.CopyFrom(numpy_helper.from_array(change(array).astype(array.dtype), item.name))

    return work


def renamed(where: str, name: str) -> Callable[[onnx.ModelProto], None]:
    """Return a sabotage of the name of the input or the output."""

    def work(model: onnx.ModelProto) -> None:
        item = getattr(model.graph, where)[0]
        for node in model.graph.node:
            for names in (node.input, node.output):
                for place, found in enumerate(names):
                    if found == item.name:
                        names[place] = name
        item.name = name

    return work


def opset(number: int) -> Callable[[onnx.ModelProto], None]:
    """Return a sabotage of the version of the operators."""

    def work(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = number

    return work


def width(number: int) -> Callable[[onnx.ModelProto], None]:
    """Return a sabotage of the number of features."""

    def work(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = number

    return work


def kind(number: int) -> Callable[[onnx.ModelProto], None]:
    """Return a sabotage of the type of the input."""

    def work(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.elem_type = number

    return work


def outside(model: onnx.ModelProto) -> None:
    """Move a weight into another file."""
    item = model.graph.initializer[0]
    item.ClearField("raw_data")
    item.data_location = onnx.TensorProto.EXTERNAL
    entry = item.external_data.add()
    entry.key, entry.value = "location", "weights.bin"


def foreign(model: onnx.ModelProto) -> None:
    """Use an operator that nobody knows."""
    model.graph.node[-1].domain = "somewhere.else"
    model.opset_import.append(onnx.helper.make_opsetid("somewhere.else", 1))


def without_nodes(model: onnx.ModelProto) -> None:
    """Leave out the last operator."""
    del model.graph.node[-1]


def first_layer(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[onnx.ModelProto], None]:
    """Return a sabotage of the largest weight."""

    def work(model: onnx.ModelProto) -> None:
        found = [item for item in model.graph.initializer if numpy_helper.to_array(item).ndim == 2]
        item = max(found, key=lambda item: numpy_helper.to_array(item).size)
        item.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(item)).copy(), item.name))

    return work


SABOTAGE: dict[str, Callable[[onnx.ModelProto], None]] = {
    "no weights": weights(np.zeros_like),
    "weights that are no numbers": weights(lambda array: np.full_like(array, np.nan)),
    "weights without end": weights(lambda array: np.full_like(array, np.inf)),
    "weights a little larger": weights(lambda array: array * 1.01),
    "weights of the other sign": weights(np.negative),
    "one column turned round": first_layer(lambda array: array[:, ::-1]),
    "one unit changed": first_layer(lambda array: array + (np.arange(array.shape[1]) == 7).astype(array.dtype)),
    "weights rounded to halves": weights(lambda array: array.astype(np.float16)),
    "another name of the input": renamed("input", "inputs"),
    "another name of the output": renamed("output", "score"),
    "the other model's output": renamed("output", "outcome_probability"),
    "one feature less": width(38),
    "one feature more": width(40),
    "integers go in": kind(onnx.TensorProto.INT64),
    "doubles go in": kind(onnx.TensorProto.DOUBLE),
    "an older opset": opset(17),
    "an opset of the future": opset(99),
    "weights in another file": outside,
    "an operator that nobody knows": foreign,
    "the last operator left out": without_nodes,
}


def refused(workspace: Path, file: Path, golden: dict[str, Any]) -> str:
    """Try to register a file, and return why it was refused; no version is there afterwards."""
    registry = Registry(workspace)
    draft = VersionDraft(MODEL, "town", file)
    with pytest.raises(RefusedError) as told:
        registry.register([draft], {MODEL: "champion"}, check=lambda _, path: check_golden(path, golden))
    assert registry.list() == [] and registry.events() == ()
    return str(told.value)


def test_a_sound_export_becomes_a_version(good: tuple[Path, dict[str, Any]], workspace: Path) -> None:
    file, golden = good
    assert len(golden["answers"]) == GOLDEN >= 100
    [version] = Registry(workspace).register(
        [VersionDraft(MODEL, "town", file)], check=lambda _, path: check_golden(path, golden)
    )
    assert version.version == "v1.0-town"
    rows = np.random.default_rng(3).random((7, 39), dtype=np.float32)
    np.testing.assert_array_equal(answer_afresh(file, MODEL, rows), predict(file, MODEL, rows))


@pytest.mark.parametrize("name", SABOTAGE)
def test_b4_a_sabotaged_export_is_refused(
    name: str, good: tuple[Path, dict[str, Any]], workspace: Path, tmp_path: Path
) -> None:
    file, golden = good
    model = onnx.load(file)
    SABOTAGE[name](model)
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(model.SerializeToString())
    assert bad.read_bytes() != file.read_bytes()
    assert ".onnx" in refused(workspace, bad, golden)


def test_a_file_that_is_another_one_is_refused(
    good: tuple[Path, dict[str, Any]], workspace: Path, tmp_path: Path
) -> None:
    file, golden = good
    data = file.read_bytes()
    retried, _ = made(tmp_path, seed=2)  # an export that was made again after its answers were written down
    assert "differs by" in refused(workspace, retried, golden)
    other, _ = made(tmp_path, "outcome")
    refused(workspace, other, golden)
    for name, content in (
        ("cut", data[: len(data) // 2]),
        ("empty", b""),
        ("text", b"not a model"),
        ("zeros", bytes(5000)),
    ):
        (tmp_path / name).write_bytes(content)
        refused(workspace, tmp_path / name, golden)
    assert "at least 100 are needed" in refused(
        workspace, file, golden | {"features": golden["features"][:16], "answers": golden["answers"][:16]}
    )
    assert "differs by nan" in refused(workspace, file, golden | {"answers": [float("nan")] * GOLDEN})
    kept = tmp_path / ("0" * 64 + ".onnx")
    kept.write_bytes(data)
    with pytest.raises(RefusedError, match="it is not the file that its name says"):
        check_golden(kept, golden)
    with pytest.raises(RefusedError, match="cannot be served"):
        check_golden(tmp_path / "gone.onnx", golden)
