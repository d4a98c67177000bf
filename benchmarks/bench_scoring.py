"""How much our scoring costs beside the bare runtime on the same network, in one run.

    python benchmarks/bench_scoring.py [--rows 200000]

The baseline of each ratio is named in its line; times are the best of several rounds, latencies the median and the 99th
percentile of single calls. The network is a random 39-128-64-1 and 45-128-64-32-1 with neutral values inside the graph.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import onnxruntime
import pandas as pd
from onnx import TensorProto, helper, numpy_helper

from calling_ai.core.contract import FEATURE_NAMES, NEUTRAL
from calling_ai.score.formula import formula
from calling_ai.score.policy import Policy
from calling_ai.serve.guard import INTERFACES
from calling_ai.serve.scorer import Network, Scorer


def network(model: str, sizes: tuple[int, ...]) -> bytes:
    "Return a random network with rectified hidden layers and a logistic output."
    rng, held, name = np.random.default_rng(len(sizes)), {"neutral": NEUTRAL[: sizes[0]].astype("float32")}, "filled"
    nodes = [
        helper.make_node("IsNaN", ["features"], ["missing"]),
        helper.make_node("Where", ["missing", "neutral", "features"], ["filled"]),
    ]
    for index, (inputs, outputs) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        last = index == len(sizes) - 2
        held[f"w{index}"] = rng.normal(0, inputs**-0.5, (inputs, outputs)).astype("float32")
        held[f"b{index}"] = np.zeros(outputs, "float32")
        nodes.append(helper.make_node("Gemm", [name, f"w{index}", f"b{index}"], [f"sum{index}"]))
        name = INTERFACES[model][0] if last else f"layer{index}"
        nodes.append(helper.make_node("Sigmoid" if last else "Relu", [f"sum{index}"], [name]))
    graph = helper.make_graph(
        nodes,
        model,
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", sizes[0]])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1])],
        [numpy_helper.from_array(value, key) for key, value in held.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()


def best(work: Callable[[], object], rounds: int = 5) -> float:
    "Return the shortest time of several rounds, in seconds."
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def latency(work: Callable[[], object], calls: int = 2000) -> tuple[float, float]:
    "Return median and 99th percentile of single calls, in microseconds."
    times = np.empty(calls)
    for call in range(calls):
        start = time.perf_counter()
        work()
        times[call] = time.perf_counter() - start
    return float(np.median(times) * 1e6), float(np.percentile(times, 99) * 1e6)


def main() -> None:
    "Print the table."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    rows = parser.parse_args().rows
    data = {
        "calling_score": network("calling_score", (39, 128, 64, 1)),
        "outcome": network("outcome", (45, 128, 64, 32, 1)),
    }
    scorer = Scorer(
        {model: Network(content, model, "bench") for model, content in data.items()}, {}, Policy(weight=0.3)
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    bare = {
        model: onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        for model, content in data.items()
    }
    values = np.random.default_rng(0).random((rows, 45))
    inputs = {"calling_score": values[:, :39].astype("float32"), "outcome": values.astype("float32")}
    frame = pd.DataFrame(values, columns=FEATURE_NAMES)

    def run_bare(start: int, stop: int) -> None:
        for model, session in bare.items():
            session.run(None, {"features": inputs[model][start:stop]})

    print(f"{rows:,} rows, both networks, one thread; onnxruntime {onnxruntime.__version__}, numpy {np.__version__}\n")
    print(f"{'throughput':38}{'rows/s':>12}   {'share of the baseline':24}")
    base = best(lambda: [run_bare(start, start + 8192) for start in range(0, rows, 8192)])
    print(f"{'bare onnxruntime, chunks of 8,192':38}{rows / base:12,.0f}   baseline")
    lines = {
        "bare onnxruntime, one chunk of all": lambda: run_bare(0, rows),
        "Network.run of both models": lambda: [item.run(values) for item in scorer.networks.values()],
        "formula alone": lambda: formula(values),
        "score_array": lambda: scorer.score_array(values),
        "score_frame": lambda: scorer.score_frame(frame),
    }
    for name, work in lines.items():
        took = best(work, 3)
        print(f"{name:38}{rows / took:12,.0f}   {base / took:6.2f}")

    print(f"\n{'latency of one moment':38}{'median us':>12}{'p99 us':>10}   {'ratio to the baseline':24}")
    one, moment = values[:1], dict(zip(FEATURE_NAMES, values[0].tolist(), strict=True))
    base, tail = latency(lambda: run_bare(0, 1))
    print(f"{'bare onnxruntime, both networks':38}{base:12.1f}{tail:10.1f}   baseline")
    for name, work in {
        "formula alone": lambda: formula(one),
        "score_array": lambda: scorer.score_array(one),
        "score of a dictionary": lambda: scorer.score(moment),
    }.items():
        median, tail = latency(work)
        print(f"{name:38}{median:12.1f}{tail:10.1f}   {median / base:6.2f}")

    print("\nimport and first score, new process")
    start_up = {
        "numpy, onnxruntime": "import numpy, onnxruntime",
        "calling_ai.serve.scorer, formula only": (
            "from calling_ai.serve.scorer import Scorer; Scorer.formula_only().score({})"
        ),
    }
    base = best(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True), 3)
    for name, code in start_up.items():
        took = best(lambda code=code: subprocess.run([sys.executable, "-c", code], check=True), 3)
        print(f"{name:38}{(took - base) * 1e3:9.0f} ms above a bare interpreter")


if __name__ == "__main__":
    main()
