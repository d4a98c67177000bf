"""Reports: offline, safe, small and complete; the list of runs."""

import base64
import dataclasses
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from calling_ai.core.errors import InputError, IntegrityError
from calling_ai.operate.reports import (
    MAX_BYTES,
    Headline,
    RunRecord,
    formula_html,
    index,
    page,
    read_run,
    render,
    write_run,
)

EVIL = """<script>alert(1)</script><img src=x onerror=alert(2)><a href="javascript:alert(3)">a</a>"""


SITE = "https://example.org"
LOADS = f"""{EVIL}<link rel=stylesheet href={SITE}/a.css><style>@import url({SITE})</style><iframe src={SITE}></iframe>
<table style='background:url({SITE})'><tr><td background='//x.org/a'>1</td></tr></table>
<svg><a xlink:href='{SITE}'><text>t</text></a></svg><form action={SITE}><button>b</button></form>"""
PICTURE = '<svg xmlns="http://www.w3.org/2000/svg"><script>alert(5)</script><rect width="1" height="1"/></svg>'
FRAME = """<table border='1' class='dataframe'>
<thead><tr style='text-align: right;'><th></th><th>name</th><th>share</th></tr>
<tr><th>part</th><th></th><th></th></tr></thead>
<tbody><tr><th>a</th><td>x</td><td>0.5 [0.4, 0.6]</td></tr>
<tr><th>b</th><td>7</td><td>−1.5e-3</td></tr></tbody></table>"""
ERROR = {"ename": "ValueError", "evalue": "<b>", "traceback": ["\x1b[31mValueError\x1b[39m: <b>"]}


class Reader(HTMLParser):
    "Collects the tags, the addresses and the visible text of a page."

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.inside.append(tag)

    def handle_endtag(self, tag):
        if tag in self.inside:
            while self.inside.pop() != tag:
                pass

    def handle_data(self, data):
        if "style" not in self.inside:
            self.text += data


def assert_offline(path: Path) -> Reader:
    "Assert that a page neither loads nor runs nor leads to anything outside of its folder."
    text = path.read_text()
    assert len(text.encode()) <= MAX_BYTES
    assert not re.search(r"(?i)(https?|ftp|wss?|file)://|@import|url\(|<link|<script|<iframe|<object|<base", text)
    reader = Reader(text)
    assert "script" not in reader.tags and "default-src 'none'" in text
    for tag, name, value in reader.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "srcset", "href", "action", "poster", "data"):
            assert value.startswith(("data:image/", "#")) or not re.match(r"(?i)\s*([a-z][a-z0-9+.-]*:|//)", value), (
                value
            )
    return reader


def png(width: int, height: int, seed: int = 0) -> str:
    from PIL import Image

    stream = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def shown(data: dict) -> nbformat.NotebookNode:
    return nbformat.v4.new_output("display_data", data=data)


def notebook(path: Path, *cells, facts: dict | None = None) -> Path:
    content = nbformat.v4.new_notebook(cells=list(cells), metadata={"calling_ai": facts} if facts else {})
    nbformat.write(content, path)
    return path


FACTS = {
    "ok": True,
    "notebook": "a.ipynb",
    "notebook_digest": "ab" * 32,
    "started_at": "2026-03-01T06:00:00Z",
    "seconds": 200.0,
    "cells": 4,
}
MARK, CODE = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell


# --- one report ------------------------------------------------------------------------------------------------------


def test_a_report_is_offline_whatever_a_notebook_holds(tmp_path):
    path = notebook(
        tmp_path / "a.ipynb",
        MARK(f"# Title\n\n## See [a paper]({SITE}/paper) {EVIL}\n\n![picture]({SITE}/p.png) at http://example.org"),
        CODE(
            "open('https://example.org')  # where",
            outputs=[
                shown({"text/html": LOADS}),
                shown({"application/javascript": "alert(4)"}),
                shown({"image/svg+xml": PICTURE}),
                shown({"text/plain": "see https://example.org <b>"}),
                nbformat.v4.new_output("stream", name="stdout", text="https://example.org <script>"),
                nbformat.v4.new_output("stream", name="stderr", text="a warning"),
            ],
        ),
        facts=FACTS,
    )
    render(
        path,
        tmp_path / "a.html",
        f"T {EVIL}",
        subtitle=EVIL,
        navigation=[(EVIL, "https://example.org"), ("b", "//example.org"), ("c", "b c.html")],
    )
    reader = assert_offline(tmp_path / "a.html")
    assert "see https://example.org <b>" in reader.text and "a paper" in reader.text  # text stays readable
    assert "<script>alert(1)</script>" in reader.text  # of the title: as text
    assert "a warning" not in reader.text and "alert(4)" not in reader.text
    assert ("a", "href", "b%20c.html") in reader.attributes


