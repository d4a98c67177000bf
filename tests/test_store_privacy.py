"""Forgetting: nothing is left in any byte, on both databases, and nothing of anybody else is touched."""

import gzip
import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from calling_ai.core.errors import InputError
from calling_ai.store.decisions import DecisionLog, example_decisions, example_outcomes
from calling_ai.store.identity import pseudonym
from calling_ai.store.privacy import count_in, forget, redact, search, spellings
from calling_ai.store.snapshots import read_snapshot, snapshot
from calling_ai.store.writer import LogWriter

SECRET = b"a secret of the tests"
USER = "anna.müller@example.org"


def people_of(rows: int) -> pd.DataFrame:
    """Return decisions of ten people; one of them will ask to be forgotten."""
    made = example_decisions(rows=rows, users=10)
    made["user_id"] = np.array([USER, *(f"+49 170 55500{n}" for n in range(9))], dtype=object)[np.arange(rows) % 10]
    return made


def as_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a decision as a scorer hands it over: with the pseudonym."""
    plain = {name: None if value != value else value for name, value in row.items() if name != "user_id"}
    return plain | {"user_key": pseudonym(row["user_id"], SECRET)}


def places(folder: Path) -> dict[str, Path]:
    return {"folder": folder, "spill": folder / "spill", "snapshots": folder / "snapshots"}


@pytest.fixture
def lived(database_url: str, tmp_path: Path) -> tuple[DecisionLog, pd.DataFrame, Path]:
    """Return a log, its decisions, and a folder with snapshots, spilled rows, and a careless report."""
    folder = tmp_path / "var"
    log = DecisionLog(database_url, SECRET)
    made = people_of(400)
    log.record_frame(made)
    log.record_outcomes(example_outcomes(made))
    log.expose(
        pd.DataFrame(
            {
                "experiment": "weights",
                "stage": "10 %",
                "user_id": made["user_id"].unique(),
                "arm": "control",
                "exposed_at": made["decided_at"].iloc[0],
            }
        )
    )
    begin = made["decided_at"].min().to_pydatetime()
    for days in (15, 40):
        snapshot(log, begin, begin + pd.Timedelta(days=days).to_pytimedelta(), folder=folder / "snapshots")
    key = pseudonym(USER, SECRET)
    (folder / "runs").mkdir()
    (folder / "runs" / "careless.ipynb").write_text(json.dumps({"cells": [f"best: {key}", USER]}))
    (folder / "runs" / "old.csv.gz").write_bytes(gzip.compress(b"nobody"))
    return log, made, folder


def test_a_person_is_gone_and_everybody_else_is_there(lived: tuple[DecisionLog, pd.DataFrame, Path]) -> None:
    log, made, folder = lived
    before = log.decisions()
    key = pseudonym(USER, SECRET)
    would = forget(log, USER, **places(folder), dry_run=True)
    assert would.decisions == 40 and would.outcomes > 20 and would.exposures == 1 and would.found > 2
    assert log.counts().decisions == 400, "a dry run changes nothing"
    done = forget(log, USER, **places(folder), versions=lambda digests: [f"{len(digests)} snapshots"])
    assert (done.decisions, done.outcomes, done.exposures) == (would.decisions, would.outcomes, would.exposures)
    assert len(done.snapshots) == 2 and done.versions == ("2 snapshots",) and done.redacted == 2 and done.found == 0
    assert search([folder], [key.encode(), bytes.fromhex(key), *spellings(USER)]).total == 0
    left = log.decisions()
    pd.testing.assert_frame_equal(left, before[before["user_key"] != key].reset_index(drop=True))
    assert log.counts().outcomes == len(example_outcomes(made)) - done.outcomes
    for item in done.snapshots:
        assert key not in set(read_snapshot(folder / "snapshots", item.new)["user_key"])


def test_what_comes_later_is_dropped(lived: tuple[DecisionLog, pd.DataFrame, Path]) -> None:
    log, made, folder = lived
    forget(log, USER, **places(folder))
    late = made[made["user_id"] == USER]
    assert log.record_frame(late).forgotten == len(late)
    assert log.record_outcomes(example_outcomes(late)).forgotten > 0
    again = forget(log, USER, **places(folder))
    assert (again.decisions, again.outcomes, again.found) == (0, 0, 0)


def test_rows_that_wait_on_the_disk_go_too(tmp_path: Path) -> None:
    log = DecisionLog(f"sqlite:///{tmp_path / 'var' / 'log.db'}", SECRET)
    made = people_of(60)
    log.record_frame(made.head(30))
    real = log.database.url.database
    Path(real).rename(tmp_path / "away.db")
    Path(real).mkdir()  # the database is away
    writer = LogWriter(log, folder=tmp_path / "var" / "spill", flush_seconds=0.05)
    for row in made.tail(30).to_dict("records"):
        writer.decision(as_row(row))
    writer.close(timeout=0.2)
    Path(real).rmdir()
    (tmp_path / "away.db").rename(real)
    key = pseudonym(USER, SECRET)
    assert search([tmp_path / "var" / "spill"], [key.encode()]).total == 3
    done = forget(log, USER, **places(tmp_path / "var"))
    assert done.waiting == 3 and done.decisions == 3 and done.found == 0


def test_freed_pages_of_the_database_hold_nothing(tmp_path: Path) -> None:
    """Also rows that were deleted by somebody else, without care, before the person asked."""
    log = DecisionLog(f"sqlite:///{tmp_path / 'var' / 'log.db'}", SECRET)
    log.record_frame(people_of(400))
    key = pseudonym(USER, SECRET)
    with sqlite3.connect(log.database.url.database) as careless:
        careless.execute("PRAGMA secure_delete = OFF")
        careless.execute("CREATE TABLE notes (text TEXT)")
        careless.executemany("INSERT INTO notes VALUES (?)", [(f"{key} {'x' * 900}",)] * 50)
        careless.commit()
        careless.execute("DROP TABLE notes")
    careless.close()
    data = Path(log.database.url.database).read_bytes()
    assert data.count(key.encode()) > 40 + 40, "the freed pages hold the name, or this test shows nothing"
    assert forget(log, USER, **places(tmp_path / "var")).found == 0
    assert key.encode() not in Path(log.database.url.database).read_bytes()


def test_a_thousand_canaries_leave_no_trace(tmp_path: Path) -> None:
    """B30: e-mails and phone numbers as ids through log, writer and snapshot: 0 raw occurrences by byte scan."""
    folder = tmp_path / "var"
    canaries = [f"canary{n}.{n * 7919 % 1000}@mail{n % 7}.example" for n in range(500)]
    canaries += [f"+49151{n * 104_729 % 10**8:08d}" for n in range(500)]
    assert len(set(canaries)) == 1_000
    log = DecisionLog(f"sqlite:///{folder / 'log.db'}", SECRET)
    made = example_decisions(rows=1_000, users=10)
    made["user_id"] = np.array(canaries, dtype=object)
    log.record_frame(made.head(700))
    with LogWriter(log, folder=folder / "spill", durable=True) as writer:
        for row in made.tail(300).to_dict("records"):
            writer.decision(as_row(row))
    log.record_outcomes(example_outcomes(made))
    log.expose(
        pd.DataFrame(
            {
                "experiment": "e",
                "stage": "s",
                "user_id": canaries,
                "arm": "control",
                "exposed_at": made["decided_at"].iloc[0],
            }
        )
    )
    begin = made["decided_at"].min().to_pydatetime()
    kept = snapshot(log, begin, begin + pd.Timedelta(days=40).to_pytimedelta(), folder=folder / "snapshots")
    assert log.counts().decisions == kept.rows == kept.counts["people"] == 1_000
    found = search([folder], [canary.encode() for canary in canaries])
    print(f"1,000 canaries, {found.files} files, {found.size:,} bytes: {found.total} occurrences (95 % bound 3/1,000)")
    assert found.total == 0 and found.files >= 3
    assert search([folder], [pseudonym(canaries[0], SECRET).encode()]).total >= 2, "the search must be able to find"


@pytest.mark.parametrize(
    ("data", "needle", "bounded", "count"),
    [
        (b"user-1, user-10, xuser-1", b"user-1", True, 1),
        (b"user-1, user-10, xuser-1", b"user-1", False, 3),
        (b"aaaa", b"aa", False, 3),
        (b"", b"aa", True, 0),
        (b'"user-1"', b"user-1", True, 1),
    ],
)
def test_counting(data: bytes, needle: bytes, bounded: bool, count: int) -> None:
    assert count_in(data, needle, bounded) == count


def test_search_finds_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import calling_ai.store.privacy as module

    monkeypatch.setattr(module, "PIECE", 64)
    for offset in range(40, 80):
        (tmp_path / "file.bin").write_bytes(b"." * offset + b"needle-in-hay" + b"." * 100)
        assert search([tmp_path], [b"needle-in-hay"]).total >= 1, offset


def test_redacting_keeps_the_file_whole(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    report.write_text("<p>user-1 and user-10</p>")
    report.chmod(0o444)
    assert redact(report, [b"user-1"]) == 1 and report.read_text() == "<p>[forgotten] and user-10</p>"
    assert report.stat().st_mode & 0o777 == 0o444
    with pytest.raises(InputError, match="user is empty"):
        spellings("")
