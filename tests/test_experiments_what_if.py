"""What-if answers hold against known truth, and are withheld where the log has no evidence."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from calling_ai.core.contract import FEATURE_NAMES, TREND_NAMES
from calling_ai.core.errors import InputError
from calling_ai.experiments.what_if import changed, welcome_share, what_if, what_if_grid
from calling_ai.score.policy import Policy, decide

RAN = Policy(weight=0.3, gate=0.5, threshold=0.40, exploration=0.05)


def world(seed: int, rows: int = 4_000, users: int = 800, policy: Policy = RAN) -> tuple[pd.DataFrame, np.ndarray]:
    """Return a log and what a call would have brought in each row; people differ in how welcome calls are."""
    generator = np.random.default_rng(seed)
    user = generator.integers(0, users, rows)
    scores = [generator.beta(*shape, rows) for shape in ((6, 3), (5, 3))]
    made = decide(scores[0], scores[1], scores[1], policy=policy, decision_ids=np.arange(rows) + seed * rows)
    likes = generator.normal(0, 0.1, users)[user]
    truth = np.clip(scores[1] + likes + generator.normal(0, 0.15, rows), 0, 1)
    frame = pd.DataFrame(generator.random((rows, 45)), columns=list(FEATURE_NAMES)).assign(
        user_key=user.astype(str),
        formula_score=scores[0],
        network_score=scores[1],
        outcome_probability=scores[1],
        called=made.called,
        propensity=made.propensity,
        outcome_score=np.where(made.called, truth, np.nan),
    )
    return frame, truth


def chances(frame: pd.DataFrame, policy: Policy) -> np.ndarray:
    """Return the probability of a call under a policy."""
    scores = [frame[name].to_numpy() for name in ("formula_score", "network_score", "outcome_probability")]
    return decide(*scores, policy=policy, decision_ids=np.arange(len(frame))).propensity


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"threshold": 0.3}, {"threshold": 0.5}, {"weight": 0.0}, {"gate": 0.65}])
def test_intervals_cover_the_truth(change: dict[str, float], capsys: pytest.CaptureFixture[str]) -> None:
    covered = {"gain": [], "welcome": [], "calls": []}
    for seed in range(40):
        frame, truth = world(seed)
        answer, policy = what_if(frame, RAN, **change), changed(RAN, **change)
        new, old = chances(frame, policy), chances(frame, RAN)
        real = {
            "gain": ((new - old) * (truth - 0.5)).mean(),
            "welcome": (new * (truth >= 0.7)).sum() / new.sum(),
            "calls": new.mean(),
        }
        for name, value in real.items():
            estimate = getattr(answer, name)
            if estimate is None:
                assert answer.reasons
                continue
            covered[name].append(estimate.lower <= value <= estimate.upper)
    rates = {name: float(np.mean(found)) for name, found in covered.items()}
    with capsys.disabled():
        print(f"\nwhat-if {change}: coverage of 95 % intervals in {len(covered['gain'])} worlds of 40 {rates}")
    assert min(len(found) for found in covered.values()) >= 20
    assert min(rates.values()) >= 0.85  # 95 % less four standard errors


def test_the_policy_that_ran_gains_nothing_over_itself() -> None:
    frame, _ = world(1)
    answer = what_if(frame, RAN)
    assert answer.gain is not None and answer.gain.value == 0 and answer.verdict == "cannot tell"
    assert answer.calls.value == answer.calls_before.value == pytest.approx(chances(frame, RAN).mean())
    assert answer.support == pytest.approx(len(frame))


def test_without_exploration_there_is_no_answer() -> None:
    blind = replace(RAN, exploration=0.0)
    frame, _ = world(2, policy=blind)
    for change in ({"threshold": 0.2}, {"threshold": 0.1, "gate": 0.2}):
        answer = what_if(frame, blind, **change)
        assert answer.gain is None and answer.earned is None and answer.welcome is None
        assert answer.verdict == "cannot tell" and any("never" in reason for reason in answer.reasons)
        assert not any("propensities are wrong" in reason for reason in answer.reasons)


def test_trends_of_the_log_move_the_calls() -> None:
    frame, _ = world(3)
    lifted = frame.assign(**dict.fromkeys(TREND_NAMES, 0.5))
    assert what_if(lifted, RAN).calls.value > what_if(frame, RAN).calls.value


def test_a_weight_needs_the_score_of_the_network() -> None:
    frame, _ = world(4)
    with pytest.raises(InputError, match="the log holds no network_score"):
        what_if(frame.drop(columns="network_score"), RAN, weight=0.5)
    with pytest.raises(InputError, match=r"weight is 0.6: it must lie in \[0, 0.5\]"):
        what_if(frame, RAN, weight=0.6)
    with pytest.raises(InputError, match="choices name mood"):
        what_if_grid(frame, RAN, {"mood": [1.0]})


def test_a_grid_says_the_same_as_each_question() -> None:
    frame, _ = world(5)
    grid = what_if_grid(frame, RAN, {"threshold": [0.3, 0.5], "gate": [0.5, 0.6]})
    assert grid[["threshold", "gate"]].to_numpy().tolist() == [[0.3, 0.5], [0.3, 0.6], [0.5, 0.5], [0.5, 0.6]]
    alone = what_if(frame, RAN, threshold=0.5, gate=0.6)
    assert alone.gain is not None and grid["gain"].iloc[3] == alone.gain.value
    assert grid["verdict"].iloc[3] == alone.verdict


def test_no_known_outcome_is_no_share() -> None:
    from calling_ai.experiments.off_policy import call_log

    frame, _ = world(6)
    log = call_log(frame.assign(outcome_score=np.nan))
    share, reasons = welcome_share(log, np.full(len(frame), 0.5), np.zeros(len(frame), bool))
    assert share is None and "no outcome" in reasons[0]
