"""Model files: the same bytes everywhere, the same answers as the network, and no way in for anything else."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose

from calling_ai.core.contract import FEATURE_NAMES
from calling_ai.core.errors import CallingError, NotFoundError, RefusedError
from calling_ai.models.graph import (
    MAXIMUM_BYTES,
    contract_digest,
    export,
    inspect,
    model_bytes,
    trial_inputs,
    verify,
)
from calling_ai.models.networks import ContractNetwork, build, default_spec, fit_scaling, predict, set_calibration

torch.set_num_threads(1)


def network_of(model: str, members: int = 1) -> ContractNetwork:
    """Return a network with scaling and calibration, and one constant column."""
    network = build(default_spec(model, members=members), seed=5)
    sample = np.random.default_rng(5).beta(2, 2, (300, network.spec.features))
    sample[:, 31] = 0.8
    fit_scaling(network, torch.tensor(sample, dtype=torch.float32))
    set_calibration(network, 0.9, 0.1)
    return network


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, ContractNetwork]]:
    """Return exported files of all kinds with their networks."""
    folder = tmp_path_factory.mktemp("files")
    made = {"score": network_of("calling_score"), "outcome": network_of("outcome"), "members": network_of("outcome", 4)}
    for name, network in made.items():
        export(network, folder / f"{name}.onnx", {"source": "test"})
    return {name: (folder / f"{name}.onnx", network) for name, network in made.items()}


def run(path: Path, features: np.ndarray) -> np.ndarray:
    """Return what a fresh runtime answers."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: features.astype(np.float32)})[0]


@pytest.mark.parametrize("name", ["score", "outcome", "members"])
def test_file_and_network_agree_on_every_kind(name: str, files: dict[str, tuple[Path, ContractNetwork]]) -> None:
    path, network = files[name]
    agreement = verify(path, network, rows=300)
    assert agreement.largest <= 1e-5 and set(agreement.by_kind) == set(trial_inputs(39))
    for kind, inputs in trial_inputs(network.spec.features, rows=200, seed=9).items():
        answers = run(path, inputs)
        assert answers.shape == (len(inputs),) and answers.dtype == np.float32
        assert np.isfinite(answers).all() and ((answers >= 0) & (answers <= 1)).all()
        assert_allclose(answers, predict(network, inputs), atol=1e-5, err_msg=kind)


@settings(max_examples=40)
@given(data=st.data())
def test_any_numbers_at_all(files: dict[str, tuple[Path, ContractNetwork]], data: st.DataObject) -> None:
    path, network = files["members"]
    value = st.floats(allow_nan=True, allow_infinity=True, width=32)
    inputs = data.draw(hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.just(45)), elements=value))
    answers = run(path, inputs)
    assert np.isfinite(answers).all()
    assert_allclose(answers, predict(network, inputs), atol=1e-5)


def test_bytes_are_the_same_in_other_processes_and_folders(
    files: dict[str, tuple[Path, ContractNetwork]], tmp_path: Path
) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_models_graph import network_of, export\n"
        "print(export(network_of('outcome'), 'here.onnx', {'source': 'test'}))"
    )
    digests = {inspect(files["outcome"][0]).digest}
    for index in (1, 2):
        folder = tmp_path / f"folder {index}" / "of its own"
        folder.mkdir(parents=True)
        environment = os.environ | {"PYTHONHASHSEED": str(index)}
        here = str(Path(__file__).parent)
        done = subprocess.run(
            [sys.executable, "-c", program, here],
            capture_output=True,
            text=True,
            cwd=folder,
            env=environment,
            check=True,
        )
        assert done.stderr == "" and len(done.stdout.split()) == 1  # the exporter is quiet
        digests.add(done.stdout.strip())
        assert [file.name for file in folder.iterdir()] == ["here.onnx"]
    assert len(digests) == 1


def test_the_file_tells_nothing_about_the_machine(files: dict[str, tuple[Path, ContractNetwork]]) -> None:
    path, _ = files["outcome"]
    data, model = path.read_bytes(), onnx.load(path)
    for secret in (str(Path(__file__).parent.parent), sys.prefix, "networks.py", "torch"):
        assert secret.encode() not in data
    assert not model.graph.value_info and not model.doc_string and not model.producer_version
    metadata = {item.key: item.value for item in model.metadata_props}
    assert metadata["features"].split(",") == list(FEATURE_NAMES)
    assert (metadata["model"], metadata["source"], metadata["contract"]) == ("outcome", "test", contract_digest(45))
    assert len(data) < 200_000


