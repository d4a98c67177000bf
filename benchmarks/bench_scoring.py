"""What a score costs, beside the bare runtime on the same release graph, and beside other ways to serve the network.

    python benchmarks/bench_scoring.py [--calls 3000] [--mlflow]

Everything is measured in one run. Latencies are taken in turns, one call of each kind after the other, so that a busy
machine slows all of them alike; the baseline of each ratio is named in its line. The release holds the formula, a
39-128-64-1 and a 45-128-64-32-1 network with random weights, exported as the package exports them. `--mlflow` makes an
environment of its own in var/bench-mlflow, installs mlflow into it and measures mlflow.pyfunc there. The picture goes
to reports/bench_scoring.png.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnxruntime
import pandas as pd
import torch

from calling_ai.core.contract import FEATURE_NAMES
from calling_ai.core.plots import COLOURS, figure
from calling_ai.models.graph import compose, export
from calling_ai.models.networks import build, default_spec, predict
from calling_ai.registry.versions import Registry, VersionDraft
from calling_ai.score.formula import formula
from calling_ai.score.policy import Policy
from calling_ai.serve.scorer import Scorer

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("calling_score", "outcome")

PYFUNC = """
import json, sys, time
import mlflow, numpy, onnxruntime, pandas

class Wrapped(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(context.artifacts["release"], options, providers=providers)

    def predict(self, context, model_input, params=None):
        return self.session.run(["answer"], {"features": numpy.ascontiguousarray(model_input.to_numpy(dtype=float))})[0]

folder = sys.argv[2]
mlflow.pyfunc.save_model(folder + "/pyfunc", python_model=Wrapped(), artifacts={"release": sys.argv[1]})
model = mlflow.pyfunc.load_model(folder + "/pyfunc")
one = pandas.DataFrame(numpy.random.default_rng(0).random((1, 45)))
for _ in range(20): model.predict(one)
times = []
for _ in range(300):
    begun = time.perf_counter(); model.predict(one); times.append(time.perf_counter() - begun)
print(json.dumps({"median": float(numpy.median(times)) * 1e6, "p99": float(numpy.percentile(times, 99)) * 1e6}))
"""


def in_turns(kinds: dict[str, Callable[[], object]], calls: int) -> dict[str, np.ndarray]:
    "Return the microseconds of single calls of each kind, taken in turns."
    times = {name: np.empty(calls) for name in kinds}
    for work in kinds.values():
        for _ in range(20):
            work()
    for call in range(calls):
        for name, work in kinds.items():
            begun = time.perf_counter()
            work()
            times[name][call] = (time.perf_counter() - begun) * 1e6
    return times


def rates(kinds: dict[str, Callable[[], object]], rows: int, rounds: int = 7) -> dict[str, float]:
    "Return the rows per second of each kind, the best of several rounds taken in turns."
    best = dict.fromkeys(kinds, np.inf)
    for _ in range(rounds):
        for name, work in kinds.items():
            begun = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - begun)
    return {name: rows / took for name, took in best.items()}


def threaded(work: Callable[[], object], threads: int, seconds: float = 1.5) -> float:
    "Return the calls per second of several threads together."
    counts, stop = [0] * threads, threading.Event()

    def run(index: int) -> None:
        while not stop.is_set():
            work()
            counts[index] += 1

    workers = [threading.Thread(target=run, args=(index,)) for index in range(threads)]
    begun = time.perf_counter()
    for worker in workers:
        worker.start()
    time.sleep(seconds)
    stop.set()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.perf_counter() - begun)


def with_mlflow(release: Path, folder: Path) -> dict[str, float] | str:
    "Measure mlflow.pyfunc in an environment of its own, or say why not."
    home = ROOT / "var" / "bench-mlflow"
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "mlflow", "onnxruntime"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"mlflow could not be installed: {done.stderr.strip().splitlines()[-1][:120]}"
    command = [str(python), "-W", "ignore", "-c", PYFUNC, str(release), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        return f"mlflow failed: {done.stderr.strip().splitlines()[-1][:120]}"
    return json.loads(done.stdout.splitlines()[-1])


def start_up(root: Path) -> tuple[float, float, str]:
    "Return the seconds of an empty process and of one that loads the champion, and what it has loaded."
    heavy = ("torch", "pandas", "scipy.stats", "prefect", "jupyter", "matplotlib", "sqlalchemy", "sklearn", "onnx")
    code = (
        "import calling_ai.serve, sys\nfrom calling_ai.serve.scorer import Scorer\n"
        "scorer = Scorer.load(root=sys.argv[1])\nassert scorer.release\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    empty, loaded, found = np.inf, np.inf, ""
    for _ in range(7):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        middle = time.perf_counter()
        command = [sys.executable, "-c", code, str(root)]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        empty, loaded = min(empty, middle - begun), min(loaded, time.perf_counter() - middle)
    return empty, loaded, found


def draw(single: list[tuple[str, float, float]], batch: list[tuple[str, float]]) -> Path:
    "Draw both tables."
    from matplotlib.ticker import NullFormatter

    fig, (left, right) = figure(8.5, 7.5, rows=2)
    names = [name for name, _, _ in single]
    colours = [COLOURS["network"] if name.startswith("score") else COLOURS["grey"] for name in names]
    left.barh(names, [median for _, median, _ in single], color=colours)
    left.scatter(
        [tail for _, _, tail in single], names, color=COLOURS["formula"], marker="|", s=120, label="99th percentile"
    )
    left.set(xscale="log", xlabel="microseconds for one moment (median)", title="One moment")
    left.xaxis.set_minor_formatter(NullFormatter())
    left.legend(loc="upper right", bbox_to_anchor=(1, 1.16))
    left.invert_yaxis()
    names = [name for name, _ in batch]
    colours = [COLOURS["network"] if name.startswith("score") else COLOURS["grey"] for name in names]
    right.barh(names, [rate / 1e3 for _, rate in batch], color=colours)
    right.set(xlabel="thousand moments a second", title="Ten thousand moments")
    right.invert_yaxis()
    path = ROOT / "reports" / "bench_scoring.png"
    path.parent.mkdir(exist_ok=True)
    fig.savefig(path, dpi=130)
    return path


def main() -> None:
    "Print the tables and draw the picture."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=3_000)
    parser.add_argument("--mlflow", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    networks = {model: build(default_spec(model), seed=3) for model in MODELS}
    for model, network in networks.items():
        export(network, folder / f"{model}.onnx")
    root = folder / "workspace"
    root.mkdir()
    registry = Registry(root)
    made = registry.register(
        [VersionDraft(m, "town", folder / f"{m}.onnx") for m in MODELS], dict.fromkeys(MODELS, "champion")
    )
    composed = compose(*(folder / f"{model}.onnx" for model in MODELS), folder / "release.onnx", Policy(weight=0.3))
    registry.keep_release(folder / "release.onnx", {item.model: item for item in made})
    scorer = Scorer.load(root=root, policy=Policy(weight=0.3), strict=True)
    plain = onnxruntime.SessionOptions()
    plain.intra_op_num_threads, plain.log_severity_level = 1, 4
    bare = onnxruntime.InferenceSession(str(folder / "release.onnx"), plain, providers=["CPUExecutionProvider"])

    values = np.random.default_rng(0).random((10_000, 45))
    one, moment = values[:1].copy(), dict(zip(FEATURE_NAMES, values[0].tolist(), strict=True))
    frame = pd.DataFrame(values, columns=list(FEATURE_NAMES))
    from sklearn.neural_network import MLPRegressor

    fitted = MLPRegressor(hidden_layer_sizes=(128, 64), max_iter=2, random_state=0)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted.fit(values[:500, :39], values[:500, 0])
    short = one[:, :39].copy()
    sessions = {
        m: onnxruntime.InferenceSession(str(folder / f"{m}.onnx"), plain, providers=["CPUExecutionProvider"])
        for m in MODELS
    }
    narrow = short.astype("float32")
    baseline = "bare onnxruntime, same graph"
    kinds: dict[str, Callable[[], Any]] = {
        baseline: lambda: bare.run(["answer"], {"features": one}),
        "score_array": lambda: scorer.score_array(one),
        "score of a dictionary": lambda: scorer.score(moment),
        "score, exploring": lambda: scorer.score(moment, "decision-1"),
        "formula in numpy": lambda: formula(one),
        "calling-score network alone, onnxruntime": lambda: sessions["calling_score"].run(None, {"features": narrow}),
        "calling-score network alone, torch eager": lambda: predict(networks["calling_score"], short),
        "same layers, scikit-learn predict": lambda: fitted.predict(short),
    }
    print(f"release {composed.digest[:12]}: {composed.bytes:,} bytes, {composed.nodes} nodes")
    print(f"onnxruntime {onnxruntime.__version__}, numpy {np.__version__}, torch {torch.__version__}")
    print(f"load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    print(f"{'one moment':44}{'median us':>11}{'p99 us':>10}{'ratio':>8}  above the baseline")
    times = in_turns(kinds, options.calls)
    base, single = float(np.median(times[baseline])), []
    for name, took in times.items():
        median, tail = float(np.median(took)), float(np.percentile(took, 99))
        single.append((name, median, tail))
        print(f"{name:44}{median:11.1f}{tail:10.1f}{median / base:8.2f}{median - base:+10.1f} us")
    if options.mlflow:
        found = with_mlflow(folder / "release.onnx", folder)
        if isinstance(found, str):
            print(found)
        else:
            name, median, tail = "same graph, mlflow.pyfunc", found["median"], found["p99"]
            single.append((name, median, tail))
            print(f"{name:44}{median:11.1f}{tail:10.1f}{median / base:8.2f}{median - base:+10.1f} us")
    else:
        print("same graph, mlflow.pyfunc: skipped; --mlflow installs it into an environment of its own")

    print(f"\n{'ten thousand moments':44}{'rows/s':>11}{'ratio':>18}")
    whole = "bare onnxruntime, all at once"
    batches = {
        whole: lambda: bare.run(["answer"], {"features": values}),
        "bare onnxruntime, in pieces of 2,048": lambda: [
            bare.run(["answer"], {"features": values[start : start + 2_048]}) for start in range(0, 10_000, 2_048)
        ],
        "score_array": lambda: scorer.score_array(values),
        "score_frame": lambda: scorer.score_frame(frame),
        "formula in numpy": lambda: formula(values),
    }
    found_rates = rates(batches, 10_000)
    for name, rate in found_rates.items():
        print(f"{name:44}{rate:11,.0f}{rate / found_rates[whole]:18.2f}")

    alone, eight = threaded(lambda: scorer.score_array(one), 1), threaded(lambda: scorer.score_array(one), 8)
    print(f"\n8 calling threads: {eight:,.0f} scores/s, {eight / alone:.2f} x one thread ({alone:,.0f})")
    empty, loaded, modules = start_up(root)
    print(f"import calling_ai.serve and load the champion: {loaded:.2f} s, an empty process takes {empty:.2f} s")
    print(f"heavy modules loaded by that: {modules}")
    print(f"picture: {draw(single, list(found_rates.items())).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
