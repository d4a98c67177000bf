"""A search keeps its promises: budgets, taking up again after a kill, and verdicts that are not luck."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from calling_ai.core.errors import InputError
from calling_ai.models.tuning import SearchSpace, champion_parameters, compare_seeds, finalists, settings_of, tune

SMALL = SearchSpace(width=(8, 16), depth=(1, 2), members=(1, 2), batch_size=(32, 64))
RNG = np.random.default_rng(6)
X = RNG.random((260, 39))
Y = np.clip(0.5 * X[:, 24] + 0.2 + 0.1 * RNG.standard_normal(260), 0, 1)
LEARN, CHECK = (X[:200], Y[:200]), (X[200:], Y[200:])


def test_the_settings_in_use_come_first_and_are_never_given_up() -> None:
    search = tune("calling_score", LEARN, CHECK, trials=7, space=SMALL, epochs=4)
    assert search.trials[0].parameters == champion_parameters("calling_score", SMALL, 200)
    assert search.trials[0].state == "complete" and len(search.trials) == 7
    assert search.complete[0].value == min(trial.value for trial in search.complete)
    chosen = finalists(search, 2)
    assert len(chosen) <= 2 and search.trials[0].parameters not in [trial.parameters for trial in chosen]
    again = tune("calling_score", LEARN, CHECK, trials=7, space=SMALL, epochs=4)
    assert [trial.parameters for trial in again.trials] == [trial.parameters for trial in search.trials]
    assert_allclose([trial.value for trial in again.trials], [trial.value for trial in search.trials])


def test_budgets_are_kept() -> None:
    assert len(tune("calling_score", LEARN, CHECK, trials=50, seconds=1e-6, space=SMALL, epochs=1).trials) <= 1
    with pytest.raises(InputError, match="both must be positive"):
        tune("calling_score", LEARN, CHECK, trials=0)
    with pytest.raises(InputError, match="model is 'magic'"):
        tune("magic", LEARN, CHECK)


def test_a_killed_search_goes_on_where_it_was(tmp_path: Path) -> None:
    """SIGKILL in the middle of a search: what was finished stays, and a second start adds only what is missing."""
    place = tmp_path / "tuning.db"
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_models_tuning import CHECK, LEARN, SMALL, tune\n"
        "tune('calling_score', LEARN, CHECK, trials=10_000, space=SMALL, epochs=2, storage=sys.argv[2])\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", program, str(Path(__file__).parent), str(place)], env=environment)
    import sqlite3

    finished, deadline = 0, time.monotonic() + 120
    while finished < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
        if place.exists():
            try:
                with sqlite3.connect(place) as connection:
                    finished = connection.execute("select count(*) from trials where state = 'COMPLETE'").fetchone()[0]
            except sqlite3.OperationalError:
                pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert finished >= 2
    before = tune("calling_score", LEARN, CHECK, trials=1, space=SMALL, epochs=2, storage=place)
    done = [trial for trial in before.trials if trial.state in ("complete", "pruned")]
    assert len(done) >= finished
    after = tune("calling_score", LEARN, CHECK, trials=len(done) + 2, space=SMALL, epochs=2, storage=place)
    assert after.stopped_by == "trials"
    kept = {trial.number: trial for trial in after.trials}
    assert all(kept[trial.number].parameters == trial.parameters for trial in done)
    assert len([trial for trial in after.trials if trial.state in ("complete", "pruned")]) == len(done) + 2


def test_what_a_trial_means() -> None:
    parameters = champion_parameters("outcome", SearchSpace(), 5_000) | {"width": 64, "depth": 2, "members": 4}
    spec, options = settings_of("outcome", parameters, seed=3, epochs=9)
    assert spec.hidden == (64, 32) and spec.members == 4 and options.seed == 3 and options.epochs == 9


def simulated(rng: np.random.Generator, gap: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return answers of two settings over five seeds, targets and users; seeds and people both matter."""
    users = np.repeat(np.arange(60), 5)
    target = np.clip(0.5 + 0.15 * rng.standard_normal(300), 0, 1)
    taste = 0.05 * rng.standard_normal(60)[users]

    def over_seeds(shift: float) -> np.ndarray:
        off = 0.02 * np.abs(rng.standard_normal((5, 1))) + shift
        return np.clip(0.5 + taste + off + 0.01 * rng.standard_normal((5, 300)), 0, 1)

    return over_seeds(gap), over_seeds(0.0), target, users


def test_equal_settings_are_rarely_told_apart_and_different_ones_are() -> None:
    rng = np.random.default_rng(1)
    words = {gap: [] for gap in (0.0, 0.12)}
    for gap, found in words.items():
        for _ in range(150):
            challenger, champion, target, users = simulated(rng, gap)
            result = compare_seeds("mean_squared_error", challenger, champion, target, users, replicates=200)
            assert result.difference.lower <= result.difference.value <= result.difference.upper
            found.append(result.verdict)
    # Five seeds give a bootstrap that is somewhat too narrow: nominal 5 %, at most 12 % is asked for here.
    assert np.mean([word != "cannot tell" for word in words[0.0]]) <= 0.12
    assert np.mean([word == "worse" for word in words[0.12]]) >= 0.9


def test_the_mean_difference_is_that_of_all_rows() -> None:
    challenger, champion, target, users = simulated(np.random.default_rng(2), 0.05)
    found = compare_seeds("log_loss", challenger, champion, (target > 0.5).astype(float), users, replicates=50)
    label = target > 0.5
    expected = [-np.where(label, np.log(answers), np.log1p(-answers)).mean() for answers in (challenger, champion)]
    assert_allclose([found.challenger, found.champion], expected)
    assert_allclose(found.difference.value, expected[0] - expected[1])
    with pytest.raises(InputError, match="seeds x 300 rows"):
        compare_seeds("log_loss", challenger[0], champion, label, users)
