"""Verdicts: what is decided on data with known truth, on bad data, and how often it is wrong."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose

from calling_ai.core.errors import InputError
from calling_ai.core.files import to_json
from calling_ai.experiments.anytime import Running
from calling_ai.experiments.assignment import Experiment, Stage
from calling_ai.experiments.inference import Metric, compare
from calling_ai.experiments.sequential import Spending, crossing, spending_boundary
from calling_ai.experiments.summaries import Cell, Summaries, from_sums, summarise
from calling_ai.experiments.verdict import (
    VERDICTS,
    Guardrail,
    Protocol,
    contrast,
    decide,
    looks_of,
    may_speak,
    split_kept,
    watch,
)

TWO = Experiment(
    "weight",
    "weight",
    {"control": 0.5, "hybrid": 0.5},
    "control",
    stages=(Stage("10 %", {"control": 0.9, "hybrid": 0.1}), Stage("50 %")),
)
PROTOCOL = Protocol(
    TWO,
    20_000,
    Metric("positive", proportion=True),
    guardrails=(Guardrail(Metric("called", proportion=True), 0.2), Guardrail(Metric("latency"), 0.1, better="lower")),
)


def table(
    seed: int,
    effect: float = 0.0,
    *,
    rate: float = 0.1,
    days: int = 15,
    users: int = 1_500,
    step: float = 1.0,
    called: float = 1.0,
    latency: float = 1.0,
    split: tuple[float, float] = (0.1, 0.5),
) -> Summaries:
    """Return summaries of a ramp, with a baseline that steps when its second stage begins on the fifth day."""
    rng, cells, count, sums, products = np.random.default_rng(seed), [], [], [], []
    for day in range(days):
        stage = int(day >= 4)
        treated = rng.binomial(users, split[stage])
        for arm, n, lift, call, slow in (
            ("control", users - treated, 1.0, 1.0, 1.0),
            ("hybrid", treated, 1 + effect, called, latency),
        ):
            share = rate * lift * (step if stage else 1.0)
            values = np.column_stack(
                [rng.random(n) < share, rng.random(n) < 0.4 * call, slow * rng.lognormal(2, 0.4, n)]
            )
            cells.append(Cell(arm, ("10 %", "50 %")[stage], f"2026-03-{day + 1:02d}"))
            count.append(n)
            sums.append(values.sum(axis=0))
            products.append(values.T @ values)
    return from_sums(("positive", "called", "latency"), cells, count, sums, products, arms=("control", "hybrid"))


@pytest.mark.parametrize(
    ("options", "verdict", "word"),
    [
        ({"seed": 1}, "hold", "No gain of hybrid is shown"),
        ({"seed": 2, "step": 2.0}, "hold", "No gain"),
        ({"seed": 3, "effect": 0.3}, "promote", "every guardrail is kept"),
        ({"seed": 4, "effect": -0.25, "step": 1.5}, "roll back", "does harm"),
        ({"seed": 5, "effect": 0.3, "latency": 1.25}, "roll back", "breaks a guardrail: mean of latency"),
        ({"seed": 6, "effect": 0.3, "called": 0.5}, "roll back", "breaks a guardrail: proportion of called"),
        ({"seed": 7, "effect": 0.3, "split": (0.1, 0.44)}, "cannot tell", "The split is not what was promised"),
        ({"seed": 8, "effect": 0.3, "days": 1, "users": 80}, "cannot tell", "Not enough data"),
        ({"seed": 9, "effect": 0.0, "days": 20}, "hold", "the planned maximum is reached, keep the control"),
    ],
)
def test_what_is_decided(options: dict[str, Any], verdict: str, word: str) -> None:
    found = decide(table(**options), PROTOCOL)
    assert found.verdict == verdict and word in " ".join(found.reasons), str(found)
    assert found.verdict in VERDICTS and all(reason.endswith((".", "effect.")) for reason in found.reasons)
    assert json.loads(to_json(found))["verdict"] == verdict  # machines can read it, infinities and all


def test_a_gain_is_held_back_until_the_guardrails_are_shown_to_hold() -> None:
    strict = dataclasses.replace(PROTOCOL, guardrails=(Guardrail(Metric("latency"), 0.001, better="lower"),))
    found = decide(table(3, 0.3), strict)
    assert found.verdict == "hold" and "not shown yet that mean of latency keeps its margin" in found.reasons[0]
    assert found.arms[0].guardrails[0].state == "open"


def test_every_look_is_that_of_the_analysis() -> None:
    summaries = table(10, 0.1)
    looks = looks_of(summaries, PROTOCOL, "hybrid")
    for look in (looks[2], looks[-1]):
        found = compare(summaries.pick(until=look.day), PROTOCOL.metric, treatment="hybrid", method="z-unpooled")
        assert_allclose(look.effect, found.effect, rtol=1e-12)
        assert look.error >= found.error and look.z == pytest.approx(look.effect / look.error)
    bound = spending_boundary(
        [look.fraction for look in looks],
        0.025,
        Spending(),
        "greater",
        np.maximum.accumulate([1 / look.error**2 for look in looks]),
    )
    speaking = np.array([math.isfinite(look.bound) for look in looks])
    assert_allclose(np.array([look.bound for look in looks])[speaking], bound[speaking])
    assert crossing([1 / look.error**2 for look in looks], bound).total <= 0.025 + 1e-9


def test_the_contrast_is_that_of_the_running_watch() -> None:
    summaries, running = table(11, 0.1, step=2.0), Running()
    at = summaries.columns.index("latency")
    for cell, n, mean, scatter in zip(
        summaries.cells, summaries.count, summaries.mean[:, at], summaries.scatter[:, at, at], strict=True
    ):
        running.update((cell.day, cell.stage), "control" if cell.arm == "control" else "treatment", n, mean, scatter)
    found = contrast(summaries, Metric("latency"), "control", "hybrid")
    assert found is not None
    assert_allclose(
        [found.effect, found.error, found.users],
        [running.score / running.weight, math.sqrt(running.variance) / running.weight, 4 * running.weight],
        rtol=1e-6,
    )


def test_ratios_and_relative_effects() -> None:
    summaries = table(12, 0.2)
    ratio, relative = Metric("positive", "called"), contrast(summaries, Metric("latency"), "control", "hybrid", True)
    found = contrast(summaries, ratio, "control", "hybrid")
    assert found is not None and relative is not None and abs(relative.effect) < 0.05
    expected = compare(summaries, ratio, treatment="hybrid", method="z")
    assert_allclose([found.effect, found.error], [expected.effect, expected.error], rtol=0.05)
    verdict = decide(summaries, dataclasses.replace(PROTOCOL, metric=ratio))
    assert verdict.verdict in ("promote", "hold")


def test_lower_may_be_better() -> None:
    faster = dataclasses.replace(PROTOCOL, metric=Metric("latency"), better="lower", guardrails=())
    good, bad = decide(table(13, latency=0.9), faster), decide(table(13, latency=1.1), faster)
    assert (good.verdict, bad.verdict) == ("promote", "roll back")
    effect = good.arms[0].effect
    assert effect is not None and effect.upper < 0


def several(seed: int, rates: dict[str, float], days: int = 10, users: int = 500) -> Summaries:
    """Return summaries of several arms with equal shares."""
    rng = np.random.default_rng(seed)
    cells = [Cell(arm, "", f"2026-04-{day + 1:02d}") for day in range(days) for arm in rates]
    sums = np.array([[float(rng.binomial(users, rates[cell.arm]))] for cell in cells])
    return from_sums(("positive",), cells, [users] * len(cells), sums, sums[:, :, None], arms=tuple(rates))


def test_the_best_of_several_arms_wins_and_a_bad_one_goes() -> None:
    rates = {"control": 0.3, "same": 0.3, "good": 0.36, "better": 0.40, "bad": 0.2}
    protocol = Protocol(
        Experiment("arms", "arms", dict.fromkeys(rates, 0.2), "control"), 10_000, Metric("positive", proportion=True)
    )
    found = decide(several(1, rates), protocol)
    verdicts = {item.arm: item.verdict for item in found.arms}
    assert (found.verdict, found.arm) == ("promote", "better")
    assert verdicts == {"same": "hold", "good": "promote", "better": "promote", "bad": "roll back"}
    assert "largest effect of 2 arms" in found.reasons[-1]


@pytest.mark.slow
def test_no_arm_is_promoted_by_its_number() -> None:
    """Three arms without an effect and a Pocock bound, which forgives least: Holm keeps the error over all of them."""
    rates = dict.fromkeys(("control", "a", "b", "c"), 0.3)
    protocol = Protocol(
        Experiment("arms", "arms", dict.fromkeys(rates, 0.25), "control"),
        2_000,
        Metric("positive", proportion=True),
        alpha=0.1,
        spending=Spending("pocock"),
    )
    promoted = [decide(several(seed, rates, 4, 250), protocol).verdict == "promote" for seed in range(25)]
    assert np.mean(promoted) <= 0.1 + 3 * math.sqrt(0.09 / 25)


@pytest.mark.long
def test_wrong_verdicts_on_tables_without_an_effect() -> None:
    """The whole path from summaries to verdict, with a stepping baseline and the information of each table."""
    words = [
        decide(table(seed, step=2.0, days=14), dataclasses.replace(PROTOCOL, maximum=17_000)).verdict
        for seed in range(600)
    ]
    shares = {word: words.count(word) / len(words) for word in VERDICTS}
    print(shares)
    assert (
        shares["promote"] <= 0.025 + 3 * math.sqrt(0.025 / 600)
        and shares["roll back"] <= 0.03
        and shares["cannot tell"] <= 0.03
    )


def test_looks_may_be_fewer_than_days() -> None:
    summaries = table(3, 0.3)
    found = decide(summaries, PROTOCOL, ["2026-03-08", "2026-03-15"])
    assert found.looks == 2 and found.verdict == "promote"
    few, many = (decide(summaries, PROTOCOL, days).arms[0].looks[-1].bound for days in (["2026-03-15"], None))
    assert few <= many


def test_an_exact_bet_speaks_where_the_normal_distribution_does_not() -> None:
    """Half a per cent of 400 users a day: silent by the normal distribution, but a disaster is seen."""
    rare = table(14, effect=30.0, rate=0.003, days=3, users=400)
    metric = Metric("positive", proportion=True)
    assert not may_speak(rare, metric, "control", "hybrid")
    worse = watch(rare, metric, "control", "hybrid", "greater", 0.025, 1_000)
    assert worse.method == "exact" and worse.rejects
    errors = dataclasses.replace(PROTOCOL, metric=metric, better="lower", guardrails=())
    assert decide(rare, errors).verdict == "roll back"


def test_a_stage_without_control_says_nothing_and_breaks_nothing() -> None:
    full = dataclasses.replace(TWO, stages=(*TWO.stages, Stage("100 %", {"control": 0.0, "hybrid": 1.0})))
    protocol = dataclasses.replace(PROTOCOL, experiment=full)
    more = table(3, 0.3)
    extra = from_sums(
        more.columns,
        [Cell("hybrid", "100 %", "2026-03-16")],
        [1_000],
        [[900.0, 0, 0]],
        [np.diag([900.0, 0, 0])],
        arms=more.arms,
    )
    before, after = decide(more, protocol), decide(more + extra, protocol)
    assert after.verdict == before.verdict
    assert after.arms[0].looks[-1].effect == pytest.approx(before.arms[0].looks[-1].effect)
    stray = from_sums(
        more.columns,
        [Cell("control", "100 %", "2026-03-16")],
        [10],
        [[1.0, 0, 0]],
        [np.diag([1.0, 0, 0])],
        arms=more.arms,
    )
    with pytest.raises(InputError, match="arm control has 10 users in stage 100 %: its share there is zero"):
        decide(more + stray, protocol)


def test_users_of_several_stages_are_linked() -> None:
    """The same people come in both stages: counting them as strangers would promise too much."""
    rng, n = np.random.default_rng(3), 3_000
    user, treated, taste = np.arange(n), rng.random(n) < 0.5, rng.normal(0, 1, n)
    rows = [
        {
            "user_key": f"u{who}",
            "arm": "hybrid" if treated[who] else "control",
            "stage": stage,
            "day": f"2026-03-0{day}",
            "y": 5 + taste[who] + rng.normal(0, 0.2),
        }
        for day, stage in ((1, "a"), (2, "b"))
        for who in user
    ]
    columns = {name: np.array([row[name] for row in rows], dtype=object if name != "y" else float) for name in rows[0]}
    experiment = Experiment("s", "s", {"control": 0.5, "hybrid": 0.5}, "control", stages=(Stage("a"), Stage("b")))
    linked = summarise(columns, ["y"], arms=("control", "hybrid"))
    assert len(linked.shared)
    strangers = summarise(
        {name: column for name, column in columns.items() if name != "user_key"}, ["y"], arms=("control", "hybrid")
    )
    one, two = (contrast(found, Metric("y"), "control", "hybrid") for found in (linked, strangers))
    assert one is not None and two is not None and one.error > 1.3 * two.error
    assert decide(linked, Protocol(experiment, 4_000, Metric("y"))).verdict == "hold"


def cells(rows: list[tuple[Cell, int, float, float]]) -> Summaries:
    """Return summaries of one column from cells, counts, sums and sums of squares."""
    return from_sums(
        ("y",),
        [row[0] for row in rows],
        [row[1] for row in rows],
        [[row[2]] for row in rows],
        [[[row[3]]] for row in rows],
        arms=("control", "hybrid"),
    )


PLAIN = Protocol(Experiment("plain", "plain", {"control": 0.5, "hybrid": 0.5}, "control"), 1_000, Metric("y"))


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ([], "Nobody has been exposed yet"),
        ([(Cell("control"), 5, 5.0, 7.0)], "hybrid has 0 users and the control 5"),
        ([(Cell("control"), 1, 1.0, 1.0), (Cell("hybrid"), 1, 1.0, 1.0)], "hybrid has 1 users and the control 1"),
        ([(Cell("control"), 500, 500.0, 500.0), (Cell("hybrid"), 500, 500.0, 500.0)], "does not vary"),
        ([(Cell("control"), 500, 0.0, 0.0), (Cell("hybrid"), 500, 0.0, 0.0)], "Not enough data"),
        ([(Cell("control", "", "1"), 500, 500.0, 900.0), (Cell("hybrid", "", "2"), 500, 500.0, 900.0)], "cannot tell"),
    ],
)
def test_too_little_is_an_answer(rows: list[tuple[Cell, int, float, float]], word: str) -> None:
    found = decide(cells(rows), PLAIN)
    assert found.verdict == "cannot tell" and word in str(found)


FRAME = {
    "user_key": ["a", "b", "c", "d"],
    "arm": ["control", "hybrid", "control", "hybrid"],
    "y": [1.0, 2.0, 3.0, 4.0],
    "stage": ["s"] * 4,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": ["control", "other", "control", "hybrid"]}, "arm is 'other', which nobody declared"),
        ({"y": [1.0, math.nan, 3.0, 4.0]}, "row 1 of column y is nan"),
        ({"share": [0.5, 0.5, 0.4, 0.5]}, "a split that changes begins a new stage"),
        ({"user_key": ["a", "a", "c", "d"]}, "1 users are in two arms of the same stage"),
        ({"stage": ["new"] * 4}, "stage is 'new'"),
    ],
)
def test_bad_tables_are_refused_before_any_number(change: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        decide(summarise(FRAME | change, ["y"], arms=("control", "hybrid")), PLAIN)


def test_a_guardrail_without_any_event_and_a_ratio_without_a_denominator() -> None:
    """Nobody had an error yet, and nobody was counted below the line: that is too little, and no stack trace."""
    rows = [Cell(arm, "", f"2026-03-0{day}") for day in (1, 2) for arm in ("control", "hybrid")]
    values, squares = np.zeros((4, 3)), np.zeros((4, 3, 3))
    values[:, 0], squares[:, 0, 0] = 300.0, 300.0
    summaries = from_sums(("y", "errors", "visits"), rows, [1_000] * 4, values, squares, arms=("control", "hybrid"))
    guarded = dataclasses.replace(PLAIN, guardrails=(Guardrail(Metric("errors"), better="lower"),))
    found = decide(summaries, guarded)
    assert found.arms[0].guardrails[0].state == "open" and found.verdict == "hold"
    assert decide(summaries, dataclasses.replace(PLAIN, metric=Metric("y", "visits"))).verdict == "cannot tell"


def test_counts_below_zero_are_refused() -> None:
    with pytest.raises(InputError, match="count is -1"):
        cells([(Cell("control"), -1, 0.0, 0.0)])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "the protocol lacks experiment"),
        ({"experiment": TWO}, "the protocol lacks maximum"),
        ({"experiment": TWO, "maximum": 50}, "at least 100 users"),
        ({"experiment": TWO, "maximum": 1e4}, "a whole number"),
        ({"experiment": TWO, "maximum": 1_000, "alfa": 0.05}, "unknown key 'alfa'"),
        ({"experiment": TWO, "maximum": 1_000, "alpha": 0.5}, "alpha is 0.5"),
        ({"experiment": TWO, "maximum": 1_000, "better": "larger"}, "better is 'larger'"),
        ({"experiment": TWO, "maximum": 1_000, "metric": {"column": "y"}}, "unknown key 'column'"),
        ({"experiment": TWO, "maximum": 1_000, "spending": "magic"}, "family is 'magic'"),
        (
            {"experiment": TWO, "maximum": 1_000, "guardrails": [{"metric": "y", "margin": -1}]},
            "margin of mean of y is -1",
        ),
        ({"experiment": TWO, "maximum": 1_000, "guardrails": [{"margin": 0.1}]}, "metric is ''"),
        ({"experiment": {"name": "x"}, "maximum": 1_000}, "lacks arms, control, salt"),
    ],
)
def test_a_bad_protocol_is_one_clear_sentence(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Protocol.from_dict(values)
    assert "\n" not in str(caught.value)


def test_other_refusals() -> None:
    summaries = table(1, days=5)
    with pytest.raises(InputError, match="column is 'engagement'"):
        decide(summaries, dataclasses.replace(PROTOCOL, metric=Metric("engagement")))
    with pytest.raises(InputError, match="is not made of zeros and ones|outside of"):
        decide(summaries, dataclasses.replace(PROTOCOL, metric=Metric("latency", proportion=True)))
    with pytest.raises(InputError, match="values outside of"):
        decide(summaries, dataclasses.replace(PROTOCOL, metric=Metric("latency"), bounded=True))
    with pytest.raises(InputError, match="stage is '10 %'"):
        split_kept(summaries, PLAIN.experiment)
