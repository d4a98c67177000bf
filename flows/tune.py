"""Tune a model: search within a budget, finalists trained again, a verdict that an interval supports.

Once, with or without a server:   python flows/tune.py --model outcome --trials 40 --seconds 600
Started again under the same name, it goes on where it stopped.
"""

import argparse

from common import create_table_artifact, settings, task
from prefect import flow

from calling_ai.operate.search import tune_model


@flow(name="tune")
def tune(model: str, data: str | None = None, trials: int = 40, seconds: float = 600.0, seeds: int = 5) -> dict:
    """Search, train the finalists again, and return the record."""
    search = task(tune_model, name="search", retries=1, retry_delay_seconds=2)
    record = search(settings(), model, data, trials=trials, seconds=seconds, seeds=seeds)
    table = [{"trial": number, "verdict": item["verdict"]} for number, item in record["verdicts"].items()]
    create_table_artifact(table, key=f"tune-{model.replace('_', '-')}", description=f"chosen: trial {record['chosen']}")
    return record


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, choices=["calling_score", "outcome"], help="which model")
    parser.add_argument("--data", help="table to learn from (the newest snapshot)")
    parser.add_argument("--trials", type=int, default=40, help="trials in all, earlier sessions included")
    parser.add_argument("--seconds", type=float, default=600.0, help="of the search")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each finalist")
    arguments = parser.parse_args()
    tune(arguments.model, arguments.data, arguments.trials, arguments.seconds, arguments.seeds)
