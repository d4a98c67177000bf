"""Explanations add up, agree with independent Shapley values, and are refused where they would not add up."""

import itertools
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calling_ai.core.contract import FEATURE_NAMES, TREND_NAMES
from calling_ai.core.errors import InputError, RefusedError
from calling_ai.score.policy import Policy
from calling_ai.serve.explain import PLAYERS, Player, explain, sentence, shapley, waterfall
from calling_ai.serve.scorer import Scorer

WIDTHS = {"calling_score": 39, "outcome": 45}
OUTPUTS = {"calling_score": "network_score", "outcome": "outcome_probability"}


def curved(model: str, seed: int) -> bytes:
    """Return a small network with interactions of all inputs."""
    generator, width, make = np.random.default_rng(seed), WIDTHS[model], onnx.helper
    held = {
        "half": np.array(0.5, np.float32),
        "first": generator.normal(0, 0.6, (width, 6)).astype(np.float32),
        "second": generator.normal(0, 1.5, (6, 1)).astype(np.float32),
    }
    nodes = [
        make.make_node("IsNaN", ["features"], ["gone"]),
        make.make_node("Where", ["gone", "half", "features"], ["x"]),
        make.make_node("MatMul", ["x", "first"], ["h"]),
        make.make_node("Tanh", ["h"], ["t"]),
        make.make_node("MatMul", ["t", "second"], ["z"]),
        make.make_node("Sigmoid", ["z"], [OUTPUTS[model]]),
    ]
    graph = make.make_graph(
        nodes,
        model,
        [make.make_tensor_value_info("features", 1, ["batch", width])],
        [make.make_tensor_value_info(OUTPUTS[model], 1, ["batch", 1])],
        [onnx.numpy_helper.from_array(value, name) for name, value in held.items()],
    )
    return make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=10).SerializeToString()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return one file a model."""
    folder = tmp_path_factory.mktemp("models")
    for seed, model in enumerate(WIDTHS):
        (folder / f"{model}.onnx").write_bytes(curved(model, seed))
    return {model: folder / f"{model}.onnx" for model in WIDTHS}


values = st.one_of(st.none(), st.floats(0, 1))
moments = st.lists(values, min_size=45, max_size=45).map(lambda found: dict(zip(FEATURE_NAMES, found, strict=True)))
trends = st.one_of(
    st.just({}),
    st.lists(st.floats(-1, 1), min_size=4, max_size=4).map(lambda x: dict(zip(TREND_NAMES, x, strict=True))),
)


@given(moment=moments, trend=trends, weight=st.sampled_from([0.0, 0.1, 0.3, 0.5]))
def test_the_parts_sum_to_the_served_score(files: dict[str, Path], moment: dict, trend: dict, weight: float) -> None:
    scorer = Scorer.from_files(**files, policy=Policy(weight=weight))
    score, made = scorer.score(moment | trend), explain(scorer, moment | trend, orders=1)
    assert made.calling_score == score.calling_score and made.called == score.called
    assert made.total == pytest.approx(score.calling_score, abs=1e-6)
    assert sum(part.contribution for part in made.chance) == pytest.approx(score.outcome_probability, abs=1e-6)
    assert made.sentence.startswith("called because" if score.called else "not called because")


@pytest.mark.parametrize("missing", ["calling_score", "outcome", "both"])
def test_what_is_missing_leaves_no_part(files: dict[str, Path], missing: str) -> None:
    kept = {model: file for model, file in files.items() if missing not in (model, "both")}
    scorer = Scorer.from_files(**kept, policy=Policy(weight=0.3))
    made = explain(scorer, {"user_overall_energy": 0.9})
    names = {part.name for part in made.parts}
    assert made.total == pytest.approx(made.calling_score, abs=1e-9)
    assert any(name.startswith("network_") for name in names) == ("calling_score" in kept)
    assert ("chance" in names) == bool(made.chance) == ("outcome" in kept)


def test_contributions_equal_exact_shapley_values(files: dict[str, Path]) -> None:
    """Enumerate all coalitions of six players, independently, and compare with many walks."""
    scorer = Scorer.from_files(files["calling_score"], policy=Policy(weight=0.3))
    few = tuple(Player(f"group-{index}", "group", tuple(range(index, 45, 6))) for index in range(6))
    point = np.random.default_rng(1).random(45)

    def evaluate(rows: np.ndarray) -> np.ndarray:
        return scorer.score_array(rows).network_score

    def of(coalition: tuple[int, ...]) -> float:
        row = np.full(45, np.nan)
        for index in coalition:
            row[list(few[index].columns)] = point[list(few[index].columns)]
        return float(evaluate(row[None])[0])

    worth = {c: of(c) for size in range(7) for c in itertools.combinations(range(6), size)}
    exact = np.zeros(6)
    for player in range(6):
        for coalition, value in worth.items():
            if player not in coalition:
                share = math.factorial(len(coalition)) * math.factorial(5 - len(coalition)) / math.factorial(6)
                exact[player] += share * (worth[tuple(sorted((*coalition, player)))] - value)
    base, found = shapley(evaluate, point, few, orders=400)
    assert base == pytest.approx(worth[()], abs=1e-7)
    np.testing.assert_allclose(found, exact, atol=0.002)
    assert np.abs(exact).max() > 0.02  # there is something to find
    # the default number of orders is already close
    np.testing.assert_allclose(shapley(evaluate, point, few)[1], exact, atol=0.01)


@pytest.mark.long  # importing shap takes up to a minute
def test_contributions_agree_with_shap(files: dict[str, Path]) -> None:
    shap = pytest.importorskip("shap")
    scorer = Scorer.from_files(files["calling_score"], policy=Policy(weight=0.3))
    players = tuple(Player(name, name, (index,)) for index, name in enumerate(FEATURE_NAMES))
    point = np.random.default_rng(2).random(45)

    def evaluate(rows: np.ndarray) -> np.ndarray:
        return scorer.score_array(np.asarray(rows)).network_score

    neutral = np.full((1, 45), 0.5)  # what this network takes a missing value for
    explainer = shap.explainers.Permutation(evaluate, shap.maskers.Independent(neutral), seed=0)
    theirs = explainer(point[None], max_evals=200 * 91, silent=True).values[0]
    base, ours = shapley(evaluate, point, players, orders=200)
    np.testing.assert_allclose(ours, theirs, atol=0.005)
    assert np.corrcoef(ours[:39], theirs[:39])[0, 1] > 0.99


def test_an_explanation_of_another_score_is_refused(files: dict[str, Path]) -> None:
    scorer = Scorer.from_files(**files, policy=Policy(weight=0.3))
    moment = {"user_overall_energy": 0.9, "spot_overall_energy": 0.1}
    served = scorer.score(moment).calling_score
    assert explain(scorer, moment, served=served + 5e-5).calling_score == served + 5e-5
    with pytest.raises(RefusedError, match="they must agree within 0.0001"):
        explain(scorer, moment, served=served + 2e-4)
    other = Scorer.from_files(**files, policy=Policy(weight=0.1))
    with pytest.raises(RefusedError, match="explain it with the versions and the policy that served it"):
        explain(other, moment, served=served)


def test_the_sentence_names_what_decided() -> None:
    assert "you do not want calls" in sentence([], False, False, 0.9, 0.7, 0.7, 0.9)
    assert sentence([], False, True, 0.9, 0.7, 0.7, 0.9).startswith("not called to learn")
    text = sentence([], False, False, 0.9, 0.7, 0.7, 0.7)
    assert "is 0.70 and must exceed 0.70" in text and "must reach" not in text


def test_the_players_are_all_features_once() -> None:
    assert sorted(column for player in PLAYERS for column in player.columns) == list(range(45))
    with pytest.raises(InputError, match="orders is 0"):
        shapley(lambda rows: rows.sum(axis=1), np.zeros(45), orders=0)


def test_the_waterfall_ends_at_the_score(files: dict[str, Path]) -> None:
    made = explain(Scorer.from_files(**files, policy=Policy(weight=0.3)), {"user_overall_energy": 0.9})
    axes = waterfall(made).axes[0]
    assert axes.get_xlabel() == "calling score"
    assert axes.patches[-1].get_width() == pytest.approx(made.calling_score)
    assert sum(bar.get_width() for bar in axes.patches[:-1]) == pytest.approx(made.calling_score, abs=1e-6)
