"""Monitor: performance, drift, quality and freshness; alerts are opened and closed.

Once, with or without a server:   python flows/monitor.py
"""

from common import scheduled
from prefect import flow

from calling_ai.operate import schedule


@flow(name="monitor")
def monitor() -> dict:
    """Watch once in this period; return what needs a person."""
    return scheduled("monitor", schedule.watch)


if __name__ == "__main__":
    monitor()
