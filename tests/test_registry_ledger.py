"""The ledger: nothing rewritten unseen, nobody overtaken unseen, one command back, and the past as it was."""

import datetime as dt
import multiprocessing
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from calling_ai.core.errors import InputError, RefusedError
from calling_ai.registry.audit import audit, derived_state
from calling_ai.registry.ledger import GENESIS, HASHED, entry_digest, verify_chain
from calling_ai.registry.versions import HEAD, Change, Registry, VersionDraft, events_table
from calling_ai.store.database import engine, reading, writing
from calling_ai.store.revisions.versions import __path__ as steps
from calling_ai.store.schema import facts

NOW = dt.datetime(2026, 3, 2, 6, tzinfo=dt.UTC)


def file_of(folder: Path, content: str) -> Path:
    """Write a model that is none."""
    path = folder / f"{content}.onnx"
    path.write_text(content)
    return path


def filled(workspace: Path, models: tuple[str, ...] = ("calling_score", "outcome"), count: int = 3) -> Registry:
    """Return a registry with some versions of each model, none of them live."""
    registry = Registry(workspace)
    for number in range(count):
        drafts = [VersionDraft(model, "town", file_of(workspace, f"{model}-{number}")) for model in models]
        registry.register(drafts, actor="a test")
    return registry


def bad(registry: Registry, seen: str | None = None) -> list[str]:
    """Return the names of checks that fail."""
    return [check.name for check in audit(registry, seen) if not check.ok]


# -------------------------------------------------------------------------------------------------------- the chain


texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=20)
entries = st.lists(
    st.fixed_dictionaries(
        {
            "at": st.datetimes(dt.datetime(2000, 1, 1), dt.datetime(2100, 1, 1), timezones=st.just(dt.UTC)),
            "evidence": st.dictionaries(
                texts, st.none() | st.integers() | st.floats(allow_nan=False) | texts, max_size=3
            ),
            "before": st.none() | texts,
            "after": st.none() | texts,
            **dict.fromkeys(("action", "model", "subject", "actor"), texts),
        }
    ),
    min_size=1,
    max_size=6,
)


