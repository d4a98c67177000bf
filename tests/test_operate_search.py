"""Tuning end to end: a table in, a study, a report and a verdict out; started again it goes on."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from calling_ai.core.errors import InputError, NotFoundError
from calling_ai.core.settings import settings
from calling_ai.operate.candidates import labelled_rows
from calling_ai.operate.search import search_parts, tune_model
from calling_ai.world.hybrid import hybrid


def test_parts_share_no_person() -> None:
    frame = hybrid(1_200, seed=2, profiles=60)
    users = np.arange(1_200) % 60
    frame = frame.assign(user_id=[f"u{user}" for user in users], split=np.where(users < 40, "train", "validation"))
    parts = search_parts(labelled_rows(frame, "calling_score"))
    people = [set(part.user) for part in parts]
    assert not people[0] & people[1] and not people[1] & people[2] and not people[0] & people[2]
    assert sum(map(len, parts)) == 1_200
    judged = search_parts(
        labelled_rows(frame.assign(split=np.array(["train", "validation", "test"])[users % 3]), "outcome")
    )
    assert set(judged[2].split) == {"test"}
    with pytest.raises(InputError, match="too few people"):
        search_parts(labelled_rows(frame.assign(user_id=np.where(users < 40, frame["user_id"], "u0")), "outcome"))


@pytest.mark.slow
def test_a_search_leaves_a_record_a_report_and_a_study(workspace: Path, tmp_path: Path) -> None:
    frame = hybrid(900, seed=4, profiles=60).drop(columns="split")
    frame["user_id"] = [f"u{number % 60}" for number in range(900)]
    frame.to_parquet(tmp_path / "records.parquet")
    place = settings(workspace)
    with pytest.raises(NotFoundError, match="no version of calling_score"):
        tune_model(place, "calling_score")
    told: list[str] = []
    record = tune_model(
        place,
        "calling_score",
        tmp_path / "records.parquet",
        trials=3,
        seconds=60.0,
        seeds=3,
        epochs=1,
        progress=lambda now: told.append(now.section),
    )
    assert record["trials"] == 3 and record["stopped_by"] == "trials" and told
    for verdict in record["verdicts"].values():
        assert verdict["verdict"] in ("better", "worse", "cannot tell")
        assert verdict["difference"]["lower"] <= verdict["difference"]["value"] <= verdict["difference"]["upper"]
    assert record["chosen"] == 0 or record["verdicts"][str(record["chosen"])]["verdict"] == "better"
    assert (workspace / record["report"]).is_file() and (workspace / "var" / "tuning.db").is_file()
    assert str(workspace) not in (workspace / record["report"]).read_text()
    assert len(pd.read_parquet(next((workspace / "var" / "snapshots").glob("*.parquet")))) == 900
