"""Score a table or a folder of tables larger than memory: partitions as tasks of a Prefect flow.

On threads, or on Dask by a setting:   python flows/score.py --input tonight/ --output scores/
The runner is [batch] runner in settings.ini; what is done already is not done again.
"""

import argparse
from typing import Any

from common import create_table_artifact, settings, task
from prefect import flow, unmapped
from prefect.futures import wait
from prefect.task_runners import ThreadPoolTaskRunner

from calling_ai.core.errors import SettingsError
from calling_ai.core.settings import BatchSettings
from calling_ai.operate import batch


def runner(wanted: BatchSettings) -> Any:
    """Return the task runner that the settings name."""
    if wanted.runner == "threads":
        return ThreadPoolTaskRunner(max_workers=wanted.workers)
    if wanted.runner == "dask":
        from prefect_dask import DaskTaskRunner

        if wanted.scheduler:
            return DaskTaskRunner(address=wanted.scheduler)
        return DaskTaskRunner(cluster_kwargs={"n_workers": wanted.workers, "threads_per_worker": 1})
    raise SettingsError(f"setting [batch] runner is {wanted.runner!r}: it must be threads or dask")


@flow(name="score")
def score(source: str, target: str, version: str | None = None) -> dict:
    """Plan, score what is pending, and put the parts together."""
    workspace = settings()
    job = batch.plan(workspace, source, target, version, workspace.batch.rows)
    with batch.owned(job):
        one = task(batch.score_partition, name="score partition", retries=3, retry_delay_seconds=1)
        futures = one.map(unmapped(job), batch.pending(job))
        wait(futures)
        for future in futures:
            future.result()
        result = batch.finish(job)
    create_table_artifact([{"path": path, "rows": rows} for path, rows in result["paths"].items()], key="score-paths")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", required=True, help="a .parquet file, or a folder of them")
    parser.add_argument("--output", required=True, help="where the scores go, likewise")
    parser.add_argument("--version", help="version to score with (the champions)")
    arguments = parser.parse_args()
    score.with_options(task_runner=runner(settings().batch))(arguments.input, arguments.output, arguments.version)
