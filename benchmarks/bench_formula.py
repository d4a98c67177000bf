"""The formula and its validation, against reading the same memory once and against a matrix multiplication.

Baselines in the same run: `numpy.add.reduce` over the features (reading the memory once) and the features times a
39 x 128 matrix (the first layer of a network).
"""

import time
from collections.abc import Callable

import numpy as np

from calling_ai.core.contract import feature_table
from calling_ai.score.formula import formula
from calling_ai.score.policy import Policy, decide


def best_of(work: Callable[[], object], repeats: int = 5) -> float:
    """Return the best of some timings, in seconds."""
    timings = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        timings.append(time.perf_counter() - start)
    return min(timings)


def main() -> None:
    """Print seconds, rows per second and ratios for a million rows and for one."""
    generator = np.random.default_rng(0)
    rows = 1_000_000
    many = generator.uniform(size=(rows, 45))
    many[generator.uniform(size=many.shape) < 0.02] = np.nan
    layer = generator.normal(size=(45, 128))
    ids = np.arange(rows)
    scores = formula(many).formula_score
    timings = {
        "read the memory once (baseline)": best_of(lambda: np.add.reduce(many, axis=1)),
        "matrix 45 x 128 (baseline)": best_of(lambda: many @ layer),
        "validate": best_of(lambda: feature_table(many)),
        "formula with breakdown": best_of(lambda: formula(many), 3),
        "policy with exploration": best_of(lambda: decide(scores, policy=Policy(), decision_ids=ids)),
    }
    matrix = timings["matrix 45 x 128 (baseline)"]
    print(f"{'a million rows':34} {'seconds':>8} {'rows/s':>12} {'x matrix':>9}")
    for name, seconds in timings.items():
        print(f"{name:34} {seconds:8.3f} {rows / seconds:12,.0f} {seconds / matrix:9.2f}")
    one = many[:1]
    single, product = (
        best_of(lambda: [formula(one) for _ in range(1000)]),
        best_of(lambda: [one @ layer for _ in range(1000)]),
    )
    print(f"one row: {single * 1000:.1f} us, {single / product:.0f} x one row times the matrix")


if __name__ == "__main__":
    main()
