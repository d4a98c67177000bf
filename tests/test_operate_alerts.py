"""Alerts: once while open, to everybody in the end, whatever fails; and nothing in them that is nobody's business."""

import dataclasses
import datetime as dt
import http.server
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from calling_ai.cli import main
from calling_ai.core.errors import InputError, SettingsError
from calling_ai.core.settings import AlertSettings, Settings, settings
from calling_ai.operate import alerts
from calling_ai.operate.alerts import close, open_alerts, send_due, tell
from calling_ai.store.schema import SEVERITIES

NOON = dt.datetime(2026, 3, 2, 12, tzinfo=dt.UTC)


def at(hours: float) -> dt.datetime:
    """Return a moment some hours after noon."""
    return NOON + dt.timedelta(hours=hours)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Return a workspace without anything."""
    monkeypatch.delenv(alerts.WEBHOOK, raising=False)
    monkeypatch.setattr(alerts, "SECONDS", 2.0)
    monkeypatch.setattr(alerts.time, "sleep", lambda seconds: None)  # between two attempts of the webhook
    return settings(tmp_path)


def lines(workspace: Settings) -> list[dict[str, Any]]:
    """Return what the file of the alerts says."""
    path = workspace.var / "alerts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def told(workspace: Settings, key: str = "drift:a", severity: str = "warning", hours: float = 0, **more: Any) -> Any:
    """Tell an alert at a moment."""
    return tell(workspace, key, severity, "A drifts", "mean 0.6, was 0.5", now=at(hours), **more)


class Hook(http.server.BaseHTTPRequestHandler):
    """A webhook that answers with the codes it is given, and with 200 when there are none left."""

    codes: list[int]
    taken: list[dict[str, Any]]
    lock = threading.Lock()

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with Hook.lock:
            code = Hook.codes.pop(0) if Hook.codes else 200
            if code == 200:
                Hook.taken.append(content)
        self.send_response(code)
        if code in (301, 302, 307):
            self.send_header("Location", "/elsewhere")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hook]]:
    """Return a webhook that really listens."""
    Hook.codes, Hook.taken = [], []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv(alerts.WEBHOOK, f"http://127.0.0.1:{server.server_port}/hidden-path")
    yield Hook
    server.shutdown()
    server.server_close()


def going_to(workspace: Settings, *names: str, **more: Any) -> Settings:
    """Return a workspace whose alerts go elsewhere."""
    return dataclasses.replace(workspace, alerts=AlertSettings(to=", ".join(names), **more))


def test_an_open_alert_is_counted_not_repeated(here: Settings) -> None:
    assert told(here).count == 1
    assert [told(here, hours=hours) for hours in range(1, 24)] == [None] * 23
    assert open_alerts(here)[0].count == 24 and open_alerts(here)[0].last_at == at(23)
    assert [line["event"] for line in lines(here)] == ["opened"]
    assert told(here, hours=24).count == 25
    assert [line["event"] for line in lines(here)] == ["opened", "repeated"]


def test_a_worse_alert_is_sent_at_once_and_never_becomes_milder(here: Settings) -> None:
    for hours, severity in enumerate(["info", "warning", "info", "critical", "warning"]):
        told(here, severity=severity, hours=hours)
    assert [line["alert"]["severity"] for line in lines(here)] == ["info", "warning", "critical"]
    assert open_alerts(here)[0].severity == "critical"


def test_a_closed_alert_opens_again_as_another(here: Settings) -> None:
    first = told(here)
    assert close(here, "drift:a", now=at(1)).closed_at == at(1)
    assert close(here, "drift:a") is None and close(here, "nothing") is None
    second = told(here, hours=2)
    assert second.number > first.number and second.count == 1
    assert [line["event"] for line in lines(here)] == ["opened", "closed", "opened"]
    assert [item.number for item in open_alerts(here)] == [second.number]
    assert len(open_alerts(here, every=True)) == 2


def test_the_worst_comes_first(here: Settings) -> None:
    for key, severity in (("a", "info"), ("b", "critical"), ("c", "warning")):
        told(here, key, severity)
    assert [item.key for item in open_alerts(here)] == ["b", "c", "a"]
    assert SEVERITIES == ("info", "warning", "critical")


def test_the_webhook_takes_it_after_refusing_twice(here: Settings, hook: type[Hook]) -> None:
    hook.codes[:] = [503, 500]
    alert = told(
        going_to(here, "webhook"), report=here.reports / "monitor" / "index.html", command="calling-ai retrain"
    )
    assert alert.sent_at == NOON and not alert.failures and len(hook.taken) == 1
    content = hook.taken[0]
    assert content["event"] == "opened" and content["alert"]["report"] == "reports/monitor/index.html"
    assert "next: calling-ai retrain" in content["text"]


@pytest.mark.parametrize("code", [400, 404, 500, 302])
def test_a_webhook_that_fails_never_fails_the_caller(here: Settings, hook: type[Hook], code: int) -> None:
    both = going_to(here, "file", "webhook")
    hook.codes[:] = [code] * 3
    alert = told(both)
    assert alert.failures == {"webhook": 1} and alert.sent_at is None and not hook.taken
    assert told(both, "other", hours=1).sent_at == at(1)  # the next occasion, of whatever alert, brings both
    assert sorted(item["alert"]["key"] for item in hook.taken) == ["drift:a", "other"]
    assert len(lines(here)) == 2  # the file had the first already
    assert all(not item.failures and item.sent_at == at(1) for item in open_alerts(here))


def test_nobody_listens_or_no_address(here: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    away = going_to(here, "webhook")
    assert told(away).failures == {"webhook": 1}
    monkeypatch.setenv(alerts.WEBHOOK, "http://127.0.0.1:9/token-in-the-path")
    assert told(away, hours=1) is None and open_alerts(here)[0].failures == {"webhook": 2}
    with sa.create_engine(here.database_url).connect() as connection:
        kept = str(connection.exec_driver_sql("SELECT * FROM alerts").all())
    assert "cannot be reached" in kept and "token-in-the-path" not in kept


def test_an_alert_closed_before_it_could_be_sent_is_still_told(here: Settings, hook: type[Hook]) -> None:
    away = going_to(here, "webhook")
    hook.codes[:] = [500] * 6
    told(away)
    close(away, "drift:a", now=at(1))
    assert send_due(away, at(2)) == 1 and [item["event"] for item in hook.taken] == ["closed"]
    assert send_due(away, at(30)) == 0


def test_a_prefect_block_is_notified(here: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    import prefect.blocks.core

    seen: list[tuple[str, str, str]] = []

    class Pager:
        def notify(self, body: str, subject: str) -> None:
            seen.append((threading.current_thread().name, body, subject))

    monkeypatch.setattr(prefect.blocks.core.Block, "load", classmethod(lambda cls, name: Pager()))
    assert told(going_to(here, "prefect", block="slack-webhook/team")).sent_at == NOON
    assert len(seen) == 1 and "A drifts" in seen[0][1] and seen[0][2] == "[warning] A drifts (opened)"
    monkeypatch.setattr(prefect.blocks.core.Block, "load", classmethod(lambda cls, name: 1 / 0))
    assert told(going_to(here, "prefect", block="slack-webhook/team"), "other").failures == {"prefect": 1}
    assert told(going_to(here, "prefect"), "third", hours=1).failures == {"prefect": 1}


@pytest.mark.long
def test_a_real_prefect_block_reaches_a_real_server(
    here: Settings, hook: type[Hook], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block of apprise, saved with Prefect, loaded by its name, posts to a server."""
    import subprocess
    import sys

    address = os.environ[alerts.WEBHOOK].replace("http://", "json://")
    code = f"""
import datetime as dt
from pydantic import SecretStr
from prefect.blocks.notifications import AppriseNotificationBlock
from calling_ai.core.settings import settings
from calling_ai.operate.alerts import tell
class PlainPost(AppriseNotificationBlock):
    "Post to any address."
    _block_type_slug = "plain-post"
PlainPost(url=SecretStr({address!r})).save("team", overwrite=True)
alert = tell(settings({str(here.root)!r}), "drift:a", "warning", "A drifts", "mean 0.6")
print(alert.sent_at is not None, alert.failures)
"""
    environment = os.environ | {
        "PREFECT_HOME": str(here.root / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "CALLING_AI_ALERTS__TO": "prefect",
        "CALLING_AI_ALERTS__BLOCK": "plain-post/team",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["True {}"], done.stderr[-2000:]
    assert "A drifts" in json.dumps(hook.taken)


@pytest.mark.parametrize(
    "dirty",
    [
        "ann.lee@example.org",
        "+49 (30) 123-4567",
        "postgresql://me:hunter22hunter@host/log",
        "sk-live-planted-in-the-environment",
        "password=hunter22hunter",
    ],
)
def test_secrets_and_people_are_taken_out(here: Settings, monkeypatch: pytest.MonkeyPatch, dirty: str) -> None:
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "sk-live-planted-in-the-environment")
    facts = {"a": [dirty, {dirty: 1}]}
    texts = [f"{word} {dirty}" for word in ("report", "command", "subject")]
    tell(here, f"key {dirty}", "info", f"title {dirty}", f"text {dirty}", *texts, facts)
    needle = "hunter22hunter" if "hunter22" in dirty else dirty
    for path in (path for path in here.var.rglob("*") if path.is_file() and path.name != "user.secret"):
        assert needle.encode() not in path.read_bytes(), path.name
    assert close(here, f"key {dirty}") is not None


def test_the_folder_of_the_workspace_is_taken_out(here: Settings) -> None:
    tell(here, "a", "info", "A", f"see {here.var}/x and {here.root}", report=here.reports / "a.html")
    assert open_alerts(here)[0].text == "see var/x and ." and open_alerts(here)[0].report == "reports/a.html"


def test_what_is_no_alert_is_refused(here: Settings) -> None:
    with pytest.raises(InputError, match="severity is 'bad'"):
        tell(here, "a", "bad", "A", "a")
    with pytest.raises(InputError, match="key is empty"):
        tell(here, "", "info", "A", "a")
    with pytest.raises(SettingsError, match="pigeon"):
        send_due(going_to(here, "pigeon"))


def test_a_line_cut_by_a_crash_harms_nothing(here: Settings) -> None:
    told(here, "a")
    with (here.var / "alerts.jsonl").open("a") as stream:
        stream.write('{"event": "ope')
    told(here, "b")
    text = (here.var / "alerts.jsonl").read_text().splitlines()
    assert len(text) == 3 and json.loads(text[2])["alert"]["key"] == "b"


def test_a_process_that_died_with_its_claim_loses_it(here: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(alerts.SENDERS, "file", dies)
    with pytest.raises(KeyboardInterrupt):
        told(here)
    monkeypatch.undo()
    assert send_due(here, at(0.01)) == 0 and send_due(here, at(0.1)) == 1
    assert [line["event"] for line in lines(here)] == ["opened"]


def test_without_a_database_it_is_sent_all_the_same(here: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(workspace: Settings) -> Any:
        raise alerts.StorageError("it cannot be reached")

    monkeypatch.setattr(alerts, "_database", away)
    alert = told(here)
    assert alert.number == 0 and alert.sent_at == NOON and lines(here)[0]["alert"]["key"] == "drift:a"


def _shout(root: str, worker: int) -> None:
    for _ in range(5):
        tell(settings(root), "same", "warning", "Same", f"from {worker}")


def test_many_processes_open_one_alert_and_send_it_once(here: Settings) -> None:
    told(here, "first")  # the database is there
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_shout, args=(str(here.root), worker)) for worker in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 3
    same = [item for item in open_alerts(here, every=True) if item.key == "same"]
    sent = [line for line in lines(here) if line["alert"]["key"] == "same"]
    assert len(same) == 1 and same[0].count == 15 and len(sent) == 1


def test_the_command_lists_and_closes(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["alerts"]) == 0 and "nothing" in capsys.readouterr().out
    tell(settings(workspace), "stale", "critical", "The log is stale", "41 hours", command="calling-ai doctor")
    assert main(["alerts"]) == 0
    text = capsys.readouterr().out
    assert "stale" in text and "calling-ai doctor" in text
    assert main(["alerts", "close", "stale"]) == 0 and "closed" in capsys.readouterr().err
    assert main(["alerts", "--json"]) == 0 and json.loads(capsys.readouterr().out) == []
    assert main(["alerts", "--all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["key"] == "stale"
    assert main(["alerts", "close", "stale"]) == 1 and "no open alert" in capsys.readouterr().err
    shutil.rmtree(workspace / "var")
