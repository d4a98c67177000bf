"""The scorer: the right numbers, one row at a time, and a score on every path."""

import dataclasses
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from calling_ai.core.contract import BASE_NAMES, FEATURE_NAMES, NEUTRAL
from calling_ai.core.errors import CallingError, InputError, IntegrityError, NotFoundError, RefusedError, SettingsError
from calling_ai.registry.versions import Registry, VersionDraft
from calling_ai.score.formula import formula
from calling_ai.score.policy import Policy, uniforms
from calling_ai.serve.releases import CHUNK, Network, choose_versions
from calling_ai.serve.scorer import COLUMNS, Score, Scored, Scorer

NAMES = {"calling_score": "network_score", "outcome": "outcome_probability"}
BOTH = {"calling_score": "champion", "outcome": "champion"}


def weights_of(seed: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (width, 1)).astype("float32")


def build(model: str, width: int, seed: int = 0, last: str = "Sigmoid", opset: int = 18, flat: bool = False) -> bytes:
    "Return missing -> neutral, then a linear score, then the operator `last`; `flat` drops the second axis."
    nodes = [
        helper.make_node("IsNaN", ["features"], ["missing"]),
        helper.make_node("Where", ["missing", "neutral", "features"], ["filled"]),
        helper.make_node("MatMul", ["filled", "weights"], ["logit"]),
    ]
    end = "column" if flat else NAMES[model]
    nodes.append(helper.make_node(last, ["logit"], [end]))
    if flat:
        nodes.append(helper.make_node("Squeeze", [end, "axis"], [NAMES[model]]))
    held = {
        "neutral": NEUTRAL[:width].astype("float32"),
        "weights": weights_of(seed, width),
        "axis": np.array([1], "int64"),
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info(NAMES[model], TensorProto.FLOAT, ["batch"] if flat else ["batch", 1])],
        [numpy_helper.from_array(value, name) for name, value in held.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10).SerializeToString()


def reference(values: np.ndarray, seed: int, width: int) -> np.ndarray:
    filled = np.where(np.isnan(values[:, :width]), NEUTRAL[:width], values[:, :width])
    return 1 / (1 + np.exp(-(filled @ weights_of(seed, width).astype(float))[:, 0]))


def moments(rows: int, seed: int = 0, missing: float = 0.2) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.random((rows, 45))
    values[rng.random(values.shape) < missing] = np.nan
    return values


def told(scored: Scored | Score) -> set[str]:
    "Return every way that scores took, with its reason."
    one = isinstance(scored, Score)
    pairs = [(scored.path, scored.reason)] if one else zip(scored.path, scored.reason, strict=True)
    return {f"{path}: {reason}" if reason else path for path, reason in pairs}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {"calling_score": build("calling_score", 39, 1), "outcome": build("outcome", 45, 2, flat=True)}
    for model, data in made.items():
        (folder / f"{model}.onnx").write_bytes(data)
    return {model: folder / f"{model}.onnx" for model in made}


@pytest.fixture
def workspace(tmp_path, files):
    Registry(tmp_path).register([VersionDraft(model, "town", file) for model, file in files.items()], promote=BOTH)
    return tmp_path


