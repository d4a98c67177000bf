"""Retrain the calling score: the steps of the pipeline as a Prefect flow.

Once, with or without a server:   python flows/retrain.py
On the schedule of settings.ini:  python flows/retrain.py --serve   (needs `prefect server start`)
"""

import argparse
import os

for name, value in {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}.items():
    os.environ.setdefault(name, value)

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from calling_ai.core.settings import settings
from calling_ai.operate import pipeline

# Training again does not mend a wrong number; a busy database or a lost kernel is worth another try.
RETRIES = {"register": 3}


@flow(name="retrain")
def retrain(people: int | None = None, weeks: int | None = None) -> dict:
    """Prepare, train, evaluate, compare, register, report; return the record of the run."""
    run = pipeline.start_run(settings(), kind="retrain", people=people, weeks=weeks)
    with pipeline.reported(run):
        for name, step in pipeline.STEPS.items():
            task(step, name=name, retries=RETRIES.get(name, 1), retry_delay_seconds=2)(run)
    record = pipeline.read_result(run)
    text = pipeline.summary(record)
    table = [dict(zip(text["columns"], row, strict=True)) for row in text["rows"]]
    create_table_artifact(table, key="retrain-metrics", description=text["title"])
    create_markdown_artifact("\n\n".join(text["notes"]), key="retrain-verdict")
    return record


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", action="store_true", help="stay and retrain on the schedule of settings.ini")
    parser.add_argument("--people", type=int, help="number of people in the town (from settings)")
    parser.add_argument("--weeks", type=int, help="weeks to live before training (from settings)")
    arguments = parser.parse_args()
    if arguments.serve:
        retrain.serve(name="scheduled", cron=settings().schedules.retrain)
    else:
        retrain(arguments.people, arguments.weeks)
