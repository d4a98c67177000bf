"""Requests of every kind: each gets the right score, or one clear error that names the field."""

import dataclasses
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scoring_reference import answer_of
from serving import POLICY, moments
from test_models_graph_release import NAMES, network, say

from calling_ai.core.contract import ASSESSMENT_NAMES, FEATURE_NAMES, KNOWN_COLUMNS, TREND_NAMES
from calling_ai.core.errors import InputError
from calling_ai.models.graph import release_bytes
from calling_ai.score.policy import Policy
from calling_ai.serve.releases import Graph, Network, Opened
from calling_ai.serve.scorer import Scorer

PARTS = {model: network(model, seed) for model, seed in zip(NAMES, (1, 2))}
RELEASE = Scorer({}, {}, POLICY, opened=Opened(Graph(release_bytes(*PARTS.values()))))
APART = Scorer({model: Network(data, model, "x") for model, data in PARTS.items()}, {}, POLICY)
GROUPS = ("user", "spot", "context", "timing", "history")
KNOWN = {*FEATURE_NAMES, *ASSESSMENT_NAMES, *TREND_NAMES, *KNOWN_COLUMNS}


@dataclasses.dataclass
class Visit:
    "A request as a dataclass."

    user: dict
    context_weather_context: float | None = None
    history_activity_level: float = math.nan


def value(rng: np.random.Generator) -> Any:
    "Return a value that somebody may send."
    kind = int(rng.integers(30))
    if kind < 18:
        return float(rng.random())
    odd: list[Any] = [None, math.nan, 0, 1, -0.0, np.float64(0.25), np.float32(0.5), np.int64(1), float(rng.normal())]
    odd += [math.inf, -math.inf, 1e308, -1e-300, 5e-324, 10**400, -(10**30), True, False, np.bool_(True)]
    odd += [
        "0.5",
        "",
        "nan",
        "\ud800",
        b"\x00\xff",
        rng.bytes(4),
        [0.5],
        (0.1, 0.2),
        {"a": 0.5},
        {},
        [[[[0.5]]]],
        set(),
        ...,
    ]
    odd += [object(), complex(0.5, 0), np.array(0.5), np.array([0.5, 0.6]), pd.NA, pd.NaT, np.datetime64("NaT")]
    return odd[int(rng.integers(len(odd)))]


def request(rng: np.random.Generator) -> Any:
    "Return a request that somebody may send."
    kind = int(rng.integers(40))
    if kind == 0:
        junk: list[Any] = [
            None,
            5,
            "moment",
            b"\x00" * 9,
            [0.5] * 45,
            [],
            np.zeros(45),
            object(),
            Visit,
            {1, 2},
            rng.bytes(20),
        ]
        return junk[int(rng.integers(len(junk)))]
    if kind == 1:
        return Visit({"overall_energy": value(rng)}, value(rng), value(rng))
    names = [FEATURE_NAMES[index] for index in rng.permutation(45)[: int(rng.integers(46))]]
    made: dict[Any, Any] = {name: float(rng.random()) if kind < 25 else value(rng) for name in names}
    if rng.random() < 0.15:
        made[str(rng.choice([*ASSESSMENT_NAMES, *TREND_NAMES]))] = value(rng)
    if rng.random() < 0.10:
        group = str(rng.choice(GROUPS))
        made[group] = (
            {str(rng.choice(["overall_energy", "weather_context", "nonsense", ""])): value(rng)}
            if rng.random() < 0.7
            else value(rng)
        )
    if rng.random() < 0.05:
        made[
            [5, None, "", "user_", "x" * 2_000, ("a",), "user_overall_energy ", rng.bytes(3), "calling_score"][
                int(rng.integers(9))
            ]
        ] = value(rng)
    if rng.random() < 0.05:
        made[str(rng.choice(["user_id", "opportunity_id", "decision_id", "decided_at"]))] = value(rng)
    return made


