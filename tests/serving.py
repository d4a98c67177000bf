"""A workspace that serves small networks whose answers are known, for the tests of serving."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scoring_reference import answer_of
from test_models_graph_release import NAMES, network, say

from calling_ai.models.graph import release_bytes
from calling_ai.registry.versions import Registry, Version, VersionDraft
from calling_ai.score.policy import Policy
from calling_ai.score.release import ANSWER

POLICY = Policy(weight=0.4, gate=0.45, threshold=0.3, exploration=0.0)


class Place:
    "A workspace with versions, each known by the seed of its weights."

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root, self.registry = root, Registry(root)
        self.seeds: dict[tuple[str, str], int] = {}  # model and version -> seed
        self.scratch = root / "scratch"
        self.scratch.mkdir(parents=True, exist_ok=True)

    def train(self, seed: int, promote: bool = True, release: bool = True, last: str = "Sigmoid") -> dict[str, Version]:
        "Register both models of one training."
        drafts = []
        for model in NAMES:
            path = self.scratch / f"{model}-{seed}.onnx"
            path.write_bytes(network(model, seed, last))
            drafts.append(VersionDraft(model, "town", path))
        made = self.registry.register(drafts, dict.fromkeys(NAMES, "champion") if promote else None)
        versions = {item.model: item for item in made}
        for model, item in versions.items():
            self.seeds[model, item.version] = seed
        if release:
            self.compose(versions)
        return versions

    def compose(self, versions: Mapping[str, Version], data: bytes | None = None) -> Path:
        "Keep a release of versions; `data` is kept in its place."
        parts = [self.registry.read_file(versions[model]) if model in versions else None for model in NAMES]
        path = self.scratch / "release.onnx"
        path.write_bytes(
            data or release_bytes(*parts, metadata={model: item.version for model, item in versions.items()})
        )
        kept = self.registry.keep_release(path, versions)
        return self.registry.releases / f"{kept.digest}.onnx"

    def promote(self, versions: Mapping[str, Version]) -> None:
        "Make versions champions, one after the other."
        for model, item in versions.items():
            if "champion" not in self.registry.get(model, item.version).aliases:
                self.registry.promote(model, item.version)

    def files(self, versions: Mapping[str, Version]) -> list[Path]:
        "Return every file that could answer for versions."
        kept = self.registry.release(versions)
        found = [self.registry.folder / f"{item.digest}.onnx" for item in versions.values()]
        return found + ([self.registry.releases / f"{kept.digest}.onnx"] if kept else [])

    def wrong(self, scored, values: np.ndarray, policy: Policy = POLICY) -> int:
        "Count the scores that differ from the reference for the versions that they claim."
        said = {
            model: say(values, model, self.seeds[model, scored.versions[model]])
            if model in scored.versions
            else np.full(len(values), math.nan)
            for model in NAMES
        }
        wrong = 0
        for row, moment in enumerate(values):
            expected = answer_of(
                moment,
                *(float(said[model][row]) for model in NAMES),
                weight=policy.weight,
                gate=policy.gate,
                threshold=policy.threshold,
            )
            for name in ANSWER:
                got, want = float(scored.answer[row, ANSWER.index(name)]), expected[name]
                edge = name in ("called", "confidence") and near_edge(expected, policy)
                if not edge and not (math.isnan(got) and math.isnan(want)) and not abs(got - want) <= 2e-6:
                    wrong += 1
        return wrong


def near_edge(expected: Mapping[str, float], policy: Policy) -> bool:
    "Say whether rounding may decide about a call or a level."
    pairs = [
        (expected["calling_score"], policy.threshold),
        (expected["outcome_probability"], policy.gate),
        (expected["certainty"], 0.16),
        (expected["certainty"], 0.36),
    ]
    return any(abs(first - second) < 5e-6 for first, second in pairs)


def moments(rows: int, seed: int = 0, missing: float = 0.2) -> np.ndarray:
    "Return valid moments with holes."
    rng = np.random.default_rng(seed)
    values = rng.random((rows, 45))
    values[rng.random(values.shape) < missing] = np.nan
    return values
