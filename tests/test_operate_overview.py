"""The page that says it all: what is told, what is left out, and numbers that are those of the log."""

import datetime as dt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa

from calling_ai.core.errors import InputError
from calling_ai.core.settings import Settings, settings
from calling_ai.operate.alerts import close, tell
from calling_ai.operate.monitoring import example_log, monitor
from calling_ai.operate.overview import gather, home, last_runs, overview_html, verdict_of, weekly
from calling_ai.registry.versions import Registry, VersionDraft
from calling_ai.registry.words import changes, reason, story
from calling_ai.store.database import engine, writing
from calling_ai.store.decisions import DecisionLog
from calling_ai.store.schema import runs

NOW = dt.datetime(2026, 3, 2, 12, tzinfo=dt.UTC)


def register(workspace: Settings, content: str, promote: str | None = "champion", **evidence: Any) -> None:
    """Register a model that is none."""
    (workspace.root / "model.onnx").write_text(content)
    draft = VersionDraft("outcome", "town", workspace.root / "model.onnx")
    Registry(workspace.root).register(
        [draft], {"outcome": promote} if promote else None, actor="somebody", evidence=evidence
    )


def start(workspace: Settings, kind: str, state: str, at: dt.datetime, why: str | None = None) -> None:
    """Write a run down."""
    database = engine(workspace.database_url)
    last_runs(workspace)
    values = {"kind": kind, "period": f"{at:%Y-%m-%d}", "state": state, "owner": "test", "attempt": 1, "result": {}}
    values |= {
        "started_at": at,
        "heartbeat_at": at,
        "lease_until": at,
        "reason": why,
        "key": f"{kind}/{at.isoformat()}",
    }
    with writing(database) as connection:
        connection.execute(runs.insert().values(**values))


@pytest.mark.parametrize(
    "event, told, why",
    [
        (("register", "outcome", "v1.0-town", None, "staging", {}), "outcome v1.0-town was trained and registered", ""),
        (("alias", "outcome", "challenger", None, "v1.1-town", {}), "outcome v1.1-town is challenger now", ""),
        (("alias", "outcome", "challenger", "v1.1-town", None, {}), "outcome v1.1-town is challenger no longer", ""),
        (
            ("alias", "calling_score", "champion", "v1.0-town", "v1.1-town", {"verdict": {"calling_score": "better"}}),
            "calling score v1.1-town is the champion now, in place of v1.0-town",
            "better",
        ),
        (("status", "outcome", "v1.0-town", "deprecated", "archived", {}), "outcome v1.0-town is archived now", ""),
        (
            ("live", "release", "champion", "a" * 64, "b" * 64, {"versions": {"outcome": "v1.0-town"}, "weight": 0.1}),
            "live: outcome v1.0-town, with weight 0.1",
            "",
        ),
        (("live", "release", "champion", None, None, {}), "live: the formula alone", ""),
        (
            ("rollout", "release", "town-1", "shadow", "10 %", {"reason": "enough\n decisions"}),
            "rollout town-1: 10 %, after shadow",
            "enough decisions",
        ),
    ],
)
def test_a_change_is_told_in_words(event: tuple, told: str, why: str) -> None:
    fields = ("action", "model", "subject", "before", "after", "evidence")
    made: Any = SimpleNamespace(**dict(zip(fields, event, strict=True)))
    assert (story(made), reason(made)) == (told, why)


