"""How good the models are, beside what others reach on the same rows: published records, coupons, town.

Run with `python benchmarks/bench_quality.py [records|coupons|town] [--seeds N]`; the shared data is looked for in
CI_SHARED or ../shared. Baselines in the same run: the floor and the plain network on the published records, logistic
regression and gradient boosting on the coupons, the formula and the truth in the town. Ratios are printed beside them.
"""

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from calling_ai.core.contract import feature_table, fill_neutral
from calling_ai.models.evaluation import auc, log_loss
from calling_ai.models.networks import default_spec, predict, reference_spec
from calling_ai.models.training import default_options, train

SHARED = Path(os.environ.get("CI_SHARED") or Path(__file__).resolve().parents[2] / "shared") / "data"


def records(seeds: int) -> None:
    """Print the squared error on unseen published records, over splits and seeds."""
    from calling_ai.world.hybrid import bayes_prediction

    frame = pd.read_csv(SHARED / "hybrid_v1.csv.gz")
    x, y = feature_table(frame).values[:, :39], frame["outcome_score"].to_numpy()
    best, found = bayes_prediction(frame)["mean"].to_numpy(), []
    for seed in range(seeds):
        order = np.random.default_rng([seed, 70]).permutation(len(x))
        learn, check, test = np.split(order, [int(0.70 * len(x)), int(0.85 * len(x))])
        row = [((best[test] - y[test]) ** 2).mean()]
        for spec in (default_spec("calling_score"), reference_spec("calling_score")):
            options = default_options("calling_score", seed=seed)
            network = train(spec, x[learn], y[learn], (x[check], y[check]), options=options).network
            row.append(((predict(network, x[test]) - y[test]) ** 2).mean())
        found.append(row)
    floor, ours, plain = np.median(found, axis=0)
    print(f"published records, median of {seeds}: floor {floor:.4f}, ours {ours:.4f} ({ours / floor:.2f} x), ", end="")
    print(f"plain network {plain:.4f} ({plain / floor:.2f} x); ours / floor by split ", end="")
    print(", ".join(f"{row[1] / row[0]:.3f}" for row in found))


def coupons(seeds: int, folds: int = 4) -> None:
    """Print AUC, log loss, and precision and share of calls at the gate, every person held out once."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression

    from calling_ai.operate.candidates import fit, labelled_rows
    from calling_ai.operate.candidates import predict as ask
    from calling_ai.world.coupons import coupons as read

    for history in (False, True):
        frame = read(SHARED / "in_vehicle_coupons.csv.gz", history=history)
        x, positive = feature_table(frame).values, (frame["outcome_score"] >= 0.7).to_numpy(float)
        people = pd.unique(frame["user_id"])
        for seed in range(seeds):
            order = np.random.default_rng([seed, 4]).permutation(len(people)) % folds
            part = pd.Series(order, index=people)[frame["user_id"]].to_numpy()
            said = {name: np.empty(len(frame)) for name in ("logistic regression", "gradient boosting", "network")}
            for number in range(folds):
                learn, test = part != number, part == number
                candidate = fit(
                    labelled_rows(frame[learn], "outcome"), "outcome", tempfile.mkdtemp(), seed, replicates=20
                )
                said["network"][test] = ask(candidate.file, "outcome", x[test])
                boosting = HistGradientBoostingClassifier(
                    max_iter=150, learning_rate=0.06, max_leaf_nodes=15, min_samples_leaf=30, l2_regularization=5.0
                )
                for name, model in (
                    ("gradient boosting", boosting),
                    ("logistic regression", LogisticRegression(max_iter=1_000)),
                ):
                    model.fit(fill_neutral(x[learn]), positive[learn])
                    said[name][test] = model.predict_proba(fill_neutral(x[test]))[:, 1]
            print(f"coupons, {'with' if history else 'without'} history, split {seed}:")
            for name, answers in said.items():
                called = answers > 0.7
                print(
                    f"  {name:20} AUC {auc(answers, positive):.4f}, log loss {log_loss(answers, positive):.4f}", end=""
                )
                print(f", accepted among the {called.mean():.1%} called {positive[called].mean():.3f}")


def town(weeks: int = 8, people: int = 2_800, seed: int = 2026) -> None:
    """Print AUC, and what an equal number of calls is worth when spent by each score."""
    from calling_ai.operate.candidates import fit, labelled_rows
    from calling_ai.operate.candidates import predict as ask
    from calling_ai.operate.collect import collect
    from calling_ai.store.snapshots import read_snapshot

    made = collect(people, weeks, seed, tempfile.mkdtemp())
    frame, truth = read_snapshot(made.snapshot.path), read_snapshot(made.truth.path)
    test = (frame["split"] == "test").to_numpy()
    x, truth = feature_table(frame[test]).values, truth[test]
    scores = {"formula": frame["formula_score"].to_numpy()[test]}
    for model, width in (("outcome", 45), ("calling_score", 39)):
        candidate = fit(labelled_rows(frame, model), model, tempfile.mkdtemp(), replicates=20)
        scores[model] = ask(candidate.file, model, x[:, :width])
    scores["hybrid, weight 0.3"] = 0.7 * scores["formula"] + 0.3 * scores["calling_score"]
    scores["hybrid, weight 0.5"] = 0.5 * scores["formula"] + 0.5 * scores["calling_score"]
    scores["the truth"] = truth["truth_expected_score"].to_numpy()
    positive, worth = truth["truth_positive"].to_numpy(float), scores["the truth"] - 0.5
    calls = int((scores["formula"] >= 0.7).sum())
    value = {name: 1_000 * worth[np.argsort(-score)[:calls]].sum() / len(worth) for name, score in scores.items()}
    print(f"town, {people:,} people, {weeks} weeks, {calls:,} calls among {len(worth):,} unseen decisions:")
    for name, score in scores.items():
        print(f"  {name:20} AUC {auc(score, positive):.4f}, value {value[name]:6.1f} per 1,000 decisions", end="")
        print(
            f" ({value[name] / value['formula']:.2f} x the formula, {value[name] / value['the truth']:.0%} of the best)"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["records", "coupons", "town"], help="records, coupons, town")
    parser.add_argument("--seeds", type=int, default=5, help="splits and seeds of the records; the coupons take two")
    arguments = parser.parse_args()
    if "records" in arguments.parts:
        records(arguments.seeds)
    if "coupons" in arguments.parts:
        coupons(min(arguments.seeds, 2))
    if "town" in arguments.parts:
        town()