@pytest.mark.parametrize("rows", [0, 1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
def test_numbers_equal_an_independent_reference(files, rows):
    values = moments(rows)
    policy = Policy(weight=0.3, gate=0.5, threshold=0.2)
    scored = Scorer.from_files(files["calling_score"], files["outcome"], policy).score_array(values)
    expected = formula(values).formula_score
    network, probability = reference(values, 1, 39), reference(values, 2, 45)
    np.testing.assert_allclose(scored.formula_score, expected, rtol=1e-12)
    np.testing.assert_allclose(scored.network_score, network, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(scored.outcome_probability, probability, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(
        scored.calling_score, (0.7 * expected + 0.3 * network) * probability, rtol=5e-5, atol=1e-6
    )
    sure = (np.abs(scored.outcome_probability - 0.5) > 1e-5) & (np.abs(scored.calling_score - 0.2) > 1e-5)
    np.testing.assert_array_equal(
        scored.called[sure], ((probability > 0.5) & ((0.7 * expected + 0.3 * network) * probability >= 0.2))[sure]
    )
    np.testing.assert_array_equal(scored.missing, np.isnan(values).sum(axis=1))
    assert len(scored) == rows and told(scored) <= {"network"} and not scored.explored.any()


def test_frame_keeps_order_index_and_nothing_else(files):
    values = moments(50)
    frame = pd.DataFrame(
        values, columns=FEATURE_NAMES, index=pd.Index(np.random.default_rng(0).permutation(50), name="row")
    )
    frame["user_id"], frame["outcome_score"], frame["split"] = "somebody", 0.5, "test"
    scorer = Scorer.from_files(files["calling_score"], files["outcome"], Policy(weight=0.3))
    result = scorer.score_frame(frame)
    assert tuple(result.columns) == COLUMNS and result.index.equals(frame.index)
    np.testing.assert_array_equal(result.calling_score, scorer.score_array(values).calling_score)
    shuffled = scorer.score_frame(frame[frame.columns[::-1]].iloc[::-1])
    pd.testing.assert_frame_equal(shuffled.iloc[::-1], result, rtol=1e-6)
    assert len(scorer.score_frame(frame.iloc[:0])) == 0
    some = scorer.score_frame(frame.drop(columns=["history_activity_level", "user_overall_energy"]))
    expected = scorer.score_frame(frame.assign(history_activity_level=np.nan, user_overall_energy=np.nan))
    pd.testing.assert_frame_equal(some, expected)


def test_one_moment_equals_the_batch(files):
    values = moments(20, 3)
    scorer = Scorer.from_files(files["calling_score"], files["outcome"], Policy(weight=0.3))
    batch = scorer.score_array(values)
    for row in range(20):
        moment = {
            name: value for name, value in zip(FEATURE_NAMES, values[row].tolist(), strict=True) if not np.isnan(value)
        }
        score = scorer.score(moment)
        for name in ("formula_score", "network_score", "outcome_probability", "calling_score", "propensity"):
            np.testing.assert_allclose(getattr(score, name), getattr(batch, name)[row], rtol=1e-6)
        assert (score.called, score.path, score.reason, score.missing) == (
            bool(batch.called[row]),
            batch.path[row],
            batch.reason[row],
            batch.missing[row],
        )
        assert (
            score.terms["formula_score"] == score.formula_score
            and type(score.called) is bool
            and type(score.missing) is int
        )
    empty = scorer.score({})
    assert (empty.missing, told(empty)) == (45, {"network"}) and 0 <= empty.calling_score <= 1


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=45, max_size=45), min_size=1, max_size=12))
def test_every_valid_request_gets_a_finite_score_in_range(rows):
    values = np.array(rows, float)
    scored = SCORER.score_array(values)
    for part in (
        scored.formula_score,
        scored.network_score,
        scored.outcome_probability,
        scored.calling_score,
        scored.propensity,
    ):
        assert np.isfinite(part).all() and (part >= 0).all() and (part <= 1).all()
    alone = np.array([SCORER.score_array(values[row : row + 1]).calling_score[0] for row in range(len(values))])
    np.testing.assert_allclose(scored.calling_score, alone, rtol=1e-6, atol=1e-7)


SCORER = Scorer(
    {
        model: Network(build(model, width, seed), model, "x")
        for model, width, seed in (("calling_score", 39, 1), ("outcome", 45, 2))
    },
    {},
    Policy(weight=0.5),
)

anything = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(),
    st.integers(),
    st.text(max_size=5),
    st.lists(st.floats(), max_size=2),
    st.binary(max_size=3),
)
names = st.one_of(
    st.sampled_from(FEATURE_NAMES),
    st.sampled_from(("user", "spot", "trend_emerging", "assessment_risk", "user_id")),
    st.text(max_size=12),
)


@settings(max_examples=400, deadline=None)
@given(
    st.dictionaries(names, st.one_of(anything, st.dictionaries(st.text(max_size=8), anything, max_size=2)), max_size=6)
)
def test_any_request_gives_a_score_or_one_clear_error(request_):
    try:
        score = SCORER.score(request_)
    except InputError as error:
        assert str(error)
    else:
        assert 0 <= score.calling_score <= 1 and told(score) == {"network"}


