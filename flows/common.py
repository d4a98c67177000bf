"""What all flows share: Prefect kept quiet and offline, the workspace, and once in a period.

Import this before anything of Prefect. Each file beside this one is one flow: run it with Python, with or without a
server; `schedule.py` serves them all on the cron lines of settings.ini.
"""

import os
from collections.abc import Callable
from typing import Any

for name, value in {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}.items():
    os.environ.setdefault(name, value)

from prefect import get_run_logger, task  # noqa: E402  (what is set above is read when Prefect is imported)
from prefect.artifacts import create_markdown_artifact, create_table_artifact  # noqa: E402

from calling_ai.core.settings import settings  # noqa: E402
from calling_ai.operate.schedule import Ran, once  # noqa: E402

__all__ = ["create_markdown_artifact", "create_table_artifact", "get_run_logger", "scheduled", "settings", "task"]


def scheduled(kind: str, work: Callable[[Any, str], dict[str, Any]], retries: int = 2) -> dict[str, Any]:
    """Do the work of a flow once in its period, as a task that is tried again, and show what it found."""
    workspace = settings()

    def run() -> Ran:
        return once(workspace, kind, lambda key: work(workspace, key))

    ran = task(run, name=kind, retries=retries, retry_delay_seconds=5)()
    get_run_logger().info("%s is %s%s", ran.key, ran.state, f": {ran.said}" if ran.said else "")
    rows = [{"what": name, "found": str(value)} for name, value in ran.result.items()]
    create_table_artifact(
        rows or [{"what": "-", "found": "-"}], key=f"{kind}-found", description=f"{ran.key}: {ran.state}"
    )
    return {"key": ran.key, "state": ran.state, **ran.result}
