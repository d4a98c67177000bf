"""Weekly: the summary of the last seven days.

Once, with or without a server:   python flows/weekly.py
"""

from common import scheduled
from prefect import flow

from calling_ai.operate import schedule


@flow(name="weekly")
def weekly() -> dict:
    """Write the summary once in this period."""
    return scheduled("weekly", schedule.week)


if __name__ == "__main__":
    weekly()
