"""Rollout: look once at what is being tried, and do what the evidence says.

Once, with or without a server:   python flows/rollout.py
"""

from common import scheduled
from prefect import flow

from calling_ai.operate import schedule


@flow(name="rollout")
def rollout() -> dict:
    """Take the next step once in this period; return state and verdict."""
    return scheduled("rollout", schedule.rollout_step)


if __name__ == "__main__":
    rollout()
