"""Effects drawn together against a numerical integral, a textbook, and by simulation; small segments stay hidden."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from calling_ai.core.errors import InputError
from calling_ai.experiments.inference import Metric, compare
from calling_ai.experiments.segments import FEWEST, OTHERS, WIDTH, by_segment, join_small, shrunk, summarise_segments
from calling_ai.experiments.summaries import Summaries, summarise

SCHOOLS = ([28, 8, -3, 7, -1, 1, 18, 12], [15, 10, 16, 11, 9, 11, 10, 18])


@pytest.mark.parametrize("prior", ["half-cauchy", "flat"])
def test_posterior_means_against_quadrature(prior: str) -> None:
    from scipy.integrate import quad

    d, s = (np.array(column, dtype=float) for column in SCHOOLS)
    scale = WIDTH * math.sqrt(np.mean(s**2))

    def density(tau: float) -> float:
        total = s**2 + tau**2
        centre = (d / total).sum() / (1 / total).sum()
        log = -0.5 * math.log((1 / total).sum()) - 0.5 * np.log(total).sum() - 0.5 * ((d - centre) ** 2 / total).sum()
        return math.exp(log + 40) / (1 + (tau / scale) ** 2 if prior == "half-cauchy" else 1)

    def mean(tau: float, j: int) -> float:
        total = s**2 + tau**2
        centre = (d / total).sum() / (1 / total).sum()
        return centre + tau**2 / total[j] * (d[j] - centre)

    whole = quad(density, 0, 900, points=[10, 50], limit=400)[0]
    expected = [
        quad(lambda tau, j=j: density(tau) * mean(tau, j), 0, 900, points=[10, 50], limit=400)[0] / whole
        for j in range(8)
    ]
    found = shrunk(*SCHOOLS, prior=prior)
    assert_allclose(found.effect, expected, rtol=2e-4)
    assert (found.lower < found.effect).all() and (found.effect < found.upper).all()


def test_heterogeneity_against_statsmodels() -> None:
    from statsmodels.stats.meta_analysis import combine_effects

    oracle = combine_effects(np.array(SCHOOLS[0], float), np.square(SCHOOLS[1]).astype(float)).test_homogeneity()
    assert_allclose(shrunk(*SCHOOLS).pvalue, oracle.pvalue, rtol=1e-9)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.integers(0, 99))
def test_estimates_lie_between_their_own_data_and_the_rest(effects: list[float], seed: int) -> None:
    d = np.array(effects)
    s = np.random.default_rng(seed).uniform(0.2, 2, len(d))
    found = shrunk(d, s, points=500)
    assert (found.effect >= d.min() - 1e-6).all() and (found.effect <= d.max() + 1e-6).all()
    assert (found.upper - found.lower <= 2 * 1.96 * s * 1.3 + 1e-6).all()
    shifted = shrunk(10 + 3 * d, 3 * s, points=500)
    assert_allclose(shifted.effect, 10 + 3 * found.effect, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0])
def test_coverage_and_error_over_many_experiments(spread: float) -> None:
    rng = np.random.default_rng(3)
    runs, segments = 250, 8
    covered, shrunk_error, raw_error = 0, 0.0, 0.0
    for _ in range(runs):
        truth = rng.normal(1.0, spread, segments)
        s = rng.uniform(0.5, 1.5, segments)
        d = rng.normal(truth, s)
        found = shrunk(d, s, points=200)
        covered += int(((found.lower <= truth) & (truth <= found.upper)).sum())
        shrunk_error += float(((found.effect - truth) ** 2).sum())
        raw_error += float(((d - truth) ** 2).sum())
    share = covered / runs / segments
    print(f"spread {spread}: coverage {share:.3f}, squared error {shrunk_error / raw_error:.2f} of the raw one")
    assert share >= 0.935  # the effects of one experiment hang together, so the band is wider than that of a share
    assert shrunk_error < {0.0: 0.45, 0.5: 0.6, 2.0: 0.95}[spread] * raw_error


def group(count: int, seed: int = 0) -> Summaries:
    """Return a segment of so many people."""
    rng = np.random.default_rng(seed)
    arm = np.where(np.arange(count) % 2 == 0, "control", "treatment")
    return summarise({"arm": arm, "y": rng.normal(0, 1, count)}, arms=("control", "treatment"))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=7))
def test_nobody_is_singled_out(sizes: list[int]) -> None:
    segments = {f"s{i}": group(size, i) for i, size in enumerate(sizes)}
    shown, left_out = join_small(segments)
    assert all(each.users() >= FEWEST for each in shown.values())
    assert sum(each.users() for each in shown.values()) + left_out == sum(sizes)
    hidden = set(segments) - set(shown)
    small = {name for name, each in segments.items() if each.users() < FEWEST}
    assert small <= hidden
    assert len(hidden) != 1 or len(segments) == 1 or not shown  # one alone would follow by subtraction
    if OTHERS in shown:
        assert shown[OTHERS].users() == sum(segments[name].users() for name in hidden)


def test_one_small_segment_takes_the_next_with_it() -> None:
    shown, left_out = join_small({"a": group(100), "b": group(50), "c": group(5)})
    assert (list(shown), shown[OTHERS].users(), left_out) == (["a", OTHERS], 55, 0)
    lopsided = summarise({"arm": ["control"] * 60, "y": np.arange(60.0)}, arms=("control", "treatment"))
    shown, _ = join_small({"a": group(100), "b": group(50), "c": lopsided}, ("control", "treatment"))
    assert list(shown) == ["a", OTHERS]


def visits(seed: int = 0, size: int = 3_000) -> pd.DataFrame:
    """Return users of four segments, one of which gains."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "arm": np.where(rng.random(size) < 0.5, "control", "treatment"),
            "place": rng.choice(["a", "b", "c", "d"], size),
        }
    )
    rate = 0.3 + 0.2 * ((frame.arm == "treatment") & (frame.place == "c"))
    return frame.assign(y=(rng.random(size) < rate).astype(float), user_key=np.arange(size))


