"""The release graph: one file that says what formula, networks and policy say, for every kind of input."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from onnx import TensorProto, helper, numpy_helper
from scoring_reference import answer_of

from calling_ai.core.contract import FEATURE_NAMES, NEUTRAL
from calling_ai.core.errors import InputError, RefusedError
from calling_ai.models.graph import compose, contract_digest, release_bytes, verify_release
from calling_ai.score.formula import formula
from calling_ai.score.policy import Policy
from calling_ai.score.release import ANSWER, TERMS, Dials, answer
from calling_ai.serve.guard import inspect_model

NAMES = {"calling_score": ("network_score", 39), "outcome": ("outcome_probability", 45)}


def weights_of(seed: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (width, 1)).astype("float32")


def network(model: str, seed: int, last: str = "Sigmoid", spread: bool = False, width: int | None = None) -> bytes:
    "Return missing -> neutral, a linear score, then the operator `last`; `spread` adds a second output."
    name, wide = NAMES[model]
    wide = width or wide
    nodes = [
        helper.make_node("IsNaN", ["features"], ["missing"]),
        helper.make_node("Where", ["missing", "neutral", "features"], ["filled"]),
        helper.make_node("MatMul", ["filled", "weights"], ["logit"]),
        helper.make_node(last, ["logit"], [name]),
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1])]
    if spread:
        nodes += [
            helper.make_node("Sigmoid", ["logit"], ["again"]),
            helper.make_node("Mul", ["again", "half"], ["spread"]),
        ]
        outputs.append(helper.make_tensor_value_info("spread", TensorProto.FLOAT, ["batch", 1]))
    held = {
        "neutral": NEUTRAL[:wide].astype("float32"),
        "weights": weights_of(seed, wide),
        "half": np.float32(0.5) * np.ones(1, "float32"),
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", wide])],
        outputs,
        [numpy_helper.from_array(value, key) for key, value in held.items()],
    )
    model_ = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    for key, value in (("contract", contract_digest(wide)), ("model", model)):
        model_.metadata_props.add(key=key, value=value)
    return model_.SerializeToString()


def say(values: np.ndarray, model: str, seed: int) -> np.ndarray:
    "Return what the network says, in numpy."
    wide = NAMES[model][1]
    filled = np.where(np.isnan(values[:, :wide]), NEUTRAL[:wide], values[:, :wide]).astype("float32")
    return 1 / (1 + np.exp(-(filled @ weights_of(seed, wide)).astype(float)[:, 0]))


def open_(data: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


PARTS = {"calling_score": network("calling_score", 1), "outcome": network("outcome", 2)}
BOTH = release_bytes(*PARTS.values(), Policy(weight=0.3))
SESSION, PLAIN = open_(BOTH), open_(release_bytes())


def run(session: onnxruntime.InferenceSession, features: np.ndarray, **feeds: object) -> np.ndarray:
    given = {name: np.asarray(value, dtype=np.float64) for name, value in feeds.items()}
    return session.run(["answer"], {"features": features, **given})[0]


number = st.one_of(
    st.just(math.nan), st.floats(0, 1), st.sampled_from([0.0, 1.0, 0.5, 0.8, 5e-324, 1 - 2**-53, 0.5 - 2**-54, -0.0])
)
absurd = st.floats(allow_nan=True, allow_infinity=True)


def rows(elements: st.SearchStrategy[float], width: int, most: int = 3) -> st.SearchStrategy[list[list[float]]]:
    return st.lists(st.lists(elements, min_size=width, max_size=width), min_size=1, max_size=most)


@settings(max_examples=60)
@given(rows(st.one_of(number, number, absurd), 45), st.data())
def test_formula_in_numpy_in_plain_python_and_in_the_graph_agree(given_rows, data):
    values = np.array(given_rows)
    optional = {}
    if data.draw(st.booleans()):
        optional["assessment"] = np.array(data.draw(st.lists(st.one_of(number, absurd), min_size=5, max_size=5)))[None]
    found = run(PLAIN, values, **optional)
    plain = [answer_of(row, assessment=optional.get("assessment", [None])[0]) for row in values]
    full = np.repeat(optional["assessment"], len(values), 0) if optional else None
    numpys = formula(np.clip(values, 0, 1), None if full is None else np.clip(full, 0, 1))
    for name in TERMS:
        column = found[:, ANSWER.index(name)]
        assert_allclose(column, getattr(numpys, name), rtol=0, atol=1e-6)
        assert_allclose(column, [row[name] for row in plain], rtol=0, atol=1e-12)
    assert np.isfinite(found[:, [ANSWER.index(name) for name in ("calling_score", "called", *TERMS)]]).all()


@settings(max_examples=50)
@given(
    rows(st.one_of(number, number, absurd), 45),
    st.lists(st.one_of(st.floats(-1, 1), st.just(math.nan), absurd), min_size=4, max_size=4),
    st.tuples(st.floats(0, 0.5), st.floats(0, 1), st.floats(0, 1)),
    st.tuples(st.floats(0, 0.5), st.floats(0.5, 1)),
    st.tuples(*[st.floats(0, 2)] * 3),
)
def test_every_column_agrees_with_the_reference(given_rows, trend, numbers, limits, factors):
    values = np.array(given_rows)
    weight, gate, threshold = numbers
    found = run(
        SESSION,
        values,
        trend=[trend],
        neural_weight=weight,
        gate=gate,
        threshold=threshold,
        confidence_limits=limits,
        confidence_factors=factors,
    )
    with np.errstate(over="ignore"):
        alone = {
            model: open_parts[model].run(None, {"features": values[:, : NAMES[model][1]].astype("float32")})[0][:, 0]
            for model in NAMES
        }
    for index, row in enumerate(values):
        said = [float(alone[model][index]) for model in NAMES]
        expected = answer_of(
            row,
            *(value if 0 <= value <= 1 else math.nan for value in said),
            weight=weight,
            gate=gate,
            threshold=threshold,
            trend=trend,
            limits=limits,
            factors=factors,
        )
        got = dict(zip(ANSWER, found[index].tolist(), strict=True))
        unsure = abs(expected["calling_score"] - threshold) < 1e-9 or abs(expected["outcome_probability"] - gate) < 1e-9
        on_limit = min(abs(expected["certainty"] - limit) for limit in limits) < 1e-9
        for name in ANSWER:
            if (unsure and name == "called") or on_limit:
                continue
            assert_allclose(got[name], expected[name], rtol=0, atol=1e-9, err_msg=name)


open_parts = {model: open_(data) for model, data in PARTS.items()}


@pytest.mark.parametrize("inside", [(), ("calling_score",), ("outcome",), ("calling_score", "outcome")])
def test_either_network_may_be_absent(inside):
    values = np.random.default_rng(3).random((40, 45))
    values[::3, ::4] = np.nan
    session = open_(release_bytes(**{model: PARTS[model] for model in inside}))
    said = {model: say(values, model, seed) if model in inside else None for model, seed in zip(NAMES, (1, 2))}
    found = run(session, values, neural_weight=0.4, gate=0.4, threshold=0.3)
    assert_allclose(found, answer(values, *said.values(), dials=Dials(0.4, 0.4, 0.3)), atol=1e-6)
    named = session.run(
        list(ANSWER),
        {"features": values, "neural_weight": np.array(0.4), "gate": np.array(0.4)} | {"threshold": np.array(0.3)},
    )
    assert_array_equal(np.hstack(named), found)
    assert named[ANSWER.index("called")].dtype == bool


@pytest.mark.parametrize("last", ["Log", "Identity", "Neg", "Exp"])
@pytest.mark.parametrize("model", list(NAMES))
def test_rows_without_a_usable_number_fall_back_in_the_graph(model, last):
    values = np.random.default_rng(4).random((300, 45))
    values[::7, 3] = np.nan
    parts = {**PARTS, model: network(model, 1 if model == "calling_score" else 2, last)}
    raw = open_(parts[model]).run(None, {"features": values[:, : NAMES[model][1]].astype("float32")})[0][:, 0]
    good = (raw >= -1e-6) & (raw <= 1 + 1e-6)
    assert not good.all()
    found = run(open_(release_bytes(*parts.values())), values, neural_weight=0.5, gate=0.1, threshold=0.2)
    column = found[:, ANSWER.index(NAMES[model][0])]
    assert_array_equal(~np.isnan(column), good)
    whole = run(SESSION, values, neural_weight=0.5, gate=0.1, threshold=0.2)
    formula_score = found[:, ANSWER.index("formula_score")]
    if model == "calling_score":
        assert_array_equal(found[~good, ANSWER.index("hybrid_score")], formula_score[~good])
        assert (found[~good, ANSWER.index("weight")] == 0).all()
    else:
        boosted = whole[~good, ANSWER.index("boosted_score")]
        # without a probability there is no multiplication, no gate, and confidence is unknown
        assert_array_equal(found[~good, 0], boosted)
        assert_array_equal(found[~good, 1] == 1, boosted >= 0.2)
        assert np.isnan(found[~good, ANSWER.index("confidence")]).all()
    assert np.isfinite(found[:, 0]).all() and ((found[:, 0] >= 0) & (found[:, 0] <= 1)).all()


def test_one_bad_row_changes_no_bit_of_the_others_and_one_row_equals_the_batch():
    values = np.random.default_rng(5).random((1_000, 45))
    before = run(SESSION, values)
    for bad in (np.nan, np.inf, -1e300, 5e-324):
        spoilt = values.copy()
        spoilt[500] = bad
        after = run(SESSION, spoilt)
        assert_array_equal(np.delete(after, 500, 0), np.delete(before, 500, 0))
        assert np.isfinite(after[500, 0])
    for row in range(0, 1_000, 37):
        assert_allclose(run(SESSION, values[row : row + 1])[0], before[row], rtol=0, atol=1e-6)


def test_defaults_may_be_overridden_and_are_broadcast():
    values = np.random.default_rng(6).random((5, 45))
    default = run(SESSION, values)
    assert_array_equal(default, run(SESSION, values, neural_weight=0.3, gate=0.7, threshold=0.7))
    assert_array_equal(default, run(SESSION, values, assessment=[[np.nan] * 5], trend=[[np.nan] * 4]))
    assert_array_equal(default, run(SESSION, values, assessment=np.full((5, 5), 0.5), trend=np.zeros((5, 4))))
    one = run(SESSION, values, trend=[[1.0, 1, 1, 1]])
    assert_array_equal(one, run(SESSION, values, trend=np.ones((5, 4))))
    assert (one[:, ANSWER.index("boosted_score")] > default[:, ANSWER.index("boosted_score")]).all()
    assert (run(SESSION, values, neural_weight=0.0)[:, ANSWER.index("weight")] == 0).all()
    assert run(SESSION, np.empty((0, 45))).shape == (0, len(ANSWER))
    with pytest.raises(Exception, match="trend|[Bb]roadcast|dimension"):
        run(SESSION, values, trend=np.zeros((4, 4)))


def test_an_ensemble_brings_its_spread():
    values = np.random.default_rng(7).random((60, 45))
    made = release_bytes(
        network("calling_score", 1, spread=True), PARTS["outcome"], dials=Dials(0.3, confidence_limits=(0.4, 0.6))
    )
    found = run(open_(made), values)
    spread = 0.5 * say(values, "calling_score", 1)
    assert_allclose(found[:, ANSWER.index("certainty")], 1 - 2 * spread, atol=1e-6)
    assert set(found[:, ANSWER.index("confidence")]) == {0.0, 1.0, 2.0}
    parts = {"calling_score": network("calling_score", 1, spread=True), "outcome": PARTS["outcome"]}
    assert verify_release(made, parts, rows=50).largest < 1e-6


def test_bytes_depend_on_the_parts_alone(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_models_graph_release import BOTH\nfrom calling_ai.core.files import sha256_bytes\n"
        "print(sha256_bytes(BOTH))"
    )
    done = {
        subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parent)],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
            env={"PYTHONHASHSEED": seed, "PATH": "", "OMP_NUM_THREADS": "1"},
        ).stdout
        for seed in ("1", "2")
    }
    from calling_ai.core.files import sha256_bytes

    assert done == {sha256_bytes(BOTH) + "\n"}
    assert release_bytes(*PARTS.values(), Policy(weight=0.2)) != BOTH


def test_the_file_is_what_a_release_must_be():
    model = onnx.load_model_from_string(BOTH)
    onnx.checker.check_model(model, full_check=True)
    facts = inspect_model(BOTH)
    assert (facts.model, facts.features, facts.opset) == ("release", 45, 18) and len(BOTH) < 10_000_000
    notes = {item.key: item.value for item in model.metadata_props}
    assert notes["features"].split(",") == list(FEATURE_NAMES) and json.loads(notes["policy"])["weight"] == 0.3
    for secret in (str(Path(__file__).parent.parent), sys.prefix, "graph.py"):
        assert secret.encode() not in BOTH
    assert not any(node.name or node.doc_string or node.metadata_props for node in model.graph.node)
    overridable = {item.name for item in SESSION.get_overridable_initializers()}
    assert [item.name for item in SESSION.get_inputs()] == ["features"] and "trend" in overridable
    assert [item.name for item in SESSION.get_outputs()] == [*ANSWER, "answer"]


def test_composing_refuses_what_does_not_belong(tmp_path):
    for model, data in PARTS.items():
        (tmp_path / f"{model}.onnx").write_bytes(data)
    files = [tmp_path / f"{model}.onnx" for model in PARTS]
    made = compose(*files, tmp_path / "release.onnx", Policy(weight=0.3), rows=40)
    assert (tmp_path / "release.onnx").read_bytes() == BOTH and made.largest < 1e-6 and set(made.parts) == set(PARTS)
    with pytest.raises(RefusedError, match="it is a model of the kind outcome"):
        compose(files[1], files[0], tmp_path / "no.onnx")
    (tmp_path / "page.onnx").write_text("<html>")
    with pytest.raises(RefusedError, match="not an ONNX model"):
        compose(tmp_path / "page.onnx", None, tmp_path / "no.onnx")
    assert not (tmp_path / "no.onnx").exists()
    with pytest.raises(InputError, match="neural_weight is 0.6"):
        release_bytes(dials=Dials(0.6))


SPOILS = {
    "a weight of the formula": lambda graph: _scale(graph, (45, 27)),
    "a sum of the formula": lambda graph: _scale(graph, (13, 6)),
    "a weight of a network": lambda graph: _scale(graph, (39, 1)),
    "the weights of the score": lambda graph: _scale(graph, (8, 1)),
    "the trend": lambda graph: _scale(graph, (4, 1)),
}


def _scale(graph, shape):
    tensor = next(item for item in graph.initializer if tuple(item.dims) == shape)
    changed = numpy_helper.to_array(tensor) * 1.001
    tensor.CopyFrom(numpy_helper.from_array(changed.astype(numpy_helper.to_array(tensor).dtype), tensor.name))


@pytest.mark.parametrize("what", SPOILS)
def test_a_release_that_differs_from_its_parts_is_refused(what):
    model = onnx.load_model_from_string(BOTH)
    SPOILS[what](model.graph)
    with pytest.raises(RefusedError, match="it differs from its parts by"):
        verify_release(model.SerializeToString(), PARTS, rows=60)
