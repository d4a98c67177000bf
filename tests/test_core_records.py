"""Records, errors, progress and pictures: small promises, checked."""

import dataclasses
import errno
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calling_ai.core import errors
from calling_ai.core.errors import CallingError, InputError, StorageError, explain_os_error
from calling_ai.core.plots import COLOURS, CYCLE, figure, interval_bars
from calling_ai.core.progress import PROGRESS_FILE, report, track
from calling_ai.core.records import Estimate, Record, explained, format_value

FINITE = st.floats(-1e6, 1e6)


@dataclasses.dataclass(frozen=True)
class Inner(Record):
    """A record inside of a record."""

    size: int = explained("a <b>size</b>")


@dataclasses.dataclass(frozen=True)
class Outer(Record):
    """A record with everything in it."""

    name: str = explained("a name")
    inner: Inner = explained("another record")
    many: tuple = explained("several", default=())
    table: dict = explained("by name", default_factory=dict)


def test_records_are_frozen_and_become_dictionaries() -> None:
    record = Outer("<i>x</i>", Inner(3), (Inner(4), 5), {"a": Inner(6), "b": [1]})
    assert record.to_dict() == {
        "name": "<i>x</i>",
        "inner": {"size": 3},
        "many": [{"size": 4}, 5],
        "table": {"a": {"size": 6}, "b": [1]},
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.name = "y"  # type: ignore[misc]


def test_records_escape_what_they_show() -> None:
    page = Outer("<i>x</i>", Inner(3))._repr_html_() + Inner(1)._repr_html_()
    assert "<i>" not in page and "&lt;i&gt;" in page and "a &lt;b&gt;size" in page


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "–"),
        (True, "yes"),
        (0.123456, "0.1235"),
        (1234567, "1,234,567"),
        ({"a": 0.5, "b": None}, "a: 0.5, b: –"),
        ([], "–"),
        ((1, 2.0), "1, 2"),
        ("x", "x"),
        (np.float64(0.5), "0.5"),
    ],
)
def test_values_are_shown_short(value: object, text: str) -> None:
    assert format_value(value) == text


@given(FINITE, FINITE, FINITE)
def test_an_estimate_claims_only_what_its_interval_shows(value: float, first: float, second: float) -> None:
    lower, upper = sorted((first, second))
    estimate = Estimate(value, lower, upper)
    assert estimate.excludes_zero == (not lower <= 0 <= upper)
    digits = 3 if upper - lower >= 0.01 else 4 if upper - lower >= 0.001 else 5
    assert str(estimate) == f"{value:.{digits}f} [{lower:.{digits}f}, {upper:.{digits}f}]"
    if lower < upper:
        with pytest.raises(InputError, match="lower is .*: it must not exceed upper"):
            Estimate(value, upper, lower)


@pytest.mark.parametrize("confidence", [0, 1, -0.5, 95, math.nan])
def test_a_confidence_lies_between_0_and_1(confidence: float) -> None:
    with pytest.raises(InputError, match="confidence is"):
        Estimate(0, 0, 0, confidence)


def test_every_error_is_ours_and_what_python_expects() -> None:
    family = [getattr(errors, name) for name in errors.__all__ if name.endswith("Error")]
    assert len(family) >= 9 and all(issubclass(kind, CallingError) for kind in family)
    expected = {
        "InputError": ValueError,
        "InputTypeError": TypeError,
        "SettingsError": ValueError,
        "NotFoundError": LookupError,
        "StorageError": OSError,
        "UnavailableError": ImportError,
    }
    for name, builtin in expected.items():
        assert issubclass(getattr(errors, name), builtin)
    for kind in family:
        caught = kind("one sentence")
        assert str(caught) == "one sentence" and caught.exit_code == (3 if kind is errors.RefusedError else 1)


@pytest.mark.parametrize("code", sorted(errno.errorcode))
def test_every_error_of_the_disk_has_a_reason(code: int) -> None:
    explained_error = explain_os_error(OSError(code, "text of the system"), "writing report.html")
    assert isinstance(explained_error, StorageError)
    prefix, _, reason = str(explained_error).partition(" failed: ")
    assert prefix == "writing report.html" and reason
    if code in (errno.ENOSPC, errno.EDQUOT):
        assert "free some space" in reason


def lines(path: Path) -> list[dict]:
    """Return the progress lines written so far."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_progress_goes_to_the_file_that_the_environment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "progress.jsonl"
    monkeypatch.setenv(PROGRESS_FILE, str(file))
    assert list(track(range(1000), "counting")) == list(range(1000))
    found = lines(file)
    assert found[0] == {"description": "counting", "done": 0, "total": 1000}
    assert found[-1] == {"description": "counting", "done": 1000, "total": 1000}
    assert len(found) < 100, "progress is throttled"
    assert list(track(iter("ab"), "letters")) == ["a", "b"]
    assert lines(file)[-1] == {"description": "letters", "done": 2, "total": None}
    assert list(track([], "nothing")) == []
    report(3, 4, "by hand")
    assert lines(file)[-1] == {"description": "by hand", "done": 3, "total": 4}


def test_progress_is_silent_elsewhere(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PROGRESS_FILE, raising=False)
    assert list(track(range(5), "counting")) == list(range(5))
    report(1, 2, "nobody listens")
    assert capfd.readouterr() == ("", "")


def test_progress_never_stops_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROGRESS_FILE, str(tmp_path / "missing" / "progress.jsonl"))
    assert sum(track([1, 2], "adding")) == 3


def test_progress_lets_errors_through() -> None:
    def broken() -> object:
        yield 1
        raise RuntimeError("source failed")

    with pytest.raises(RuntimeError, match="source failed"):
        list(track(broken(), "breaking"))  # type: ignore[arg-type]


def luminance(colour: str) -> float:
    """Return the relative luminance of a colour as WCAG 2 defines it."""
    parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_are_apart_and_text_is_readable() -> None:
    assert len(set(CYCLE)) == len(CYCLE) and set(CYCLE) <= set(COLOURS.values())
    assert COLOURS["formula"] != COLOURS["network"] != COLOURS["best"]
    assert 1.05 / (luminance(COLOURS["ink"]) + 0.05) > 7
    assert all(1.05 / (luminance(COLOURS[name]) + 0.05) > 3 for name in ("formula", "network", "best", "grey"))


def test_interval_bars_draw_what_they_are_given() -> None:
    fig, ax = figure()
    interval_bars(
        ax, ["formula", "network"], [0.6, 0.7], [0.58, 0.69], [0.62, 0.71], [COLOURS["formula"], COLOURS["network"]]
    )
    spans = [line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 2]
    assert [list(span) for span in spans] == [[0.58, 0.62], [0.69, 0.71]]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["formula", "network"]
    bottom, top = ax.get_ylim()
    assert bottom > top, "the first row is on top"
    with pytest.raises(InputError, match="the numbers must agree"):
        interval_bars(ax, ["one"], [0.5, 0.6], [0.4], [0.6])
    from matplotlib import pyplot

    pyplot.close(fig)
