"""Files from strangers: twenty-five ways to harm a host, none of which does."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_models_graph_release import network

from calling_ai.core.errors import CallingError, IntegrityError, RefusedError
from calling_ai.models.graph import release_bytes
from calling_ai.serve.guard import inspect_model, try_out
from calling_ai.serve.scorer import Scorer


def model() -> onnx.ModelProto:
    return onnx.load_model_from_string(network("calling_score", 1))


def changed(change: Callable[[onnx.ModelProto], object]) -> Callable[[Path], bytes]:
    def make(_: Path) -> bytes:
        made = model()
        change(made)
        return made.SerializeToString()

    return make


def outside(where: str) -> Callable[[Path], bytes]:
    def make(folder: Path) -> bytes:
        made = model()
        tensor = made.graph.initializer[0]
        onnx.external_data_helper.set_external_data(tensor, where.format(folder=folder))
        tensor.ClearField("raw_data")
        return made.SerializeToString()

    return make


def insert(*nodes: onnx.NodeProto, held: dict[str, np.ndarray] | None = None) -> Callable[[Path], bytes]:
    "Put nodes in front of the last one, which then takes `moved`."

    def make(_: Path) -> bytes:
        made = model()
        kept = list(made.graph.node)
        kept[-1].input[0] = "moved"
        del made.graph.node[:]
        made.graph.node.extend([*kept[:-1], *nodes, kept[-1]])
        for name, value in (held or {}).items():
            made.graph.initializer.append(numpy_helper.from_array(value, name))
        return made.SerializeToString()

    return make


def deep(kind: str) -> Callable[[Path], bytes]:
    "Return a graph in a graph in a graph, or a function in a function."

    def make(_: Path) -> bytes:
        made = model()
        if kind == "graph":
            inner = helper.make_graph([helper.make_node("Identity", ["a"], ["b"])], "g", [], [])
            for _ in range(25):
                inner = helper.make_graph([helper.make_node("Identity", ["a"], ["b"], body=inner)], "g", [], [])
            made.graph.node.append(helper.make_node("If", ["missing"], ["x"], then_branch=inner, else_branch=inner))
        else:
            for level in range(60):
                called = helper.make_node(f"F{level + 1}", ["x"], ["y"], domain="mine")
                made.functions.append(
                    helper.make_function("mine", f"F{level}", ["x"], ["y"], [called], [helper.make_opsetid("mine", 1)])
                )
        return made.SerializeToString()

    return make


def chain(length: int) -> Callable[[Path], bytes]:
    "Return a long chain of large products: nothing wrong with any of them."
    nodes = [helper.make_node("MatMul", ["filled", "enter"], ["p0"])]
    for place in range(length):
        nodes.append(helper.make_node("MatMul", [f"p{place}", "wide"], [f"q{place}"]))
        nodes.append(helper.make_node("Sigmoid", [f"q{place}"], [f"p{place + 1}"]))
    nodes += [
        helper.make_node("MatMul", [f"p{length}", "leave"], ["end"]),
        helper.make_node("Add", ["logit", "end"], ["moved"]),
    ]
    held = {
        "enter": np.zeros((39, 1400), "float32"),
        "wide": np.zeros((1400, 1400), "float32"),
        "leave": np.zeros((1400, 1), "float32"),
    }
    return insert(*nodes, held=held)


def claims(dims: list[int], data: bytes | None = None) -> Callable[[Path], bytes]:
    def change(made: onnx.ModelProto) -> None:
        tensor = made.graph.initializer[0]
        del tensor.dims[:]
        tensor.dims.extend(dims)
        if data is not None:
            tensor.raw_data = data

    return changed(change)


def bytes_of(content: bytes) -> Callable[[Path], bytes]:
    return lambda _: content


PAIRS = {"row": np.zeros((1, 60_000), "float32"), "column": np.zeros((60_000, 1), "float32")}
HOSTILE: dict[str, Callable[[Path], bytes]] = {
    "path traversal": outside("../../../../../../etc/passwd"),
    "absolute path": outside("/etc/passwd"),
    "a link beside it": outside("link"),
    "a file beside it": outside("secret.bin"),
    "a device": outside("/dev/zero"),
    "location without data": changed(lambda m: setattr(m.graph.initializer[0], "data_location", TensorProto.EXTERNAL)),
    "length longer than the file": bytes_of(b"\x3a\xff\xff\xff\x7f" + b"x" * 50),
    "length without end": bytes_of(b"\x3a" + b"\xff" * 200),
    "negative length": bytes_of(b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01abc"),
    "deep graphs": deep("graph"),
    "deep functions": deep("function"),
    "memory: a tensor that claims to be vast": claims([2**40]),
    "memory: sizes that overflow": claims([2**33, 2**33]),
    "memory: a negative size": claims([-5]),
    "memory: more data than the shape": claims([2], bytes(4_000)),
    "memory: all pairs": insert(
        helper.make_node("Add", ["row", "logit"], ["line"]),
        helper.make_node("Unsqueeze", ["column", "axis"], ["upright"]),
        helper.make_node("Add", ["line", "upright"], ["pairs"]),
        helper.make_node("ReduceMax", ["pairs"], ["largest"], keepdims=0),
        helper.make_node("Add", ["logit", "largest"], ["moved"]),
        held=PAIRS | {"axis": np.array([1], "int64")},
    ),
    "time: a chain of products": chain(4_000),
    "an operator that expands": insert(
        helper.make_node("Expand", ["logit", "shape"], ["moved"]), held={"shape": np.array([2**31, 2**10], "int64")}
    ),
    "an operator that loops": insert(helper.make_node("Loop", ["", "", "logit"], ["moved"])),
    "an operator that reads": insert(helper.make_node("ImageDecoder", ["logit"], ["moved"])),
    "an unknown domain": changed(lambda m: setattr(m.graph.node[0], "domain", "com.evil")),
    "code of its own": changed(lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx.contrib", 1))),
    "another opset": changed(lambda m: setattr(m.opset_import[0], "version", 2**40)),
    "eleven megabytes": bytes_of(network("calling_score", 1) + b"\x7a\x80\x80\x80\x05" + bytes(11_000_000)),
    "a cycle": changed(lambda m: m.graph.node[0].input.__setitem__(0, "network_score")),
    "names that are not text": changed(lambda m: m.graph.node.append(onnx.NodeProto.FromString(b"\x22\x02\xff\xfe"))),
    "a pickle": bytes_of(
        b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94."
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_harm_nobody(name, tmp_path):
    (tmp_path / "secret.bin").write_bytes(np.full(39, 0.5, "float32").tobytes())
    (tmp_path / "link").symlink_to("/etc/passwd")
    file = tmp_path / "model.onnx"
    file.write_bytes(HOSTILE[name](tmp_path))
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises((RefusedError, IntegrityError)) as refused:
        Scorer.from_file(file)
    took, grown = time.perf_counter() - begun, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert len(str(refused.value)) < 400 and "passwd" not in str(refused.value)
    assert grown < 300, f"the host grew by {grown:.0f} MB"
    print(f"{name}: refused after {took:.2f} s, {grown:.0f} MB more; {refused.value}")


def test_there_are_twenty_five():
    assert len(HOSTILE) >= 25


def test_the_guard_reads_nothing_but_the_file(tmp_path):
    """A hook sees every file that is opened: none is, for a file with data elsewhere."""
    for index, name in enumerate(("path traversal", "absolute path", "a link beside it", "a file beside it")):
        (tmp_path / f"{index}.onnx").write_bytes(HOSTILE[name](tmp_path))
    code = (
        "import sys\nfrom pathlib import Path\nfrom calling_ai.serve.guard import inspect_model\nopened = []\n"
        "datas = [path.read_bytes() for path in sorted(Path(sys.argv[1]).glob('*.onnx'))]\n"
        "sys.addaudithook(lambda event, arguments: opened.append(arguments[0]) if event == 'open' else None)\n"
        "for data in datas:\n"
        "    try: inspect_model(data)\n"
        "    except Exception as error: print(type(error).__name__)\n"
        "print(opened)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "RefusedError\n" * 4 + "[]\n"


def test_good_files_of_strangers_are_welcome(tmp_path):
    (tmp_path / "network.onnx").write_bytes(network("outcome", 4))
    (tmp_path / "release.onnx").write_bytes(release_bytes(network("calling_score", 4), None))
    assert Scorer.from_file(tmp_path / "network.onnx").score({}).path == "formula with outcome model"
    assert Scorer.from_file(tmp_path / "release.onnx").score({}).path == "network without outcome model"


def test_a_child_that_is_killed_or_hangs_is_a_refusal(tmp_path):
    data = chain(4_000)(tmp_path)
    inspect_model(data)
    with pytest.raises(RefusedError, match="ended the process that tried it|did not answer within 6 seconds"):
        try_out(data, seconds=1, patience=6)
    assert os.getpid() > 0


@pytest.mark.parametrize("trials", [400, pytest.param(20_000, marks=pytest.mark.long)])
def test_damaged_releases_never_crash_the_guard(trials):
    whole, rng, passed = release_bytes(network("calling_score", 4), network("outcome", 5)), np.random.default_rng(0), 0
    for _ in range(trials):
        data = bytearray(whole)
        for _ in range(int(rng.integers(1, 4))):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        try:
            inspect_model(bytes(data))
            passed += 1
        except CallingError as error:
            assert str(error)
    print(
        f"{trials} damaged releases, 0 crashes (below {3 / trials:.2%}); {passed} look whole: only their digest tells"
    )