def test_segments_of_a_frame() -> None:
    frame = visits()
    parts = summarise_segments(frame, "place")
    found = by_segment(parts, Metric(proportion=True), method="z-unpooled")
    assert found.names[0] == "c" and found.pvalue < 0.01 and found.left_out == 0
    for name, raw in zip(found.names, found.raw, strict=True):
        oracle = compare(parts[name], Metric(proportion=True), method="z-unpooled")
        assert (raw.effect, raw.error) == (oracle.effect, oracle.error)
    table = found.frame()
    assert table["users"].sum() == len(frame) and (table["effect"].diff().dropna() <= 0).all()
    assert found.shrunk.effect[0] < found.raw[0].effect  # drawn towards the others
    missing = frame.assign(place=frame.place.where(frame.place != "d"))
    assert set(summarise_segments(missing, "place")) == {"a", "b", "c", "unknown"}


def test_bad_input_is_refused() -> None:
    frame = visits()
    with pytest.raises(InputError, match="lacks the column weather"):
        summarise_segments(frame, "weather")
    twice = pd.concat([frame[:5], frame[:5].assign(place="z")])
    with pytest.raises(InputError, match="differs within a user"):
        summarise_segments(twice, "place")
    with pytest.raises(InputError, match="two are needed"):
        by_segment({"a": group(100), "b": group(5)})
    with pytest.raises(InputError, match="never shown"):
        by_segment({"a": group(100), "b": group(50)}, fewest=3)
    with pytest.raises(InputError, match="segments is empty"):
        join_small({})
    with pytest.raises(InputError, match="that name is for small"):
        join_small({OTHERS: group(100)})
    still = summarise({"arm": ["control", "treatment"] * 30, "y": np.zeros(60)})
    with pytest.raises(InputError, match="does not vary"):
        by_segment({"a": group(100), "b": still})
    for effects, errors, message in (
        ([1.0], [1.0], "two segments or more"),
        ([1.0, math.nan], [1.0, 1.0], "must be finite"),
        ([1.0, 2.0], [1.0, 0.0], "above zero"),
        ([1.0, 2.0], [1.0, math.inf], "above zero"),
    ):
        with pytest.raises(InputError, match=message):
            shrunk(effects, errors)
    with pytest.raises(InputError, match="prior is 'normal'"):
        shrunk([1.0, 2.0], [1.0, 1.0], prior="normal")
    with pytest.raises(InputError, match="confidence is 2"):
        shrunk([1.0, 2.0], [1.0, 1.0], confidence=2)
