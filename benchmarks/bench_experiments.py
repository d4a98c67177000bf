"""Analysing an experiment: in the database, from a stream, and from a frame, beside plain SQL, scipy and tea-tasting.

Run with `python benchmarks/bench_experiments.py [exposures]`; 1,000,000 by default, 10,000,000 is the size that the
limit of 1.3 plain aggregates speaks about. Seconds are of the processor, so that a busy machine does not decide.
tea-tasting is put into a folder of its own under var/ and left out, with a message, where that is not possible.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import sqlalchemy as sa

from calling_ai.experiments.inference import Metric, compare
from calling_ai.experiments.summaries import Cell, Moments, Summaries, from_sums, summarise, summarise_query
from calling_ai.store.database import engine, reading

TEA = Path(__file__).resolve().parent.parent / "var" / "benchmarks" / "tea-tasting"
TEA_PACKAGES = ["tea-tasting", "ibis-framework", "atpublic", "parsy", "sqlglot", "toolz"]
RATIO = Metric("y", "s")


def seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """Return the best processor time of some runs."""
    timings = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        timings.append(time.process_time() - start)
    return min(timings)


def peak() -> float:
    """Return the largest memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fill(url: str, rows: int) -> None:
    """Make tables with a row an exposure: one row a user, and four rows a user."""
    with engine(url).begin() as connection:
        for name, each in (("users", 1), ("events", 4)):
            connection.execute(
                sa.text(
                    f"CREATE TABLE {name} (row INTEGER PRIMARY KEY, user_key INTEGER, arm TEXT, stage TEXT, day TEXT, "
                    "y REAL, s REAL, x REAL)"
                )
            )
            connection.execute(
                sa.text(
                    f"""WITH RECURSIVE t(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM t WHERE i < {rows - 1})
                    INSERT INTO {name} SELECT i, i / {each},
                    CASE WHEN (i / {each} * 2654435761) % 1000 < 500 THEN 'control' ELSE 'treatment' END, '50%',
                    date('2026-03-01', '+' || (i * 14 / {rows}) || ' days'), abs(random()) % 3, 1 + abs(random()) % 4,
                    abs(random()) % 1000 / 1000.0 FROM t"""
                )
            )


def plain(source: str, columns: tuple[str, ...]) -> str:
    """Return one plain aggregate: count, sums, and sums of products, without any care for digits."""
    products = [f"SUM({a} * {b})" for i, a in enumerate(columns) for b in columns[: i + 1]]
    parts = ["arm", "stage", "day", "COUNT(*)", *(f"SUM({name})" for name in columns), *products]
    return f"SELECT {', '.join(parts)} FROM {source} GROUP BY arm, stage, day"


def database(rows: int) -> None:
    """Print the analysis in the database beside plain aggregates over the same rows."""
    names = ("row", "user_key", "arm", "stage", "day", "y", "s", "x")
    kinds = [sa.Integer, sa.Integer, sa.Text, sa.Text, sa.Text, sa.Double, sa.Double, sa.Double]
    users, events = (
        sa.table(table, *(sa.column(name, kind) for name, kind in zip(names, kinds, strict=True)))
        for table in ("users", "events")
    )
    keys = [events.c[name] for name in ("user_key", "arm", "stage")]
    grouped = sa.select(
        *keys, sa.func.min(events.c.day).label("day"), *(sa.func.sum(events.c[name]).label(name) for name in ("y", "s"))
    ).group_by(*keys)
    sums = "MIN(day) AS day, SUM(y) AS y, SUM(s) AS s"
    per_user = f"(SELECT user_key, arm, stage, {sums} FROM events GROUP BY user_key, arm, stage)"
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'exposures.db'}"
        fill(url, rows)
        print(f"{rows:,} exposures in SQLite, 28 cells of arm, stage and day")
        print(f"  {'':46} {'plain, s':>9} {'ours, s':>9} {'ratio':>6} {'memory':>10}")
        with reading(engine(url)) as connection:
            cases: list[tuple[str, str, Callable[[], Summaries], dict[str, Any]]] = [
                ("mean of y", plain("users", ("y",)), lambda: summarise_query(connection, users, ("y",)), {}),
                (
                    "y / s",
                    plain("users", ("y", "s")),
                    lambda: summarise_query(connection, users, ("y", "s")),
                    {"metric": RATIO},
                ),
                (
                    "y / s, CUPED",
                    plain("users", ("y", "s", "x")),
                    lambda: summarise_query(connection, users, ("y", "s"), ("x",)),
                    {"metric": RATIO, "adjust": "cuped"},
                ),
                (
                    "y / s, four rows a user, added up first",
                    plain(per_user, ("y", "s")),
                    lambda: summarise_query(connection, grouped, ("y", "s"), glance=False),
                    {"metric": RATIO},
                ),
            ]
            for name, statement, ours, options in cases:
                before = peak()
                base = seconds(lambda s=statement: connection.exec_driver_sql(s).all(), 2)  # type: ignore[misc]
                own = seconds(lambda f=ours, o=options: compare(f(), **o), 2)  # type: ignore[misc]
                print(f"  {name:46} {base:9.2f} {own:9.2f} {own / base:6.2f} {peak() - before:+8.1f} MB")