def test_the_first_sentence_says_what_to_do(workspace: Path) -> None:
    here = settings()
    assert verdict_of(gather(here)) == (
        "attention",
        "No model is live: the formula answers alone. Next: calling-ai run",
    )
    register(here, "one", verdict={"outcome": "first"})
    assert verdict_of(gather(here)) == ("attention", "Nothing was measured yet. Next: calling-ai monitor")
    start(here, "retrain", "done", NOW)
    start(here, "retrain", "crashed", NOW + dt.timedelta(days=1), "its lease ended")
    word, sentence = verdict_of(gather(here))
    assert (word, sentence) == (
        "attention",
        "The last run of retrain crashed: its lease ended. Next: calling-ai doctor",
    )
    tell(here, "a", "warning", "Something drifts", "much", command="calling-ai retrain")
    tell(here, "b", "critical", "It is worse", "a lot")
    assert verdict_of(gather(here)) == ("critical", "It is worse, and 1 more. Next: calling-ai alerts")
    close(here, "a"), close(here, "b")
    start(here, "retrain", "done", NOW + dt.timedelta(days=2))
    assert [run["state"] for run in last_runs(here)] == ["done"], "the last run of each kind"
    assert verdict_of(gather(here))[1].startswith("Nothing was measured yet")


def test_changes_are_those_of_the_time_and_the_newest_comes_first(workspace: Path) -> None:
    here = settings()
    register(here, "one")
    middle = dt.datetime.now(dt.UTC)
    register(here, "two", promote=None)
    registry = Registry(workspace)
    assert [item.what.split()[1] for item in changes(registry)] == ["v1.1-town", "v1.0-town", "v1.0-town"]
    assert [item.number for item in changes(registry, since=middle)] == [changes(registry)[0].number]
    assert len(changes(registry, until=middle)) == 2 and changes(registry, until=middle)[-1].who == "somebody"


def test_what_others_wrote_is_text_and_nothing_else(workspace: Path) -> None:
    here = settings()
    register(here, "one", reason="<script>alert(1)</script>")
    tell(here, "x", "warning", "<b>bold</b>", "<img src=x>", command="calling-ai <i>")
    text = home(here).read_text()
    assert "<script" not in text and "<img" not in text and "<b>bold" not in text and "&lt;script&gt;" in text


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, dt.datetime]:
    """Return a small town that was monitored, and the last moment of its log."""
    here = settings(tmp_path_factory.mktemp("town"))
    until = example_log(here, people=150)
    monitor(here, until, report=False)
    return here, until


def test_the_page_shows_the_numbers_of_the_monitoring(town: tuple[Settings, dt.datetime]) -> None:
    here, until = town
    overview = gather(here, until)
    assert overview.monitored is not None
    rate = overview.monitored["overall"]["positive_rate"]
    text = overview_html(overview)
    assert f"{rate['value']:.1%} [{rate['lower']:.1%}, {rate['upper']:.1%}] positive" in text
    assert text.count("<circle") == sum(bool(day["positive_rate"]) for day in overview.monitored["days"])
    assert f"{overview.monitored['overall']['decisions']:,} of" in text


def test_the_week_counts_what_the_log_holds(town: tuple[Settings, dt.datetime]) -> None:
    here, until = town
    text = weekly(here, until).read_text()
    book = DecisionLog.open(here)
    with book.database.connect() as connection:
        for end in (until, until - dt.timedelta(days=7)):
            query = sa.text("SELECT count(*) FROM decisions WHERE decided_at >= :since AND decided_at < :until")
            form = "%Y-%m-%d %H:%M:%S.%f"
            given = {"since": (end - dt.timedelta(days=7)).strftime(form), "until": end.strftime(form)}
            count = connection.scalar(query, given)
            assert count > 500 and f"<td>{count:,}</td>" in text
    assert (here.reports / "index.html").is_file() and "http" not in text.replace("http-equiv", "")
    assert len(text) < 2_000_000


def test_a_week_without_anybody(workspace: Path) -> None:
    here = settings()
    assert "Too few people" in weekly(here, NOW).read_text()
    with pytest.raises(InputError, match="must carry a time zone"):
        weekly(here, NOW.replace(tzinfo=None))


def test_the_command(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from calling_ai.cli import main

    assert main(["report", "--weekly", "--as-of", "2026-03-02"]) == 0
    out = capsys.readouterr().out
    assert "2026-W09.html" in out and "No model is live" in out
    assert main(["report", "--json"]) == 0 and '"state": "attention"' in capsys.readouterr().out
