"""Assignment and off-policy evaluation: speed against named baselines, and coverage of the truth at full size.

Baselines in the same run: a bare loop of hashlib over the same ids, and one weighted mean over the same rows.
`coverage` draws users, calls and outcomes anew from a town whose probabilities are known, and counts how often an
interval is given and how often it covers the true value of a policy; the tests run it at a bounded size.
"""

import argparse
import hashlib
import secrets
import time
from collections.abc import Callable

import numpy as np
import pandas as pd

from calling_ai.experiments.assignment import assign, positions, ramp_up
from calling_ai.experiments.off_policy import (
    call_features,
    call_log,
    cross_fit,
    doubly_robust,
    evaluate_policy,
    ips,
    logged,
    mean_interval,
    snips,
)
from calling_ai.score.policy import Policy
from calling_ai.world.people import bfi_people
from calling_ai.world.town import Town


def best_of(work: Callable[[], object], repeats: int = 3) -> float:
    """Return the best of some timings, in seconds."""
    timings = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        timings.append(time.perf_counter() - start)
    return min(timings)


def bare_loop(users: list[str]) -> list[int]:
    """Return a number for each user by the plainest loop there is."""
    return [int.from_bytes(hashlib.sha256(f"salt:{user}".encode()).digest()[:8], "big") for user in users]


def coverage(
    runs: int = 1_000,
    people: int = 2_800,
    sizes: tuple[int, ...] = (100, 300, 1_000),
    explorations: tuple[float, ...] = (0.001, 0.005, 0.02, 0.05, 0.1),
    seed: int = 0,
) -> pd.DataFrame:
    """Count, by exploration, policy and users, how often an interval is given and how often it covers the truth."""
    log = Town(bfi_people().head(people), seed=11).simulate(2, Policy(threshold=0.66, exploration=0.05))
    calls, rng = call_log(log.decisions), np.random.default_rng(seed)
    truth, formula = log.truth["truth_probability"].to_numpy(), calls.scores["formula_score"]
    predicted = cross_fit(call_features(calls), calls.reward, calls.user, calls.heard)
    gain = 0.5 * truth - 0.15  # of a call: 0.35 when it turns out well, -0.15 when not
    chosen = {
        "the same": formula >= 0.66,
        "near": formula >= 0.65,
        "looser": formula >= 0.60,
        "hybrid": 0.7 * formula + 0.3 * truth >= 0.60,
        "all": np.ones(len(calls), bool),
    }
    code = np.unique(calls.user.astype(str), return_inverse=True)[1]
    order = np.argsort(code, kind="stable")
    ends = np.searchsorted(code[order], np.arange(code.max() + 2))
    found = {}
    for exploration in explorations:
        ran = np.where(chosen["the same"], 1 - exploration, exploration)
        for name, would in chosen.items():
            chance = np.where(would, 1 - exploration, exploration)
            true = float((chance * gain).mean())
            for users in sizes:
                told, covered = 0, {"ips": 0, "snips": 0, "dr": 0}
                for _ in range(runs):
                    drawn = rng.integers(0, code.max() + 1, users)
                    rows = np.concatenate([order[ends[one] : ends[one + 1]] for one in drawn])
                    who = np.repeat(np.arange(users), np.diff(ends)[drawn])
                    done = rng.random(len(rows)) < ran[rows]
                    got = np.where(done, 0.5 * (rng.random(len(rows)) < truth[rows]) - 0.15, 0)
                    item = logged(
                        got,
                        np.where(done, ran[rows], 1 - ran[rows]),
                        np.where(done, chance[rows], 1 - chance[rows]),
                        who,
                        np.where(done, predicted[rows], 0),
                        chance[rows] * predicted[rows],
                    )
                    if evaluate_policy(item, "dr").value is None:
                        continue
                    told += 1
                    for estimator, terms in (("ips", ips), ("snips", snips), ("dr", doubly_robust)):
                        value = mean_interval(terms(item), item.user)
                        covered[estimator] += value.lower <= true <= value.upper
                rates = {estimator: number / told if told else np.nan for estimator, number in covered.items()}
                found[exploration, name, users] = {"told": told, **rates}
    table = pd.DataFrame(found).T.rename_axis(["exploration", "policy", "users"])
    return table.astype({"told": int})


def main() -> None:
    """Print seconds and ratios, then the table of coverage."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=60, help="runs of each cell of the table of coverage")
    arguments = parser.parse_args()
    users = [secrets.token_hex(32) for _ in range(1_000_000)]
    repeated = users[:50_000] * 20
    rollout = ramp_up("hybrid", "salt", "formula", "hybrid")
    timings = {
        "bare loop of hashlib (baseline)": best_of(lambda: bare_loop(users)),
        "positions of a million ids": best_of(lambda: positions(users, "salt")),
        "arms of a million ids": best_of(lambda: assign(users, rollout, "10 %")),
        "arms of a million rows, 50,000 ids": best_of(lambda: assign(repeated, rollout, "10 %")),
    }
    base = timings["bare loop of hashlib (baseline)"]
    print(f"{'a million':38} {'seconds':>8} {'x loop':>8}")
    for name, seconds in timings.items():
        print(f"{name:38} {seconds:8.3f} {seconds / base:8.2f}")
    rng = np.random.default_rng(0)
    rows = 1_000_000
    reward, chance, target, who = (
        rng.random(rows),
        rng.uniform(0.02, 0.98, rows),
        rng.random(rows),
        np.repeat(np.arange(rows // 20), 20),
    )
    log = logged(reward, chance, target, who, reward * 0.9, reward * 0.8)
    timings = {
        "one weighted mean (baseline)": best_of(lambda: (reward * target / chance).mean()),
        "DR with interval over users": best_of(lambda: mean_interval(doubly_robust(log), log.user)),
        "evaluation with diagnostics": best_of(lambda: evaluate_policy(log, "dr")),
    }
    base = timings["one weighted mean (baseline)"]
    print(f"\n{'a million rows':38} {'seconds':>8} {'x mean':>8}")
    for name, seconds in timings.items():
        print(f"{name:38} {seconds:8.3f} {seconds / base:8.2f}")
    print(f"\nshare of the intervals given, nominally 95 %, that cover the truth ({arguments.runs} runs a cell):")
    print(coverage(arguments.runs).to_string(float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