def test_one_odd_row_changes_no_bit_of_the_others():
    class Odd(Network):
        def run(self, values):
            result = super().run(values)
            return np.where(np.isnan(values[:, 0]), np.nan, result)

    odd = Scorer(
        {
            "calling_score": Odd(build("calling_score", 39, 1), "calling_score", "x"),
            "outcome": SCORER.networks["outcome"],
        },
        {},
        SCORER.policy,
    )
    values = moments(1000, 5, 0)
    before = odd.score_array(values)
    values[321, 0] = np.nan
    after, rest = odd.score_array(values), np.arange(1000) != 321
    for name in ("calling_score", "called", "network_score", "outcome_probability", "path", "reason", "answer"):
        np.testing.assert_array_equal(getattr(before, name)[rest], getattr(after, name)[rest])
    assert (after.path[321], after.reason[321]) == ("formula with outcome model", "gave no usable number")
    assert after.weight[321] == 0
    np.testing.assert_allclose(
        after.calling_score[321], after.formula_score[321] * after.outcome_probability[321], rtol=1e-12
    )


@pytest.mark.parametrize("last", ["Log", "Identity", "Neg"])
def test_outputs_that_are_no_probability_fall_back_row_by_row(last):
    values = moments(500, 6, 0)
    network = Network(build("outcome", 45, 2, last), "outcome", "x")
    raw = network.session.run(None, {"features": values.astype("float32")})[0][:, 0]
    usable = (raw >= -1e-6) & (raw <= 1 + 1e-6)
    scored = Scorer({"outcome": network}, {"calling_score": "none"}, Policy()).score_array(values)
    assert 0 < usable.sum() < 500
    np.testing.assert_array_equal(~np.isnan(scored.outcome_probability), usable)
    np.testing.assert_array_equal((scored.path == "formula with outcome model") & (scored.reason == "none"), usable)
    np.testing.assert_allclose(scored.calling_score[~usable], scored.formula_score[~usable])


class Broken(Network):
    def __init__(self, error):
        self.error, self.version = error, "broken"

    def run(self, values):
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("x"), MemoryError(), ValueError("shape"), ZeroDivisionError()])
def test_a_model_that_fails_while_running_is_left_out(error):
    values = moments(10)
    name = type(error).__name__
    for model, path in (
        ("calling_score", f"formula with outcome model: failed with {name}"),
        ("outcome", f"network without outcome model: failed with {name}"),
    ):
        scored = Scorer({**SCORER.networks, model: Broken(error)}, {}, SCORER.policy).score_array(values)
        assert told(scored) == {path}
    scored = Scorer(dict.fromkeys(NAMES, Broken(error)), {}, SCORER.policy).score_array(values)
    assert told(scored) == {f"formula: failed with {name}"}
    np.testing.assert_array_equal(scored.calling_score, formula(values).formula_score)


def test_wrong_output_shape_falls_back():
    data = build("calling_score", 39, 1, flat=False)
    import onnx

    model = onnx.load_from_string(data)
    model.graph.node[2].input[1] = "wide"
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((39, 2), "float32"), "wide"))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "any"
    scored = Scorer(
        {"calling_score": Network(model.SerializeToString(), "calling_score", "x")}, {}, Policy(weight=0.3)
    ).score_array(moments(4))
    assert told(scored) == {"formula: failed with ValueError; outcome model: no model given"}


def spoil(path: Path) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:200])


