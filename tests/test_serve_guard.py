"""The guard: what our models look like passes, everything hostile is refused without being opened."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from calling_ai.core.errors import CallingError, IntegrityError, RefusedError
from calling_ai.serve.guard import LARGEST, OPERATORS, inspect_model


def build(
    operator="Sigmoid",
    output="network_score",
    width=39,
    opset=18,
    kind=TensorProto.FLOAT,
    nodes=None,
    weights=None,
    **options,
):
    weights = np.full((width, 1), 1 / width, "float32") if weights is None else weights
    nodes = nodes or [
        helper.make_node("MatMul", ["features", "weights"], ["sum"]),
        helper.make_node(operator, ["sum"], [output]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("features", kind, ["batch", width])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", 1])],
        [numpy_helper.from_array(weights, "weights")],
    )
    return helper.make_model(
        graph, opset_imports=options.pop("opsets", [helper.make_opsetid("", opset)]), ir_version=10, **options
    )


def constant(**attribute):
    return helper.make_node("Constant", [], ["weights2"], **attribute)


def external(tensor, location="../../../etc/passwd"):
    onnx.external_data_helper.set_external_data(tensor, location)
    return tensor


def with_subgraph():
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "b",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    return build(nodes=[helper.make_node("Identity", ["features"], ["network_score"], hidden=branch)])


def with_function():
    model = build()
    model.functions.append(
        helper.make_function(
            "f", "F", ["x"], ["y"], [helper.make_node("Identity", ["x"], ["y"])], [helper.make_opsetid("", 18)]
        )
    )
    return model


def hidden_external():
    tensor = external(numpy_helper.from_array(np.zeros(1, "float32"), "t"))
    return build(
        nodes=[
            helper.make_node("Constant", [], ["c"], value=tensor),
            helper.make_node("Add", ["features", "c"], ["network_score"]),
        ]
    )


def location_only():
    model = build()
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL
    return model


def sparse():
    model = build()
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(
            numpy_helper.from_array(np.ones(1, "float32"), "s"), numpy_helper.from_array(np.zeros(1, "int64"), "i"), [4]
        )
    )
    return model


def two_outputs():
    model = build()
    model.graph.output.append(helper.make_tensor_value_info("sum", TensorProto.FLOAT, ["batch", 1]))
    return model


HOSTILE = {
    "external weights": (
        lambda: (lambda model: (external(model.graph.initializer[0]), model)[1])(build()),
        "self-contained",
    ),
    "external by location alone": (location_only, "self-contained"),
    "external in a constant": (hidden_external, "self-contained"),
    "subgraph in an attribute": (with_subgraph, "graph or sparse tensor inside of Identity"),
    "control flow": (lambda: build(nodes=[helper.make_node("Loop", ["features"], ["network_score"])]), "operator Loop"),
    "function": (with_function, "functions or training code"),
    "sparse weights": (sparse, "sparse weights"),
    "other domain": (
        lambda: build(nodes=[helper.make_node("Gemm", ["features"], ["network_score"], domain="com.microsoft")]),
        r"com\.microsoft\.Gemm",
    ),
    "other domain imported": (
        lambda: build(opsets=[helper.make_opsetid("", 18), helper.make_opsetid("evil", 1)]),
        "operator sets",
    ),
    "old opset": (lambda: build(opset=13), "it must be opset 18"),
    "new opset": (lambda: build(opset=21), "it must be opset 18"),
    "two opsets": (
        lambda: build(opsets=[helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx", 17)]),
        "operator sets",
    ),
    "unknown operator": (lambda: build(operator="Teleport"), "operator Teleport"),
    "bomb": (
        lambda: build(nodes=[helper.make_node("Expand", ["features", "weights"], ["network_score"])]),
        "operator Expand",
    ),
    "file reader": (
        lambda: build(nodes=[helper.make_node("ImageDecoder", ["features"], ["network_score"])]),
        "operator ImageDecoder",
    ),
    "another output": (lambda: build(output="score"), "it must have one"),
    "two outputs": (two_outputs, "it must have one"),
    "another width": (lambda: build(width=40), "batch x 39 or batch x 45"),
    "another type": (lambda: build(kind=TensorProto.DOUBLE), "float32"),
    "too large": (lambda: build(weights=np.zeros((2_600_000, 1), "float32")), f"at most {LARGEST:,}"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_with_the_reason(name):
    make, message = HOSTILE[name]
    with pytest.raises(RefusedError, match=message):
        inspect_model(make().SerializeToString())


@pytest.mark.parametrize(
    ("output", "width", "model"),
    [
        ("network_score", 39, "calling_score"),
        ("network_score", 45, "calling_score"),
        ("outcome_probability", 45, "outcome"),
    ],
)
def test_facts_agree_with_onnx(output, width, model):
    made = build(output=output, width=width)
    facts = inspect_model(made.SerializeToString())
    assert (facts.model, facts.features, facts.opset) == (model, width, made.opset_import[0].version)
    assert facts.operators == tuple(sorted({node.op_type for node in made.graph.node}))
    other = {"calling_score": "outcome", "outcome": "calling_score"}[model]
    with pytest.raises(RefusedError, match="it must have one"):
        inspect_model(made.SerializeToString(), other)


def test_initializer_that_is_also_an_input_is_a_default():
    made = build()
    made.graph.input.append(helper.make_tensor_value_info("weights", TensorProto.FLOAT, [39, 1]))
    assert inspect_model(made.SerializeToString()).features == 39


@pytest.mark.parametrize(
    ("model", "features", "hidden", "members"),
    [("calling_score", 39, (128, 64), 1), ("outcome", 45, (128, 64, 32), 1), ("calling_score", 45, (16, 8), 3)],
)
def test_our_own_exports_pass(tmp_path, model, features, hidden, members):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    from calling_ai.models.graph import MAXIMUM_BYTES, export, inspect
    from calling_ai.models.graph import OPERATORS as exported
    from calling_ai.models.networks import NetworkSpec, predict
    from calling_ai.models.networks import build as build_network
    from calling_ai.serve.scorer import Scorer

    network = build_network(NetworkSpec(model, features, hidden, members=members), 0)
    export(network, tmp_path / "x.onnx")
    facts, told = inspect_model((tmp_path / "x.onnx").read_bytes()), inspect(tmp_path / "x.onnx")
    assert (facts.model, facts.features, facts.opset, facts.size) == (told.model, told.features, told.opset, told.bytes)
    assert facts.operators == tuple(sorted(told.operators)) and exported <= OPERATORS and MAXIMUM_BYTES == LARGEST
    values = np.random.default_rng(0).random((300, 45))
    values[::7, ::5] = np.nan
    scored = Scorer.from_files(**{model: tmp_path / "x.onnx"}).score_array(values)
    output = {"calling_score": scored.network_score, "outcome": scored.outcome_probability}[model]
    np.testing.assert_allclose(output, predict(network, values[:, :features]), atol=1e-5)


def test_allowed_operators_exist():
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    assert known >= OPERATORS


WHOLE = build().SerializeToString()


@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=12), st.booleans())
def test_spoilt_bytes_never_crash(at, content, insert):
    spoilt = WHOLE[:at] + content + (WHOLE[at:] if insert else WHOLE[at + len(content) :])
    try:
        inspect_model(spoilt)
    except CallingError:
        pass


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data):
    with pytest.raises((IntegrityError, RefusedError)):
        inspect_model(data)


def test_deep_and_endless_files_end_quickly():
    import time

    start = time.perf_counter()
    for data in (
        b"\xff" * 1_000_000,
        b"\x3a" * 1_000_000,
        b"\x08\x01" * 2_000_000,
        b"\x3a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",
    ):
        with pytest.raises((IntegrityError, RefusedError)):
            inspect_model(data)
    assert time.perf_counter() - start < 5


def test_it_needs_neither_onnx_nor_a_runtime():
    code = (
        "import sys, calling_ai.serve.guard\n"
        "print([name for name in ('onnx', 'onnxruntime', 'google', 'numpy', 'torch') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("end", [len(WHOLE) - 1, len(WHOLE) - 2, 40])
def test_parts_longer_than_the_file_are_named(end):
    with pytest.raises(IntegrityError, match="longer than the file|does not end"):
        inspect_model(WHOLE[:end])
    with pytest.raises(IntegrityError, match="longer than the file"):
        inspect_model(b"\x12\x05ab")
