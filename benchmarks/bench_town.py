"""How fast people live: decisions a second of the town, beside the same policy applied to ready features.

Run with `python benchmarks/bench_town.py [weeks]`; 30 weeks of 2,800 people are a million decisions. The baseline is
the least that a simulation could cost: formula and decision on features that exist already. The ratio says what the
living itself costs.
"""

import sys
import time

from calling_ai.core.contract import FEATURE_NAMES
from calling_ai.score.formula import formula
from calling_ai.score.policy import Policy, decide
from calling_ai.world.people import synthetic_people
from calling_ai.world.town import Town


def main(weeks: int = 30) -> None:
    """Print one line a measurement."""
    town = Town(synthetic_people(2_800, seed=0), seed=1)
    town.simulate(1)  # warm
    begin = time.perf_counter()
    log = town.simulate(weeks)
    lived = time.perf_counter() - begin
    values, ids = log.decisions[list(FEATURE_NAMES)].to_numpy(), log.decisions["record_id"].to_numpy()
    begin = time.perf_counter()
    decide(formula(values).formula_score, policy=Policy(), decision_ids=ids)
    scored = time.perf_counter() - begin
    print(
        f"town: {len(log):,} decisions of {weeks} weeks in {lived:.1f} s, {len(log) / lived:,.0f} a second, "
        f"{1e6 * lived / len(log):.1f} s a million (limit 60)"
    )
    print(
        f"baseline: formula and policy alone on the same features {scored:.1f} s; "
        f"living costs {lived / scored:.1f} times that"
    )


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:2]))