def test_what_is_for_reading_is_there_and_the_rest_is_not(tmp_path):
    parameters = [
        {"name": "seed", "type": "int", "default": 0, "value": 7, "help": "seed <of> all"},
        {"name": "label", "type": "str", "default": "", "value": "", "help": "a name"},
    ]
    path = notebook(
        tmp_path / "a.ipynb",
        MARK("# Own title\n\n> What is asked here?"),
        CODE("seed: int = 0  # seed", metadata={"tags": ["parameters"]}),
        CODE("seed = 7", metadata={"tags": ["injected-parameters"]}),
        CODE("#| hide\nplumbing = 1", outputs=[shown({"text/plain": "hidden output"})]),
        MARK("## First\n\nWith $a^2$ and `$code$`, costs $5 and $6."),
        CODE("#| eval: true\nvisible = 2", outputs=[shown({"image/png": png(30, 20)})]),
        MARK("## Second"),
        MARK("## Second"),
        MARK("### Detail"),
        CODE("t", outputs=[shown({"text/html": FRAME})]),
        facts={**FACTS, "parameters": parameters},
    )
    render(path, tmp_path / "a.html", "Given title", navigation=[("Runs", "index.html"), ("This", "a.html")])
    reader = assert_offline(tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    for gone in ("Own title", "plumbing", "hidden output", "#| eval", "seed = 7", "seed: int"):
        assert gone not in reader.text, gone
    for there in (
        "Given title",
        "What is asked here?",
        "seed <of> all",
        "visible",
        "costs $5 and $6",
        "$code$",
        "3 min 20 s",
        "1 March 2026, 06:00 UTC",
        "ab" * 32,
    ):
        assert there in reader.text, there
    assert '<td class="changed">7</td>' in text and "On this page" in text
    assert text.count("<summary>Show code</summary>") == 2 and "<details open" not in text
    anchors = [value for _, name, value in reader.attributes if name == "id"]
    assert len(anchors) == len(set(anchors)) and {"first", "second", "second-", "detail"} <= set(anchors)
    for target in [value[1:] for _, name, value in reader.attributes if name == "href" and value.startswith("#")]:
        assert target in anchors
    assert ("img", "alt", "Figure: First") in reader.attributes
    assert '<th class="num">share</th>' in text and '<td class="num">−1.5e-3</td>' in text and "<td>7</td>" in text
    assert "<th>part</th>" in text and text.count("<tr") == 3 + 3  # the two header rows are one
    assert 'aria-current="page"' in text.replace("aria-current=page", 'aria-current="page"')


def test_the_same_notebook_gives_the_same_report(tmp_path):
    path = notebook(
        tmp_path / "a.ipynb", MARK("# A\n\n$x$"), CODE("1", outputs=[shown({"text/plain": "1"})]), facts=FACTS
    )
    first = render(path, tmp_path / "1.html", "A").read_bytes()
    assert first == render(path, tmp_path / "2.html", "A").read_bytes()


def test_a_failed_run_says_so_first(tmp_path):
    state = lambda word: {"papermill": {"status": word}}  # noqa: E731
    path = notebook(
        tmp_path / "a.ipynb",
        MARK("## Fit", metadata=state("completed")),
        CODE(
            "#| hide\nfit()",
            metadata=state("failed"),
            outputs=[
                nbformat.v4.new_output("stream", name="stderr", text="out of memory soon"),
                nbformat.v4.new_output("error", **ERROR),
            ],
        ),
        MARK("## Never", metadata=state("pending")),
        CODE("never()", metadata=state("pending")),
        facts={**FACTS, "ok": False, "section": "Fit <it>", "error": "ValueError: <b>"},
    )
    render(path, tmp_path / "a.html", "A")
    reader, text = assert_offline(tmp_path / "a.html"), (tmp_path / "a.html").read_text()
    assert "This run failed in “Fit <it>”" in reader.text and reader.text.count("ValueError: <b>") == 2
    assert text.index('class="banner"') < text.index("<h2")
    assert "out of memory soon" in reader.text and "Code cells that were not reached: 1" in reader.text
    assert "never()" not in reader.text and "\x1b" not in text and '<details class="trace">' in text


def test_a_large_notebook_gives_a_small_report(tmp_path):
    cells = [CODE("x", outputs=[shown({"image/png": png(700, 500, seed)})]) for seed in range(3)]
    cells += [
        CODE(
            "y",
            outputs=[
                shown({"text/plain": "z" * 3_000_000}),
                nbformat.v4.new_output("stream", name="stdout", text="w" * 3_000_000),
            ],
        )
    ]
    path = notebook(tmp_path / "a.ipynb", *cells, facts=FACTS)
    assert path.stat().st_size > 9_000_000
    render(path, tmp_path / "a.html", "A")
    reader = assert_offline(tmp_path / "a.html")
    assert reader.tags.count("img") == 3 and "shortened" in reader.text


def test_a_report_of_nothing_but_prose_that_is_too_long_is_refused(tmp_path):
    path = notebook(tmp_path / "a.ipynb", MARK("word " * 420_000))
    with pytest.raises(InputError, match="it may have 2,000,000"):
        render(path, tmp_path / "a.html", "A")
    assert not (tmp_path / "a.html").exists()
    (tmp_path / "b.ipynb").write_text("{}")
    with pytest.raises(IntegrityError):
        render(tmp_path / "b.ipynb", tmp_path / "b.html", "B")


@pytest.mark.parametrize(
    "tex",
    [
        r"\frac{a}{b}",
        r"\sum_{i=1}^n w_i (p_i - y_i)^2",
        r"\hat{p} = \sigma(a z + b)",
        r"x \in [0, 1]",
        r"\mathrm{MSE} \leq 0.024",
    ],
)
def test_usual_formulas_are_drawn(tex):
    for block in (False, True):
        drawn = formula_html(tex, block)
        assert drawn.startswith("<span") and "NaN" not in drawn and "\n" not in drawn
        width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawn).groups())
        points = [
            tuple(map(float, point.split(",")))
            for point in re.findall(r"-?[\d.]+,-?[\d.]+", re.search(r' d="([^"]+)"', drawn)[1])
        ]
        assert min(x for x, _ in points) > -2 and max(x for x, _ in points) < width + 2
        assert min(y for _, y in points) > -2 and max(y for _, y in points) < height + 2


