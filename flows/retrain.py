"""Retrain: where it is due, once for each period; snapshot, trainings, evaluation, comparison, registration, rollout.

Once, with or without a server:   python flows/retrain.py
Due or not:                       python flows/retrain.py --now "a new feature"
Killed, it goes on where it stopped when it is run again.
"""

import argparse
from collections.abc import Callable

from common import create_markdown_artifact, create_table_artifact, get_run_logger, settings, task
from prefect import flow

from calling_ai.operate import retraining
from calling_ai.operate.overview import home

# Training again does not mend a wrong number; a busy database or a lost kernel is worth another try.
RETRIES = {"register": 3}


def as_task(name: str, work: Callable[[], dict]) -> dict:
    """Do a step as a task of the flow."""
    return task(work, name=name, retries=RETRIES.get(name, 1), retry_delay_seconds=2)()


@flow(name="retrain")
def retrain(now: str | None = None) -> dict:
    """Train where it is due, or for the reason that `now` gives; return what was done."""
    workspace = settings()
    result = retraining.retrain(workspace, now, wrap=as_task)
    lines = retraining.in_words(result)
    for line in lines:
        get_run_logger().info(line)
    create_markdown_artifact("\n\n".join(lines), key="retrain-verdict")
    if result.summary:
        table = [dict(zip(result.summary["columns"], row, strict=True)) for row in result.summary["rows"]]
        create_table_artifact(table, key="retrain-metrics", description=result.summary["title"])
    home(workspace)
    return result.to_dict()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--now", metavar="REASON", help="train now, whether due or not")
    retrain(parser.parse_args().now)