def chained(given_entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return entries with their digests."""
    rows, previous = [], GENESIS
    for number, entry in enumerate(given_entries, 1):
        row = entry | {"number": number, "previous_digest": previous}
        previous = entry_digest(previous, row)
        rows.append(row | {"digest": previous})
    return rows


@given(entries, st.data())
def test_whatever_is_changed_is_seen(given_entries: list[dict[str, Any]], data: st.DataObject) -> None:
    rows = chained(given_entries)
    assert verify_chain(rows, rows[-1]["digest"], data.draw(st.sampled_from(rows))["digest"]) is None
    place = data.draw(st.integers(0, len(rows) - 1))
    name = data.draw(st.sampled_from([*HASHED, "digest", "previous_digest"]))
    new = {
        "at": rows[place]["at"] + dt.timedelta(microseconds=1),
        "evidence": {"other": 1},
        "number": rows[place]["number"] + 7,
    }
    changed = [dict(row) for row in rows]
    changed[place][name] = new.get(name, f"{rows[place][name]}!")
    broken = verify_chain(changed, rows[-1]["digest"])
    assert broken is not None and broken.number <= changed[place]["number"] + 1
    shorter = rows[:place] + rows[place + 1 :]
    assert verify_chain(shorter, rows[-1]["digest"]) is not None, "left out, at the end too"


def test_the_step_of_the_schema_makes_the_same_digests() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("step", Path(steps[0]) / "0004_ledger.py")
    assert spec is not None and spec.loader is not None
    step = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(step)
    row = chained(
        [
            {"at": NOW, "evidence": {"auc": 0.79, "ä": None}, "before": None, "after": "x", "action": "register"}
            | dict.fromkeys(("model", "subject", "actor"), "m")
        ]
    )[0]
    assert step.digest_of(GENESIS, row) == row["digest"]
    assert step.digest_of(GENESIS, row | {"at": NOW.replace(tzinfo=None)}) == row["digest"], "as SQLite gives it"


@pytest.mark.parametrize("kind", ["changed", "removed", "cut off", "cut off with its head", "head gone", "alias moved"])
def test_what_was_done_behind_its_back_is_named(workspace: Path, kind: str) -> None:
    registry = filled(workspace)
    registry.promote_release({"outcome": "v1.0-town"}, 0.1, "a test")
    registry.promote_release({"outcome": "v1.1-town"}, 0.2, "a test")
    noted = registry.events()[-1].digest
    assert bad(registry, noted) == []
    before = registry.events()
    with registry.database.begin() as connection:
        for name in ("update", "delete"):
            connection.exec_driver_sql(f"DROP TRIGGER registry_events_no_{name}")  # who owns the file can do that
        last = before[-1].number
        if kind == "changed":
            connection.execute(events_table.update().where(events_table.c.number == 3).values(actor="nobody"))
        elif kind == "removed":
            connection.execute(events_table.delete().where(events_table.c.number == 4))
        elif kind.startswith("cut off"):
            connection.execute(events_table.delete().where(events_table.c.number == last))
            if "head" in kind:
                connection.execute(facts.update().where(facts.c.name == HEAD).values(value=before[-2].digest))
        elif kind == "head gone":
            connection.execute(facts.delete().where(facts.c.name == HEAD))
        else:
            connection.exec_driver_sql("UPDATE aliases SET version = 'v1.2-town' WHERE alias = 'champion'")
    assert bad(registry, noted)[0] == ("aliases" if kind == "alias moved" else "chain")


# ------------------------------------------------------------------------------------------------ forward and back


@given(
    st.lists(st.tuples(st.sampled_from(["both", "outcome", "calling_score", "back"]), st.integers(0, 2)), max_size=9)
)
def test_rollback_undoes_promotions_one_by_one(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("work")
    registry = filled(folder)
    model: list[tuple[dict[str, str], float | None]] = [({}, None)]
    for number, (what, version) in enumerate(steps):
        live, weight = model[-1]
        if what == "back":
            if len(model) == 1:
                with pytest.raises(RefusedError, match="nothing that was promoted is still in force"):
                    registry.rollback("a test")
                continue
            model.pop()
            found = registry.rollback("a test", "why not")
        else:
            chosen = {name: f"v1.{version}-town" for name in ("calling_score", "outcome") if what in ("both", name)}
            found = registry.promote_release(chosen, number / 20, "a test")
            if all(live.get(name) == item for name, item in chosen.items()):
                model[-1] = (live, number / 20)  # nobody was promoted: only the weight is another
            else:
                model.append((live | chosen, number / 20))
        assert (found.versions, found.weight) == model[-1], steps[: number + 1]
        for name in ("calling_score", "outcome"):
            active = [item.version for item in registry.list(name) if item.status == "active"]
            assert active == [item for key, item in model[-1][0].items() if key == name]
    assert bad(registry) == []


def test_the_past_is_told_as_it_was(workspace: Path) -> None:
    registry, seen = filled(workspace), []
    for work in (
        lambda: registry.promote("outcome", "v1.0-town"),
        lambda: registry.promote_release({"outcome": "v1.1-town", "calling_score": "v1.0-town"}, 0.3),
        lambda: registry.rollback(reason="worse"),
        lambda: registry.promote("outcome", "v1.2-town", "challenger"),
    ):
        work()
        seen.append((dt.datetime.now(dt.UTC), registry.live()))
        time.sleep(0.002)
    for moment, live in seen:
        told = registry.live_at(moment)
        assert (told.versions, told.weight, told.numbers) == (live.versions, live.weight, live.numbers)
    assert [live.versions.get("outcome") for _, live in seen] == ["v1.0-town", "v1.1-town", "v1.0-town", "v1.0-town"]
    assert [live.weight for _, live in seen] == [None, 0.3, None, None]
    assert registry.live_at(NOW).versions == {}
    with pytest.raises(InputError, match="must carry a time zone"):
        registry.live_at(dt.datetime(2026, 1, 1))


def test_an_error_in_a_change_takes_all_of_it_back(workspace: Path) -> None:
    registry = filled(workspace)
    before = registry.events()
    with pytest.raises(ZeroDivisionError), registry.changing("a test") as change:
        change.promote("outcome", "v1.0-town")
        change.go_live(0.2)
        1 / 0  # noqa: B018
    assert registry.events() == before and registry.live().versions == {} and bad(registry) == []
    with pytest.raises(InputError, match="weight is 0.6"):
        registry.promote_release({"outcome": "v1.0-town"}, 0.6)
    assert registry.events() == before


def test_what_is_archived_plays_no_part(workspace: Path) -> None:
    registry = filled(workspace)
    registry.promote("outcome", "v1.0-town")
    with pytest.raises(RefusedError, match="v1.0-town is champion: what plays a part is not archived"):
        registry.archive("outcome", "v1.0-town")
    registry.promote("outcome", "v1.1-town")
    registry.promote("outcome", "v1.2-town")
    registry.archive("outcome", "v1.0-town", reason="old")
    registry.rollback()
    with pytest.raises(RefusedError, match="v1.0-town is archived: it cannot be rolled back to"):
        registry.rollback()
    assert registry.live().versions == {"outcome": "v1.1-town"} and bad(registry) == []


# ---------------------------------------------------------------------------------------------------- side by side


def at(url: str, workspace: Path) -> Registry:
    """Return the registry of a workspace on a database of its own."""
    registry = Registry(workspace)
    registry.database = engine(url)
    return registry


def _promote(url: str, workspace: Path, version: str, expected: str | None, barrier: Any, answers: Any) -> None:
    registry = at(url, workspace)
    barrier.wait()
    try:
        registry.promote("outcome", version, actor=f"operator of {version}", expected={"outcome": expected})
        answers.put((version, ""))
    except RefusedError as error:
        answers.put((version, str(error)))


def test_two_operators_at_once(new_database: Callable[..., str], tmp_path: Path) -> None:
    url, context = new_database(), multiprocessing.get_context("spawn")
    registry = at(url, tmp_path)
    for number in range(3):
        registry.register([VersionDraft("outcome", "town", file_of(tmp_path, f"outcome-{number}"))])
    registry.promote("outcome", "v1.0-town", actor="the first")
    barrier, answers = context.Barrier(2), context.Queue()
    workers = [
        context.Process(target=_promote, args=(url, tmp_path, version, "v1.0-town", barrier, answers))
        for version in ("v1.1-town", "v1.2-town")
    ]
    for worker in workers:
        worker.start()
    found = dict(answers.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join(30)
    [winner] = [version for version, error in found.items() if not error]
    [error] = [error for error in found.values() if error]
    assert registry.live().versions == {"outcome": winner}
    assert f"the champion of outcome is {winner}, not v1.0-town any more: operator of {winner} changed it at" in error
    assert bad(registry) == []
    registry.database.dispose()


def _register(url: str, workspace: Path, worker: int, count: int) -> None:
    registry = at(url, workspace)
    for number in range(count):
        registry.register([VersionDraft("outcome", "town", file_of(workspace, f"w{worker}-{number}"))])


def _race(url: str, workspace: Path, worker: int, count: int) -> None:
    registry, draw = at(url, workspace), random.Random(worker)
    for _ in range(count):
        try:
            if draw.random() < 0.4:
                registry.rollback(f"worker {worker}")
            else:
                models = draw.sample(["outcome", "calling_score"], draw.choice([1, 2]))
                chosen = {model: f"v1.{draw.randrange(3)}-town" for model in models}
                registry.promote_release(chosen, draw.choice([None, 0.1, 0.3]), f"worker {worker}")
        except RefusedError:
            pass


def run_side_by_side(target: Callable[..., None], url: str, workspace: Path, workers: int, count: int) -> None:
    """Run a function in several processes at once; each must end well."""
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=target, args=(url, workspace, number, count)) for number in range(workers)]
    for worker in started:
        worker.start()
    for worker in started:
        worker.join(120)
    assert [worker.exitcode for worker in started] == [0] * workers


def test_b9_registrations_and_changes_side_by_side(new_database: Callable[..., str], tmp_path: Path) -> None:
    url = new_database()
    run_side_by_side(_register, url, tmp_path, 4, 25)
    registry = at(url, tmp_path)
    assert [item.version for item in registry.list("outcome")] == [f"v1.{number}-town" for number in range(100)]
    for number in range(3):
        registry.register([VersionDraft("calling_score", "town", file_of(tmp_path, f"score-{number}"))])
    run_side_by_side(_race, url, tmp_path, 4, 50)
    last: dict[tuple[str, str], str | None] = {}
    moved = 0
    for event in registry.events():
        if event.action not in ("alias", "live"):
            continue
        assert event.before == last.get((event.model, event.subject)), event
        last[event.model, event.subject] = event.after
        moved += event.subject == "champion"
    assert bad(registry) == []
    aliases, _ = derived_state(registry.events())
    assert registry.live().versions == {
        model: version for (model, alias), version in aliases.items() if alias == "champion"
    }
    kind = registry.database.dialect.name
    print(
        f"{kind}: 100 versions without a gap; {moved} changes of champions in 200 racing promotions "
        f"and rollbacks, 0 that do not start where the one before ended (95 % below {3 / moved:.1%})"
    )
    registry.database.dispose()


_ENDLESS = """
import random, sys
from calling_ai.registry.versions import Registry
registry, draw = Registry(sys.argv[1]), random.Random(int(sys.argv[2]))
print("ready", flush=True)
while True:
    if draw.random() < 0.3 and len(registry.events()) > 20: registry.rollback("killed")
    else:
        versions = {m: f"v1.{draw.randrange(3)}-town" for m in ("outcome", "calling_score")}
        registry.promote_release(versions, draw.choice([0.1, 0.2, 0.3]), "killed")
    print(registry.events()[-1].number, flush=True)
"""


def killed_in_the_middle(workspace: Path, times: int) -> int:
    """Kill a process that promotes and rolls back, again and again; return how many acknowledged changes were seen."""
    registry, acknowledged = filled(workspace), 0
    draw = random.Random(1)
    for number in range(times):
        child = subprocess.Popen(
            [sys.executable, "-c", _ENDLESS, str(workspace), str(number)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        time.sleep(draw.uniform(0.0, 0.15))
        child.kill()
        said = [int(line) for line in child.stdout.read().split() if line.strip()]
        child.wait()
        assert bad(registry) == [], "after a kill"
        events = registry.events()
        if said:
            assert events[-1].number >= max(said), "what was acknowledged is there"
        acknowledged += len(said)
        assert all(
            sum("champion" in item.aliases for item in registry.list(model)) <= 1
            for model in ("outcome", "calling_score")
        )
    return acknowledged


def test_killed_while_it_changes_what_is_live(workspace: Path) -> None:
    done = killed_in_the_middle(workspace, 12)
    print(f"{done} changes acknowledged, killed 12 times: 0 halves (95 % below {3 / 12:.0%})")


@pytest.mark.long
def test_killed_three_hundred_times(workspace: Path) -> None:
    print(f"{killed_in_the_middle(workspace, 300)} changes acknowledged, killed 300 times: 0 halves (95 % below 1.0%)")


# ------------------------------------------------------------------------------------------------------- commands


def test_the_commands(workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from calling_ai import cli

    monkeypatch.setattr(cli, "_see_to_release", lambda *_: None)  # these models are none: they have no release
    main = cli.main
    assert main(["versions", "log"]) == 0 and "nothing has changed yet" in capsys.readouterr().err
    assert main(["versions", "rollback"]) == 3 and "there is nothing to roll back to" in capsys.readouterr().err
    filled(workspace)
    assert main(["versions", "promote", "v1.0-town", "--by", "ada", "--reason", "it is time"]) == 0
    assert "live on" in capsys.readouterr().out
    moment = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=1)
    assert main(["versions", "promote", "v1.1-town", "--model", "outcome", "--weight", "0.2", "--by", "bob"]) == 0
    assert "calling_score v1.0-town, outcome v1.1-town" in capsys.readouterr().out
    assert main(["versions", "log"]) == 0
    out = capsys.readouterr().out
    assert "ada" in out and "it is time" in out and "v1.1-town" in out
    assert main(["versions", "log", "--json"]) == 0 and '"previous_digest"' in capsys.readouterr().out
    assert main(["versions", "rollback", "--reason", "worse"]) == 0
    assert "outcome v1.0-town" in capsys.readouterr().out
    assert main(["versions", "at", f"{moment:%Y-%m-%dT%H:%M:%S}"]) == 0 and "live on" in capsys.readouterr().out
    assert main(["versions", "at", "yesterday"]) == 2
    assert main(["versions", "archive", "outcome", "v1.2-town"]) == 0
    assert main(["versions", "promote", "v1.2-town", "--model", "outcome"]) == 3
    assert "archived" in capsys.readouterr().err
    assert main(["versions", "promote", "v9.9-town"]) == 1 and "has no version v9.9-town" in capsys.readouterr().err
    assert main(["versions", "verify"]) == 0 and "head" in capsys.readouterr().out
    registry = Registry(workspace)
    with writing(registry.database) as connection:
        connection.exec_driver_sql(
            "UPDATE versions SET status = 'active' WHERE version = 'v1.2-town' AND model = 'outcome'"
        )
    assert main(["versions", "verify"]) == 1
    assert "the ledger says archived" in capsys.readouterr().out
    assert main(["versions", "verify", "--seen", "f" * 64]) == 1


def test_a_change_says_what_it_found(workspace: Path) -> None:
    registry = filled(workspace)
    with registry.changing("a gate") as change:
        first = change.note("rollout", "r", None, "shadow", {"looks": 0})
        assert change.last("rollout", "r") == first and isinstance(change, Change)
    with reading(registry.database) as connection:
        head = connection.scalar(sa.select(facts.c.value).where(facts.c.name == HEAD))
    assert head == first.digest == registry.events()[-1].digest
    with (
        pytest.raises(RefusedError, match="rollout of r is shadow, not staging any more: a gate changed it at"),
        registry.changing("another") as change,
    ):
        change.note("rollout", "r", "staging", "10 %")
    with pytest.raises(InputError, match="status is 'gone'"), registry.changing() as change:
        change.status("outcome", "v1.0-town", "gone")
    with pytest.raises(InputError, match="alias is 'best'"), registry.changing() as change:
        change.point("outcome", "best", "v1.0-town")