def swap(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(build("calling_score", 39, 99))


@pytest.mark.parametrize(
    ("harm", "word"),
    [
        (spoil, "is not what was registered"),
        (remove, "is missing"),
        (truncate, "is not what was registered"),
        (swap, "is not what was registered"),
    ],
)
@pytest.mark.parametrize("model", list(NAMES))
def test_damaged_files_fall_back_and_heal(workspace, model, harm, word):
    registry = Registry(workspace)
    path = registry.load_file(registry.get(model))
    whole, values = path.read_bytes(), moments(5)
    good = Scorer.load(root=workspace).score_array(values)
    harm(path)
    scored = Scorer.load(root=workspace).score_array(values)
    start = "formula with outcome model" if model == "calling_score" else "network without outcome model"
    assert set(scored.path) == {start} and word in scored.reason[0] and "backup" not in scored.reason[0]
    assert np.isfinite(scored.calling_score).all()
    with pytest.raises(IntegrityError, match=word):
        Scorer.load(root=workspace, strict=True)
    path.unlink(missing_ok=True)
    path.write_bytes(whole)
    np.testing.assert_array_equal(
        Scorer.load(root=workspace, strict=True).score_array(values).calling_score, good.calling_score
    )


def test_database_away_or_damaged_gives_the_formula(workspace):
    values, database = moments(5), workspace / "var" / "calling_ai.db"
    held = database.read_bytes()
    database.write_bytes(b"nonsense" * 600)
    scored = Scorer.load(root=workspace).score_array(values)
    assert told(scored) == {"formula: database calling_ai.db failed"}
    with pytest.raises(IntegrityError, match="restore it from a backup"):
        Scorer.load(root=workspace, strict=True)
    database.unlink()
    assert told(Scorer.load(root=workspace).score_array(values)) == {"formula: no model registered"}
    with pytest.raises(NotFoundError, match="no model is registered"):
        Scorer.load(root=workspace, strict=True)
    database.write_bytes(held)
    assert told(Scorer.load(root=workspace).score_array(values)) == {"network: no release of these versions"}


def test_registered_but_no_champion(workspace, files):
    other = workspace / "other"
    other.mkdir()
    Registry(other).register([VersionDraft("outcome", "town", files["outcome"])])
    assert told(Scorer.load(root=other).score_array(moments(2))) == {
        "formula: no model registered; outcome model: no champion of outcome"
    }


def test_named_versions_stay_what_they_are(workspace, files):
    registry = Registry(workspace)
    score, outcome = (VersionDraft(model, "town", files[model]) for model in NAMES)
    registry.register([score])  # calling_score v1.1-town
    assert registry.register([dataclasses.replace(score, source="hybrid")])[0].version == "v2.0-hybrid"
    registry.register([dataclasses.replace(outcome, source="coupons")])  # outcome v3.0-coupons
    before = {
        name: {model: item.version for model, item in choose_versions(registry, name)[0].items()}
        for name in ("v1.0-town", "v1.1-town", "v2.0-hybrid", "v3.0-coupons")
    }
    assert before == {
        "v1.0-town": dict.fromkeys(NAMES, "v1.0-town"),
        "v1.1-town": {"calling_score": "v1.1-town", "outcome": "v1.0-town"},
        "v2.0-hybrid": {"calling_score": "v2.0-hybrid"},
        "v3.0-coupons": {"outcome": "v3.0-coupons"},
    }
    registry.register([score], promote={"calling_score": "champion"})
    registry.register([dataclasses.replace(score, source="hybrid")])
    for name, versions in before.items():  # what came later changes nothing
        assert Scorer.load(name, root=workspace).versions == versions
    registry.register([score])
    registry.register([outcome])
    assert registry.list("calling_score")[-1].version == "v1.3-town"
    for name in ("v1.2-town", "v1.3-town"):  # the outcome model of that training did not exist yet
        assert Scorer.load(name, root=workspace).versions == {"calling_score": name, "outcome": "v1.0-town"}
    # only a model that gets the very same name joins
    assert Scorer.load("v1.1-town", root=workspace).versions == dict.fromkeys(NAMES, "v1.1-town")
    assert Scorer.load(root=workspace).versions == {"calling_score": "v1.2-town", "outcome": "v1.0-town"}
    assert Scorer.load("previous", root=workspace).versions == {"calling_score": "v1.0-town"}
    assert told(Scorer.load("v3.0-coupons", root=workspace).score({})) == {
        "formula with outcome model: no release of these versions; no v3.0-coupons of calling_score"
    }


@pytest.mark.parametrize("name", ["v9.9-town", "latest", "challenger"])
def test_unknown_versions_are_refused(workspace, tmp_path_factory, name):
    with pytest.raises(NotFoundError, match=f"no model has the version {name}: .*`calling-ai versions`"):
        Scorer.load(name, root=workspace)
    with pytest.raises(
        NotFoundError,
        match=f"no model has the version {name}: no version of calling_score is registered yet: `calling-ai run`",
    ):
        Scorer.load(name, root=tmp_path_factory.mktemp("empty"))


def test_policy_comes_from_the_settings_unless_given(workspace, monkeypatch):
    assert Scorer.load(root=workspace).policy == Policy()
    monkeypatch.setenv("CALLING_AI_POLICY__WEIGHT", "0.3")
    assert Scorer.load(root=workspace).policy.weight == 0.3
    assert Scorer.load(root=workspace, policy=Policy(weight=0.1)).policy.weight == 0.1
    monkeypatch.setenv("CALLING_AI_POLICY__WEIGHT", "0.9")
    with pytest.raises(SettingsError, match="weight"):
        Scorer.load(root=workspace)


def test_exploration_needs_identifiers_and_replays():
    values, ids = moments(4000, 1), np.arange(4000)
    scorer = Scorer(SCORER.networks, {}, Policy(weight=0.3, exploration=0.1, seed=7))
    plain, explored = scorer.score_array(values), scorer.score_array(values, ids)
    assert not plain.explored.any() and set(plain.propensity) <= {0.0, 1.0}
    np.testing.assert_array_equal(explored.explored, uniforms(ids, 7) < 0.1)
    np.testing.assert_array_equal(explored.called, plain.called ^ explored.explored)
    np.testing.assert_allclose(explored.propensity, np.where(plain.called, 0.9, 0.1))
    again = scorer.score_array(values[::-1], ids[::-1])
    np.testing.assert_array_equal(again.called[::-1], explored.called)
    one = [
        scorer.score(dict(zip(FEATURE_NAMES, row, strict=True)), decision_id=int(i)).called
        for i, row in zip(ids[:50], values[:50], strict=True)
    ]
    assert one == explored.called[:50].tolist()
    assert not scorer.score_array(values, ids, refused=np.ones(4000, bool)).called.any()


def test_trends_and_assessments_reach_the_score():
    frame = pd.DataFrame(moments(5), columns=FEATURE_NAMES)
    plain = SCORER.score_frame(frame)
    boosted = SCORER.score_frame(frame.assign(trend_emerging=0.5, trend_community=0.5))
    np.testing.assert_allclose(
        boosted.calling_score, np.minimum(plain.calling_score * 1.2, plain.outcome_probability), rtol=1e-9
    )
    assert (SCORER.score_frame(frame.assign(assessment_developmental=1.0)).formula_score > plain.formula_score).all()


@pytest.mark.parametrize(
    ("file", "kind", "message"),
    [
        (b"not a model", CallingError, "model file is damaged"),
        (build("outcome", 45), RefusedError, "it must have one, network_score"),
        (build("calling_score", 39, opset=17), RefusedError, "it must be opset 18"),
        (build("calling_score", 39, last="NonZero"), RefusedError, "operator NonZero"),
        (b"\0" * 10_000_001, RefusedError, "at most 10,000,000"),
        (None, NotFoundError, "does not exist"),
    ],
)
def test_files_from_elsewhere_are_inspected_first(tmp_path, file, kind, message):
    if file is not None:
        (tmp_path / "x.onnx").write_bytes(file)
    with pytest.raises(kind, match=message):
        Scorer.from_files(calling_score=tmp_path / "x.onnx")


def test_eight_threads_equal_one():
    values = moments(3000, 8)
    expected, results = SCORER.score_array(values).calling_score, {}

    def work(index):
        results[index] = [
            SCORER.score_array(values[start : start + 500]).calling_score for start in range(0, 3000, 500)
        ]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for parts in results.values():
        np.testing.assert_allclose(np.concatenate(parts), expected, rtol=1e-6)
        for part, first in zip(parts, results[0], strict=True):
            np.testing.assert_array_equal(part, first)
    assert len(results) == 8


def test_arrays_of_39_columns_leave_history_out():
    values = moments(6)
    short = SCORER.score_array(values[:, :39])
    np.testing.assert_array_equal(
        short.calling_score, SCORER.score_array(np.hstack([values[:, :39], np.full((6, 6), np.nan)])).calling_score
    )
    assert list(BASE_NAMES) == list(FEATURE_NAMES[:39])


@pytest.mark.parametrize("bad", [np.inf, -0.1, 1.5])
def test_invalid_rows_are_named(bad):
    values = moments(5, missing=0)
    values[3, 7] = bad
    with pytest.raises(InputError, match=f"row 3, column {FEATURE_NAMES[7]}"):
        SCORER.score_array(values)


def test_formula_only_needs_nothing(tmp_path):
    code = (
        "import sys\nfrom calling_ai.serve.scorer import Scorer\n"
        "score = Scorer.formula_only().score({'user_overall_energy': 0.9})\n"
        "heavy = ('pandas', 'torch', 'onnxruntime', 'sqlalchemy', 'matplotlib', 'scipy', 'prefect')\n"
        "print(score.path, score.reason, [name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "formula no model wanted []\n"


def test_loading_champions_stays_light(workspace):
    code = (
        "import sys\nfrom calling_ai.serve.scorer import Scorer\nscorer = Scorer.load(root=sys.argv[1], strict=True)\n"
        "heavy = ('pandas', 'torch', 'matplotlib', 'scipy', 'prefect', 'onnx')\n"
        "print(scorer.versions['outcome'], [name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(workspace)], capture_output=True, text=True, check=True)
    assert done.stdout == "v1.0-town []\n"