def plain(item: Any) -> float | None:
    "Return a number that the contract takes, NaN for a missing one, or nothing for what it refuses."
    if item is None or item is pd.NA or item is pd.NaT:
        return math.nan
    if isinstance(item, bool | np.bool_ | str | bytes | complex) or not isinstance(
        item, int | float | np.integer | np.floating
    ):
        return None
    try:
        number = float(item)
    except OverflowError:
        return None
    return number


def expected(given: Any) -> dict[str, Any] | None:
    "Return what the score must be by the reference, or nothing when the request must be refused."
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        given = dataclasses.asdict(given)
    if not isinstance(given, dict):
        return None
    flat: dict[Any, Any] = {}
    for key, item in given.items():
        if isinstance(item, dict):
            if any(f"{key}_{label}" in flat for label in item):
                return None
            flat.update({f"{key}_{label}": inner for label, inner in item.items()})
        elif key in GROUPS or str(key) in flat:
            return None
        else:
            flat[str(key)] = item
    if not set(flat) <= KNOWN:
        return None
    blocks: dict[str, list[float]] = {}
    for name, names, low in (
        ("features", FEATURE_NAMES, 0),
        ("assessment", ASSESSMENT_NAMES, 0),
        ("trend", TREND_NAMES, -1),
    ):
        row = [plain(flat.get(field)) for field in names]
        if any(number is None or not (math.isnan(number) or low <= number <= 1) for number in row):
            return None
        blocks[name] = row  # type: ignore[assignment]
    values = np.array([blocks["features"]])
    said = [float(say(values, model, seed)[0]) for model, seed in zip(NAMES, (1, 2))]
    return answer_of(blocks["features"], *said, weight=POLICY.weight, gate=POLICY.gate, threshold=POLICY.threshold,
                     assessment=blocks["assessment"], trend=blocks["trend"])  # fmt: skip


def fuzz(scorer: Scorer, count: int, seed: int) -> tuple[int, int]:
    "Score random requests; return how many were answered and how many refused."
    rng, answered, refused = np.random.default_rng(seed), 0, 0
    for trial in range(count):
        given = request(rng)
        wanted = expected(given)
        try:
            score = scorer.score(given)
        except InputError as error:
            assert wanted is None, f"{given!r} was refused: {error}"
            assert len(str(error)) > 10 and "\n" not in str(error)
            refused += 1
            continue
        assert wanted is not None, f"{given!r} was scored"
        assert score.path == "network" and score.reason is None
        for name in (
            "calling_score",
            "hybrid_score",
            "boosted_score",
            "weight",
            "network_score",
            "outcome_probability",
        ):
            got = getattr(score, name)
            assert math.isfinite(got) and 0 <= got <= 1 and abs(got - wanted[name]) < 2e-6, (
                trial,
                name,
                got,
                wanted[name],
            )
        for name, got in score.terms.items():
            assert abs(got - wanted[name]) < 1e-9, (trial, name)
        sure = (
            abs(wanted["calling_score"] - POLICY.threshold) > 1e-5
            and abs(wanted["outcome_probability"] - POLICY.gate) > 1e-5
        )
        assert not sure or score.called == bool(wanted["called"])
        answered += 1
    return answered, refused


@pytest.mark.parametrize("way", ["release", "parts"])
@pytest.mark.parametrize("count", [5_000, pytest.param(50_000, marks=pytest.mark.long)])
def test_fuzzed_requests(way, count):
    answered, refused = fuzz(RELEASE if way == "release" else APART, count, seed=count)
    assert answered > count // 4 and refused > count // 20
    bound = f"below {3 / answered:.3%} with 95 % confidence"
    print(f"{count:,} requests ({way}): {answered:,} scored, 0 wrong ({bound}), {refused:,} refused")