def test_a_formula_that_cannot_be_drawn_is_shown():
    assert formula_html(r"\begin{x} <") == '<code class="math">\\begin{x} &lt;</code>'


@hypothesis_settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40), href=st.text(max_size=40))
def test_text_stays_text(text, href):
    document = page(text, "<p>body</p>", subtitle=text, navigation=[(text, href)], facts=[text], footer=text)
    reader = Reader(document)
    assert {"script", "img", "b"} & set(reader.tags) == {"b"}
    assert reader.tags.count("p") == 1 + bool(text)
    assert html.unescape(html.escape(text)) in reader.text.replace("\r", "") or "\r" in text or "\x00" in text
    link = next(value for tag, name, value in reader.attributes if (tag, name) == ("a", "href"))
    assert not re.match(r"(?i)[a-z][a-z0-9+.-]*:|//|\s", link)


# --- the list of runs ------------------------------------------------------------------------------------------------


REPORT = {"step": "evaluate", "title": "Evaluation", "href": "evaluate.html"}


def run(number: int, **changes) -> RunRecord:
    numbers = [
        Headline("AUC", name, value, value - 0.01, value + 0.01)
        for name, value in (("formula", 0.65), ("network", 0.7 + number / 1000), ("best", 0.81))
    ]
    day = f"2026-03-{number + 1:02d}"
    base = RunRecord(
        f"run-{number}",
        f"{day}T06:00:00Z",
        f"{day}T06:03:12Z",
        verdict="better",
        headline=numbers,
        versions={"calling_score": f"v1.{number}-town"},
        reports=[dict(REPORT)],
    )
    return dataclasses.replace(base, **changes)


