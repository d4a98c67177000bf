"""How often experiments are decided wrongly, how often rightly, and with a look after every user: B26 and B27.

Simulated experiments with known truth, 10,000 a cell; shares carry a 99 % upper bound. Named baselines in the same run:
a test that pools the strata (B26), a single look at the same maximum and a sequence without end (B27), and a single
look's bound used again and again (every user). `--runs N` makes everything smaller, `--part` chooses one table.
"""

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import numpy as np

from calling_ai.experiments.anytime import Running
from calling_ai.experiments.sequential import Spending, peeking_error, plan
from calling_ai.experiments.simulate import (
    Rate,
    Scenario,
    error_grid,
    error_table,
    every_user,
    power_row,
    rate_of,
    rollbacks,
    rollouts,
    shown,
)

ALPHA = 0.025
RAMP = ((0.1, 4), (0.5, 16))


def errors(cell: tuple[Scenario, int, int]) -> tuple[list[dict[str, Any]], float]:
    """Return the rows of one world, and the seconds they took."""
    scenario, runs, seed = cell
    began = time.perf_counter()
    return error_table([scenario], runs, (20, 200), ALPHA, seed), time.perf_counter() - began


def b26(pool: ProcessPoolExecutor, runs: int) -> None:
    """Print how often a challenger without an effect is promoted."""
    began = time.perf_counter()
    found = list(pool.map(errors, [(scenario, runs, 100 + index) for index, scenario in enumerate(error_grid())]))
    rows, seconds = [row for part, _ in found for row in part], time.perf_counter() - began
    print(f"B26. False promotions, nominal {ALPHA:.1%} one-sided, bar 3.0 %; {runs:,} rollouts 10-50-100 % a cell")
    print(shown(rows).to_string(index=False))
    shares = [row["promoted"].share for row in rows]
    stepping = [row["pooled"].share for row in rows if row["baseline"] == "step"]
    print(f"worst cell {max(shares):.2%}, mean {np.mean(shares):.2%}")
    print(f"worst false rollback {max(row['rolled_back'].share for row in rows):.2%}")
    print(f"a pooled test promotes {min(stepping):.0%} or more where the baseline steps")
    print(f"{len(rows)} cells in {seconds:.0f} s; the slowest two {max(part for _, part in found):.1f} s\n")


def power(cell: tuple[Scenario, int, int, Spending, int]) -> dict[str, Any]:
    """Return one row of the table of power."""
    scenario, runs, looks, spending, seed = cell
    return {**power_row(scenario, runs, looks, ALPHA, spending, seed), "spending": spending.family}


def b27(pool: ProcessPoolExecutor, runs: int) -> None:
    """Print power, coverage after the stop, and how often harm is caught."""
    worlds = [
        Scenario(rate=0.1, effect=0.065, stages=RAMP),
        Scenario(rate=0.5, effect=0.021, stages=RAMP),
        Scenario(rate=0.005, effect=0.33, stages=RAMP),
        Scenario("heavy", 1.0, effect=0.09, stages=RAMP),
        Scenario(rate=0.1, effect=0.065, stages=RAMP, late=True),
    ]
    cells = [(world, runs, looks, Spending(), 200 + at) for at, world in enumerate(worlds) for looks in (20, 200)]
    cells.append((Scenario(rate=0.1, effect=0.1, stages=((0.5, 20),)), runs, 20, Spending("pocock"), 300))
    print(f"B27. Power against a single look (bar 0.97 x), coverage after the stop (bar 94.5 %), {runs:,} a row")
    print(shown(list(pool.map(power, cells))).to_string(index=False))
    for looks in (5, 20, 200):
        made = plan(looks, ALPHA, 0.9)
        same = made.power_at(made.inflation**-0.5)  # the maximum of a fixed design
        print(f"  by integration, {looks} looks: power {same:.4f}; a single look, the best there is, has 0.9000")
    caught = rollbacks(rollouts(Scenario(effect=-0.25, late=True, baseline="step"), runs, 400), 20)
    found = rate_of(caught.stopped)
    print(f"-25 % rolled back within 20 looks (bar 90 %): {found.share:.2%}, at least {found.lower:.2%}")
    print(f"  half of them by look {int(np.median(caught.at)) + 1}\n")


def ever(cell: tuple[str, float, bool, int]) -> tuple[str, Rate]:
    """Return how often a metric is ever rejected, with a look after every one of 10,000 users."""
    metric, rate, ramp, runs = cell
    label = f"{metric}{f' {rate:.0%}' if rate else ''}, {'10-50 %' if ramp else '50 %'}"
    return label, every_user(metric, rate, runs=runs, ramp=ramp, seed=7)


def repeated(runs: int, users: int = 10_000) -> float:
    """Return how often |Z| > 1.96 at one of the looks after the first hundred users, without an effect."""
    rng, count, hits = np.random.default_rng(3), np.arange(1, users + 1), 0
    for _ in range(runs):
        z = np.cumsum(rng.normal(0, 1, users)) / np.sqrt(count)
        hits += bool((np.abs(z[100:]) > 1.96).any())
    return hits / runs


def each_user(pool: ProcessPoolExecutor, runs: int) -> None:
    """Print how often experiments without an effect are ever rejected when every user is a look."""
    users = max(200, runs // 4)
    print(
        f"A look after every one of 10,000 users, {users:,} experiments without an effect a row; alpha 5 %, two-sided"
    )
    grid = [("proportion", rate, ramp, users) for rate in (0.01, 0.1, 0.5) for ramp in (False, True)]
    grid += [
        (metric, 0.0, ramp, users) for metric in ("normal", "skewed", "heavy", "clustered") for ramp in (False, True)
    ]
    found = list(pool.map(ever, grid))
    for label, rate in found:
        print(f"  {label:<24} ever rejected {rate}")
    naive = repeated(users)
    worst = max(rate.share for _, rate in found)
    print(f"  a single look's bound again and again {naive:.0%}, {naive / worst:.0f} x the worst")
    print(f"  outcomes counted as if they were users {every_user('clustered', runs=100, users=2_000, rows=True)}")
    print(f"  five looks at 1.96, exact: {peeking_error(5):.4f}\n")


def running(pool: ProcessPoolExecutor, runs: int) -> None:
    """Print what a batch costs a running sequence."""
    watch, values, began, laps = Running(), np.random.default_rng(1).normal(size=20_001), time.perf_counter(), [0.0]
    for batch in range(1, 20_001):
        watch.update(batch % 40, ("control", "treatment")[batch % 2], 50, float(values[batch]), 50.0)
        watch.sequence()
        if batch in (2_000, 20_000):
            laps.append(time.perf_counter() - began)
    early, late = laps[1] / 2_000, (laps[2] - laps[1]) / 18_000
    print(f"A running sequence: {1e6 * late:.1f} us a batch, {late / early:.2f} x the first 2,000 (constant is 1)")


PARTS: dict[str, Callable[[ProcessPoolExecutor, int], None]] = {
    "b26": b26,
    "b27": b27,
    "users": each_user,
    "running": running,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000, help="experiments a cell")
    parser.add_argument("--part", choices=list(PARTS), help="one of the tables")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args()
    with ProcessPoolExecutor(options.processes) as workers:
        for name in [options.part] if options.part else PARTS:
            PARTS[name](workers, options.runs)
