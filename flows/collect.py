"""Collect: what waits on the disk goes into the log, and the town lives on under what is live.

Once, with or without a server:   python flows/collect.py
"""

from common import scheduled
from prefect import flow

from calling_ai.operate import schedule


@flow(name="collect")
def collect() -> dict:
    """Collect once in this period; return what was new."""
    return scheduled("collect", schedule.collect)


if __name__ == "__main__":
    collect()