def test_export_is_quiet(capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    model_bytes(network_of("calling_score"))
    assert capfd.readouterr() == ("", "")
    assert not list(recwarn)


def sabotage_domain(model: onnx.ModelProto) -> None:
    """Let a node come from a foreign set of operators."""
    model.graph.node[0].domain = "evil"


def sabotage_external(model: onnx.ModelProto) -> None:
    """Let a weight lie in another file."""
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def sabotage_nan(model: onnx.ModelProto) -> None:
    """Put a value that is no number into a weight."""
    tensor = model.graph.initializer[0]
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[3] = math.nan
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def sabotage_bomb(model: onnx.ModelProto) -> None:
    """Claim a weight that would need a lot of memory."""
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend([1 << 20, 1 << 20])


def sabotage_width(model: onnx.ModelProto) -> None:
    """Claim another number of features."""
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 44


def sabotage_batch(model: onnx.ModelProto) -> None:
    """Accept only one row at a time."""
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def sabotage_function(model: onnx.ModelProto) -> None:
    """Bring a function along."""
    model.functions.add(name="mine", domain="mine")


def sabotage_note(model: onnx.ModelProto) -> None:
    """Leave a note of the exporter on a node."""
    model.graph.node[0].metadata_props.add(key="stack", value="networks.py, line 131")


SABOTAGE: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "operator": (lambda m: m.graph.node.append(onnx.helper.make_node("Loop", ["a"], ["b"])), "uses Loop"),
    "domain": (sabotage_domain, "uses evil.Cast"),
    "function": (sabotage_function, "functions of its own"),
    "opset": (lambda m: setattr(m.opset_import[0], "version", 17), "must be opset 18 alone"),
    "second opset": (lambda m: m.opset_import.add(domain="evil", version=1), "must be opset 18 alone"),
    "external": (sabotage_external, "lies outside of the file"),
    "weight": (sabotage_nan, "values that are not finite"),
    "bomb": (sabotage_bomb, "has shape \\[1048576, 1048576\\]"),
    "input": (lambda m: setattr(m.graph.input[0], "name", "x"), "there must be one, named features"),
    "two inputs": (lambda m: m.graph.input.add(name="more"), "there must be one, named features"),
    "output": (lambda m: setattr(m.graph.output[0], "name", "y"), "there must be one of network_score"),
    "width": (sabotage_width, "has shape \\[None, 44\\]"),
    "batch": (sabotage_batch, "has shape \\[1, 45\\]"),
    "type": (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 11), "is not float32"),
    "note": (sabotage_note, "notes of the exporter"),
    "dangling": (lambda m: m.graph.node.pop(3), "not valid ONNX"),
    "no metadata": (lambda m: m.ClearField("metadata_props"), "metadata names the model None"),
    "contract": (lambda m: setattr(m.metadata_props[0], "value", "0" * 64), "made for another contract"),
}


@pytest.mark.parametrize("kind", SABOTAGE)
def test_sabotaged_files_are_refused(kind: str, files: dict[str, tuple[Path, ContractNetwork]], tmp_path: Path) -> None:
    spoil, message = SABOTAGE[kind]
    path, network = files["outcome"]
    model = onnx.load(path)
    spoil(model)
    spoiled = tmp_path / "spoiled.onnx"
    spoiled.write_bytes(model.SerializeToString())
    for look in (inspect, lambda file: verify(file, network)):
        with pytest.raises(RefusedError, match=message):
            look(spoiled)


@pytest.mark.parametrize("keep", [0, 1, 100, 5_000, -1])
def test_truncated_files_are_refused(keep: int, files: dict[str, tuple[Path, ContractNetwork]], tmp_path: Path) -> None:
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(files["score"][0].read_bytes()[:keep])
    with pytest.raises(RefusedError, match="cut.onnx is refused"):
        verify(cut, files["score"][1])


@settings(max_examples=60)
@given(st.data())
def test_flipped_bytes_are_refused_or_harmless(
    files: dict[str, tuple[Path, ContractNetwork]], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever happens to a byte, the answer is a refusal or a file that still agrees, never another exception."""
    path, network = files["score"]
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    spoiled = tmp_path_factory.mktemp("flip") / "file.onnx"
    spoiled.write_bytes(content)
    try:
        agreement = verify(spoiled, network, rows=20)
    except CallingError as error:
        assert isinstance(error, RefusedError)
    else:
        assert agreement.largest <= 1e-5


def test_other_weights_do_not_agree(files: dict[str, tuple[Path, ContractNetwork]], tmp_path: Path) -> None:
    path, network = files["outcome"]
    model = onnx.load(path)
    tensor = next(item for item in model.graph.initializer if list(item.dims) == [32, 1])
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name))
    (tmp_path / "other.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(RefusedError, match="differs from its network by .* on inputs of the kind 'random'"):
        verify(tmp_path / "other.onnx", network)
    with pytest.raises(RefusedError, match="the network a calling_score of 39"):
        verify(path, files["score"][1])


def test_a_leak_of_missing_values_is_found(files: dict[str, tuple[Path, ContractNetwork]], tmp_path: Path) -> None:
    """A graph that forgot the neutral values gives NaN for missing ones, and is refused for that."""
    path, network = files["outcome"]
    model = onnx.load(path)
    fill = next(node for node in model.graph.node if node.op_type == "Where")
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == fill.output[0]:
                node.input[index] = fill.input[2]  # the features as they came
    (tmp_path / "leak.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(RefusedError, match="kind 'missing' give an answer that is not a number"):
        verify(tmp_path / "leak.onnx", network)


def test_given_rows_are_compared_too(files: dict[str, tuple[Path, ContractNetwork]]) -> None:
    path, network = files["score"]
    agreement = verify(path, network, np.full((7, 39), np.nan), rows=10)
    assert agreement.rows == sum(len(rows) for rows in trial_inputs(39, rows=10).values()) + 7
    assert "given" in agreement.by_kind


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_ill_networks_are_not_exported(value: float, tmp_path: Path) -> None:
    network = network_of("calling_score")
    with torch.no_grad():
        network.weights[0][2, 3] = value
    with pytest.raises(RefusedError, match=r"not finite, in weights.0"):
        export(network, tmp_path / "ill.onnx")
    assert not list(tmp_path.iterdir())


def test_large_and_absent_files(tmp_path: Path) -> None:
    with (tmp_path / "large.onnx").open("wb") as stream:
        stream.truncate(MAXIMUM_BYTES)
    with pytest.raises(RefusedError, match="10,000,000 are the limit"):
        inspect(tmp_path / "large.onnx")
    with pytest.raises(NotFoundError, match=r"absent.onnx does not exist"):
        inspect(tmp_path / "absent.onnx")


def test_exported_in_training_mode_without_dropout() -> None:
    network = network_of("calling_score").train()
    assert model_bytes(network) == model_bytes(network.eval())
    assert not network.training