def test_arrays_and_tables_of_any_kind():
    rng = np.random.default_rng(3)
    for _ in range(300):
        shape = [(45,), (3, 45), (2, 39), (0, 45), (2, 44), (2, 3, 45), (45, 2), ()][int(rng.integers(8))]
        kind = ["float64", "float32", "float16", "int64", "bool", "object", "U3", "complex128", "M8[s]"][
            int(rng.integers(9))
        ]
        with np.errstate(all="ignore"):
            values = (rng.random(shape) * 3 - 1).round(int(rng.integers(3)))
            values = np.where(rng.random(shape) < 0.5, np.clip(values, 0, 1), values)
            values = values.astype(kind) if kind != "M8[s]" else values.astype("int64").astype(kind)
        try:
            scored = RELEASE.score_array(values)
        except InputError as error:
            assert len(str(error)) > 10
        else:
            assert scored.answer.shape[0] == np.atleast_2d(values).shape[0]
            assert np.isfinite(scored.calling_score).all()
            floats = np.atleast_2d(values).astype(float)
            assert np.isnan(floats).any() or ((floats >= 0) & (floats <= 1)).all()


@pytest.mark.parametrize("given", ["flat", "grouped", "dataclass", "frame", "arrow", "list"])
def test_every_way_in_gives_the_same_bits(given):
    import pyarrow as pa

    values = moments(4, 9)
    full = RELEASE.score_array(values)
    rows = [{n: v for n, v in zip(FEATURE_NAMES, row.tolist()) if not math.isnan(v)} for row in values]
    if given in ("frame", "arrow", "list"):
        frame = pd.DataFrame(values, columns=list(FEATURE_NAMES))
        table = {"frame": frame, "arrow": pa.Table.from_pandas(frame), "list": rows}[given]
        found = RELEASE.score_frame(table)
        assert type(found).__module__.split(".")[0] == ("pyarrow" if given == "arrow" else "pandas")
        got = np.asarray(found["calling_score"]).tolist()
        assert list(found["path"].to_pylist() if given == "arrow" else found["path"]) == ["network"] * 4
    else:
        made = []
        for row in rows:
            groups: dict[str, dict[str, float]] = {}
            for name, number in row.items():
                groups.setdefault(name.split("_")[0], {})[name.split("_", 1)[1]] = number
            sent = row if given == "flat" else groups
            if given == "dataclass":
                sent = dataclasses.make_dataclass("Sent", list(groups))(**groups)
            made.append(RELEASE.score(sent).calling_score)
        got = made
    assert got == full.calling_score.tolist()


def test_release_and_parts_agree_with_trends_assessments_and_exploration():
    values, rng = moments(500, 11), np.random.default_rng(1)
    policy = Policy(0.3, 0.4, 0.35, 0.2, 9)
    extra = {"assessment": rng.random((500, 5)), "trend": rng.uniform(-1, 1, (500, 4))}
    ids, refused = np.arange(500), rng.random(500) < 0.1
    one = Scorer({}, {}, policy, opened=RELEASE_OPENED).score_array(values, ids, refused, **extra)
    two = Scorer(APART.networks, {}, policy).score_array(values, ids, refused, **extra)
    np.testing.assert_allclose(one.answer, two.answer, atol=1e-6)
    np.testing.assert_array_equal(one.explored, two.explored)
    assert one.explored.any() and not one.called[refused].any() and (one.propensity[refused] == 0).all()


RELEASE_OPENED = Opened(Graph(release_bytes(*PARTS.values())))


def test_one_row_and_a_table_and_eight_threads_agree():
    import threading

    values = moments(2_500, 12)
    whole = RELEASE.score_array(values).answer
    for row in range(0, 2_500, 97):
        np.testing.assert_allclose(RELEASE.score_array(values[row : row + 1]).answer[0], whole[row], rtol=0, atol=1e-6)
    found: dict[int, np.ndarray] = {}

    def work(index: int) -> None:
        found[index] = RELEASE.score_array(values).answer

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answer in found.values():
        np.testing.assert_array_equal(answer, whole)
    spoilt = values.copy()
    spoilt[1_000] = np.nan
    np.testing.assert_array_equal(np.delete(RELEASE.score_array(spoilt).answer, 1_000, 0), np.delete(whole, 1_000, 0))
