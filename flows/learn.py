"""Learn: between two trainings, learn what has come in since the last time.

Once, with or without a server:   python flows/learn.py
"""

from common import scheduled
from prefect import flow

from calling_ai.operate import schedule


@flow(name="learn")
def learn() -> dict:
    """Learn online once in this period; return what was learned of each model."""
    return scheduled("learn", schedule.learn_online)


if __name__ == "__main__":
    learn()