def test_no_run_says_what_to_do(tmp_path):
    reader = assert_offline(index(tmp_path / "reports"))
    assert "No runs yet" in reader.text and "make run" in reader.text and "calling-ai run" in reader.text


def test_one_run(tmp_path):
    write_run(run(3), tmp_path)
    reader = assert_offline(index(tmp_path))
    for there in (
        "run-3",
        "v1.3-town",
        "better",
        "0.703",
        "[0.693, 0.713]",
        "3 min 12 s",
        "4 March 2026",
        "06:00",
        "calling score",
        "1 run",
    ):
        assert there in reader.text, there
    assert ("a", "href", "run-3/evaluate.html") in reader.attributes


def test_many_runs_newest_first_and_none_left_out(tmp_path):
    for number in (2, 0, 11, 7):
        write_run(run(number), tmp_path)
    write_run(
        run(
            9,
            status="failed",
            verdict="",
            headline=[],
            versions={},
            error=f"train.ipynb failed: {EVIL}",
            reports=[{"step": EVIL, "href": "javascript:alert(1)"}],
        ),
        tmp_path,
    )
    write_run(run(12, status="running", finished_at=None, verdict="", headline=[]), tmp_path)
    for name, content in (
        ("torn", "{"),
        ("odd", '{"a": 1}'),
        ("list", "[]"),
        ("wrong", json.dumps({**run(1).to_dict(), "status": "happy"})),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(content)
    (tmp_path / "index.html").write_text("old")
    reader = assert_offline(index(tmp_path))
    listed = re.findall(r"run-\d+", reader.text[reader.text.index("started (UTC)") :])
    assert listed == [f"run-{number}" for number in (12, 11, 9, 7, 2, 0)]
    assert reader.text.count("unreadable") == 4 and "10 runs" in reader.text
    assert f"train.ipynb failed: {EVIL}" in reader.text  # as text
    assert {"failed", "running", "better"} <= set(
        re.findall(r'badge ([a-z-]+)"', (tmp_path / "index.html").read_text())
    )
    assert list(tmp_path.glob(".*")) == []


def test_two_hundred_runs_stay_small(tmp_path):
    for number in range(200):
        write_run(run(0, run_id=f"run-{number}"), tmp_path)
    assert_offline(index(tmp_path))
    assert (tmp_path / "index.html").stat().st_size < 600_000


def test_what_is_written_is_what_is_read(tmp_path):
    record = run(1, parameters={"seed": 1}, finished_at=None)
    path = write_run(record, tmp_path)
    assert read_run(path) == record == read_run(path.parent)
    assert json.loads(path.read_text())["headline"][0]["metric"] == "AUC"
    for name in ("", "..", "../x", "a/b", ".hidden", "x" * 101):
        with pytest.raises(InputError, match="run_id"):
            write_run(run(1, run_id=name), tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"started_at": "yesterday"},
        {"started_at": "2026-03-01T06:00:00"},
        {"started_at": 5},
        {"verdict": "great"},
        {"status": "done"},
        {"headline": [{"metric": "AUC"}]},
        {"headline": [{"metric": "AUC", "predictor": "formula", "value": 1, "lower": 2, "upper": 1}]},
        {"headline": [{"metric": "AUC", "predictor": "formula", "value": "x", "lower": None, "upper": None}]},
        {"reports": ["a"]},
        {"versions": ["v1.0"]},
    ],
)
def test_a_record_of_another_form_is_refused(tmp_path, change):
    (tmp_path / "record.json").write_text(json.dumps({**run(1).to_dict(), **change}))
    with pytest.raises(IntegrityError, match="record of a run"):
        read_run(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "record.json").rename(tmp_path / "a" / "record.json")
    assert "unreadable" in index(tmp_path).read_text()