def stream() -> None:
    """Print what adding a batch costs, after ten thousand and after ten million users."""
    rng = np.random.default_rng(0)
    day = [Cell(arm, "", f"2026-03-{d:02}") for d in range(1, 15) for arm in ("control", "treatment")]
    batch = summarise(
        {"arm": ["control", "treatment"] * 500, "y": rng.random(1_000), "day": ["2026-03-14"] * 1_000}, ("y",)
    )
    print("adding a batch to a running summary of 28 cells")
    timings = []
    for users in (10_000, 10_000_000):
        count = np.full(len(day), users // len(day))
        whole = from_sums(("y",), day, count, count[:, None] * 0.5, count[:, None, None] * 0.35, arms=batch.arms)
        timings.append(seconds(lambda w=whole: [w + batch for _ in range(200)]) / 200)  # type: ignore[misc]
        print(
            f"  after {users:>10,} users: {1e6 * timings[-1]:6.0f} us a batch, {1e6 * timings[-1] / 1000:.2f} us a user"
        )
    one, other = Moments.of(y=rng.random(10_000)), Moments.of(y=[0.4])
    single = seconds(lambda: [one + other for _ in range(500)]) / 500
    print(f"  ratio {timings[1] / timings[0]:.2f}; one user to one arm: {1e6 * single:.0f} us")


def install_tea() -> bool:
    """Put tea-tasting into its own folder; say why not when that fails."""
    if (TEA / "tea_tasting").is_dir():
        return True
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(TEA), *TEA_PACKAGES]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired):
        done = None
    if done is None or done.returncode:
        print("  tea-tasting could not be installed into a folder of its own: left out")
        return False
    return True


TEA_CODE = """
import json, sys, time
import pandas as pd, tea_tasting as tt
frame = pd.read_parquet(sys.argv[1])
found = {}
for name, metric in (("y / s", tt.RatioOfMeans("y", "s")), ("y, CUPED", tt.Mean("y", "x"))):
    experiment, timings = tt.Experiment({name: metric}), []
    for _ in range(3):
        start = time.process_time()
        result = experiment.analyze(frame)
        timings.append(time.process_time() - start)
    row = result.to_dicts()[0]
    found[name] = [min(timings), row["effect_size"], row["effect_size_ci_lower"], row["effect_size_ci_upper"]]
print(json.dumps(found))
"""


def frame(rows: int) -> None:
    """Print the analysis of a frame beside scipy and tea-tasting."""
    from scipy import stats

    rng = np.random.default_rng(1)
    arm = rng.integers(0, 2, rows)
    data = pd.DataFrame(
        {"arm": np.where(arm == 1, "treatment", "control"), "variant": arm, "s": rng.poisson(2, rows) + 1.0}
    )
    data["x"] = data["s"] + rng.normal(0, 1, rows)
    data["y"] = rng.binomial(data["s"].astype(int), 0.3).astype(float)
    print(f"a frame of {rows:,} users")
    welch = seconds(lambda: compare(summarise(data)))
    split = seconds(lambda: stats.ttest_ind(data["y"][arm == 1], data["y"][arm == 0], equal_var=False))
    ours, theirs = compare(summarise(data)), stats.ttest_ind(data["y"][arm == 1], data["y"][arm == 0], equal_var=False)
    assert abs(ours.pvalue - theirs.pvalue) < 1e-9
    print(f"  Welch: ours {welch:.3f} s, scipy {split:.3f} s, ratio {welch / split:.2f}, same p-value")
    options: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "y / s": ({"totals": ("y", "s")}, {"metric": RATIO}),
        "y, CUPED": ({"totals": ("y",), "covariates": ("x",)}, {"adjust": "cuped"}),
    }
    found = {}
    if install_tea():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "frame.parquet"
            data.to_parquet(path)
            done = subprocess.run(
                [sys.executable, "-c", TEA_CODE, str(path)],
                env={**os.environ, "PYTHONPATH": str(TEA)},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                print("  tea-tasting did not run here: left out")
            else:
                found = json.loads(done.stdout)
    for name, (summary, question) in options.items():
        taken = seconds(lambda s=summary, q=question: compare(summarise(data, **s), **q))  # type: ignore[misc]
        effect = compare(summarise(data, **summary), **question)
        line = f"  {name}: ours {taken:.3f} s"
        if name in found:
            other, *numbers = found[name]
            away = max(abs(a - b) for a, b in zip(numbers, (effect.effect, effect.lower, effect.upper), strict=True))
            line += f", tea-tasting {other:.3f} s, ratio {taken / other:.2f}, the same up to {away:.1e}"
        print(line)


def main(rows: int = 1_000_000) -> None:
    """Print all measurements."""
    database(rows)
    stream()
    frame(min(rows, 1_000_000))


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:2]))
