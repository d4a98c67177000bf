"""A calling score computed as a reader of the description would, one row at a time, in plain Python.

Nothing here comes from the package but the names of the features: tests hold the graph and the scorer against it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from calling_ai.core.contract import FEATURE_NAMES

VIBES = [name.removeprefix("user_") for name in FEATURE_NAMES[:12]]
NAN = math.nan


def clip(value: float, low: float = 0.0, high: float = 1.0) -> float:
    """Return the nearest value within the range; a missing one stays missing."""
    return value if math.isnan(value) else min(max(value, low), high)


def or_else(value: float, neutral: float) -> float:
    """Return the value, or what stands in where it is missing."""
    return neutral if math.isnan(value) else value


def terms_of(features: Sequence[float], assessment: Sequence[float] | None = None) -> dict[str, float]:
    """Return every term of the formula."""
    named = {name: clip(float(value)) for name, value in zip(FEATURE_NAMES, features, strict=True)}
    user = {vibe: or_else(named[f"user_{vibe}"], 0.5) for vibe in VIBES}
    spot = {vibe: or_else(named[f"spot_{vibe}"], 0.5) for vibe in VIBES}
    apart = {vibe: abs(user[vibe] - spot[vibe]) for vibe in VIBES}

    def exploring(who: Mapping[str, float]) -> float:
        return (who["exploration_eagerness"] + who["novelty_seeking"]) / 2

    match = sum(1 - apart[vibe] for vibe in VIBES) / 12
    energy, social = 1 - apart["overall_energy"], 1 - apart["social_preference"]
    exploration = 1 - abs(exploring(user) - exploring(spot))
    vibe = 0.50 * match + 0.20 * energy + 0.15 * exploration + 0.15 * social
    company = 0.5 * spot["overall_energy"] + 0.5 * spot["social_preference"]

    def connected(network: float, community: float) -> float:
        return 0.40 * vibe + 0.25 * network + 0.20 * community + 0.15 * company

    network = or_else(named["context_network_effects"], 0.5)
    community = or_else(named["context_community_patterns"], 0.5)
    fulfilment = 0.40 * energy + 0.35 * exploration + 0.25 * social
    developmental, educational, company_value, cultural, risk = (
        or_else(clip(float(value)), 0.5) for value in (assessment if assessment is not None else [NAN] * 5)
    )
    shared = 0.30 * developmental + 0.25 * educational + 0.25 * company_value
    influence, trajectory = shared + 0.10 * (1 - risk) + 0.10 * cultural, shared + 0.20 * cultural
    life = 0.40 * trajectory + 0.30 * connected(0.5, 0.5) + 0.20 * influence + 0.10 * fulfilment

    def factor(name: str, base: float) -> float:
        return 1.0 if math.isnan(named[name]) else base + (1 - base) * named[name]

    proximity = named["context_location_proximity"]
    near = 1.0 if math.isnan(proximity) else 0.9 if proximity < 0.5 else 1.1 if proximity > 0.8 else 1.0
    context = near * factor("context_journey_alignment", 0.8) * factor("context_user_receptivity", 0.7)
    context = clip(context * factor("context_opportunity_availability", 0.0))
    timing = factor("timing_optimal_time_of_day", 0.8) * factor("timing_optimal_day_of_week", 0.8)
    timing = clip(timing * factor("timing_user_patterns", 0.7) * factor("timing_opportunity_timing", 0.0))
    connection = connected(network, community)
    score = clip(0.40 * vibe + 0.30 * life + 0.15 * connection + 0.10 * context + 0.05 * timing)
    return {
        "vibe_compatibility": vibe,
        "connection": connection,
        "fulfilment": fulfilment,
        "positive_influence": influence,
        "trajectory": trajectory,
        "life_betterment": life,
        "context_factor": context,
        "timing_factor": timing,
        "formula_score": score,
    }


def answer_of(
    features: Sequence[float],
    network: float = NAN,
    probability: float = NAN,
    *,
    weight: float = 0.0,
    gate: float = 0.70,
    threshold: float = 0.70,
    assessment: Sequence[float] | None = None,
    trend: Sequence[float] | None = None,
    limits: tuple[float, float] = (0.16, 0.36),
    factors: tuple[float, float, float] = (1.0, 1.0, 1.0),
    spread: float | None = None,
) -> dict[str, Any]:
    """Return every column of an answer; NaN for a network is one that gave no usable number."""
    terms = terms_of(features, assessment)
    certainty = 1 - 4 * probability * (1 - probability) if spread is None else clip(1 - 2 * spread)
    level = NAN if math.isnan(certainty) else (0.0 if certainty < limits[0] else 1.0 if certainty < limits[1] else 2.0)
    applied = 0.0 if math.isnan(network) else min(weight * factors[0 if math.isnan(level) else int(level)], 0.5)
    hybrid = terms["formula_score"] if applied == 0 else (1 - applied) * terms["formula_score"] + applied * network
    emerging, community, cultural, life = (or_else(clip(float(v), -1), 0.0) for v in (trend or [NAN] * 4))
    boost = clip(0.30 * emerging + 0.30 * community + 0.20 * cultural + 0.20 * life, -0.1, 0.2)
    boosted = clip(hybrid * (1 + boost))
    calling = boosted if math.isnan(probability) else boosted * probability
    called = calling >= threshold and (math.isnan(probability) or probability > gate)
    return {
        **terms,
        "calling_score": calling,
        "called": float(called),
        "hybrid_score": hybrid,
        "boosted_score": boosted,
        "weight": applied,
        "network_score": network,
        "outcome_probability": probability,
        "certainty": certainty,
        "confidence": level,
    }
