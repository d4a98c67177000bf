"""Running notebooks: what is let in, what is kept, how a run ends; with real papermill and real kernels."""

import ast
import base64
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from calling_ai.core.errors import (
    CallingError,
    InputError,
    InputTypeError,
    IntegrityError,
    NotFoundError,
    SettingsError,
)
from calling_ai.core.files import sha256_file
from calling_ai.operate import notebooks
from calling_ai.operate.notebooks import (
    NotebookError,
    check_parameters,
    html_body,
    parameters_of,
    read_record,
    redact,
    run_notebook,
    secrets_in,
)

PARAMETERS = """count: int = 3  # how many
share: float = 0.5  # how much
label: str = 'a # b'  # what it is called
on: bool = True  # whether
sizes: list[int] = [1, 2]  # layers
pair: tuple[int, str] = (1, 'x')  # two things
many: tuple[float, ...] = (1.0,)  # numbers
table: dict[str, float] = {'a': 1.0}  # numbers by name
limit: int | None = None  # at most
loose: list = []  # anything plain
record: str = ''  # where the result goes"""


def write(path: Path, *cells: str, parameters: str | None = PARAMETERS) -> Path:
    made = [nbformat.v4.new_markdown_cell("# Example")]
    if parameters is not None:
        made.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    for text in cells:
        kind = nbformat.v4.new_markdown_cell if text.startswith("#") else nbformat.v4.new_code_cell
        made.append(kind(text))
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=made), path)
    return path


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return parameters_of(write(tmp_path_factory.mktemp("spec") / "spec.ipynb"))


def same(left, right) -> bool:
    "Equal, and of equal types all the way down."
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return (
        left == right and (left != 0 or math.copysign(1, left) == math.copysign(1, right))
        if isinstance(left, float)
        else left == right
    )


# --- the parameters cell ---------------------------------------------------------------------------------------------


def test_parameters_are_read_as_written(spec):
    assert [item.name for item in spec] == [line.split(":")[0] for line in PARAMETERS.splitlines()]
    by_name = {item.name: item for item in spec}
    assert by_name["label"].default == "a # b" and by_name["label"].help == "what it is called"
    assert by_name["limit"].type == "int | None" and by_name["limit"].default is None
    assert same(by_name["pair"].default, (1, "x"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: int = 1  # ok\nb = 2  # untyped", "line 2: it must read"),
        ("a: int = 1", "line 1: parameter a has no help"),
        ("a: int = '1'  # text", "the default of a is '1': it must be int"),
        ("a: int = True  # flag", "the default of a is True: it must be int"),
        ("a: float = 1e999  # large", "a finite float"),
        ("a: int = open('x')  # call", "it must be a plain value"),
        ("a: set = 1  # type", "type set is not one a parameter can have"),
        ("import os", "line 1: it must read"),
        ("a: int = 1  # x\na: int = 2  # y", "line 2: a is declared twice"),
        ("a: int = (1 +", "it is not valid Python"),
        ("a: list[int] = [1,\n 2]  # two lines", "must stand on one line"),
        ("password: str = ''  # for the mail", "named like a secret"),
        ("a: int  # no default", "it must read"),
    ],
)
def test_a_line_that_does_not_fit_is_named(tmp_path, text, words):
    path = write(tmp_path / "odd.ipynb", parameters=text)
    with pytest.raises(SettingsError) as caught:
        parameters_of(path)
    assert words in str(caught.value) and str(caught.value).startswith("odd.ipynb, parameters cell, line")


def test_not_a_notebook(tmp_path):
    with pytest.raises(NotFoundError):
        parameters_of(tmp_path / "none.ipynb")
    (tmp_path / "broken.ipynb").write_text("{")
    with pytest.raises(IntegrityError):
        parameters_of(tmp_path / "broken.ipynb")
    (tmp_path / "list.ipynb").write_text("[]")
    with pytest.raises(IntegrityError):
        parameters_of(tmp_path / "list.ipynb")
    with pytest.raises(SettingsError, match="has 0 cells tagged parameters"):
        parameters_of(write(tmp_path / "bare.ipynb", parameters=None))


# --- what is let in (B23) --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("count", np.int64(5), 5),
        ("count", np.uint8(200), 200),
        ("share", 1, 1.0),
        ("share", np.float32(0.1), float(np.float32(0.1))),
        ("share", np.float64(-0.0), -0.0),
        ("on", np.bool_(False), False),
        ("label", np.str_("x"), "x"),
        ("sizes", [np.int8(1), 2], [1, 2]),
        ("pair", (7, "y"), (7, "y")),
        ("many", (1, 2.5), (1.0, 2.5)),
        ("table", {"b": 2}, {"b": 2.0}),
        ("limit", None, None),
        ("limit", 4, 4),
        ("loose", [1, "a", None, {"b": (1.5, True)}], [1, "a", None, {"b": (1.5, True)}]),
    ],
)
def test_values_that_fit_arrive_as_they_are(spec, name, value, wanted):
    checked = check_parameters(spec, {name: value})
    assert same(checked[name], wanted)
    assert all(same(checked[item.name], item.default) for item in spec if item.name != name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", True),
        ("count", "5"),
        ("count", 5.0),
        ("count", np.float64(5)),
        ("count", None),
        ("count", 2**63),
        ("count", np.array(5)),
        ("count", np.datetime64("2026-01-01", "ns")),
        ("share", True),
        ("share", float("nan")),
        ("share", float("inf")),
        ("share", np.float64("nan")),
        ("share", 2**53 + 1),
        ("share", "0.5"),
        ("label", Path("x")),
        ("label", b"x"),
        ("label", "\ud800"),
        ("on", 1),
        ("on", "True"),
        ("sizes", (1, 2)),
        ("sizes", [1, True]),
        ("sizes", [1.0]),
        ("pair", [1, "x"]),
        ("pair", (1, "x", 2)),
        ("table", {1: 1.0}),
        ("table", {"a": float("inf")}),
        ("loose", [object()]),
        ("loose", [{1, 2}]),
        ("loose", [float("nan")]),
    ],
)
def test_values_of_another_type_are_refused(spec, name, value):
    with pytest.raises(InputTypeError, match=f"parameter {name} is .* it must be"):
        check_parameters(spec, {name: value})


def test_names_are_held_against_the_cell(spec):
    with pytest.raises(InputError, match=r"did you mean count\? The notebook knows count, label"):
        check_parameters(spec, {"cuont": 1})
    for name in ("a b", "1a", "class", "x=__import__('os').system('true')#", "", 3, None):
        with pytest.raises(InputError, match="plain identifier"):
            check_parameters(spec, {name: 1})


@pytest.mark.parametrize("name", ["password", "apiToken", "SECRET", "hmac_key", "access_key_id", "credentials", "auth"])
def test_names_of_secrets_are_refused(spec, name):
    with pytest.raises(InputError, match="named like a secret"):
        check_parameters(spec, {name: "x"})


@pytest.mark.parametrize(
    "value",
    [
        "postgresql://user:hunter22@host/db",
        "https://0123456789abcdef0123@example.org/repo",
        "key=abc123",
        "password=hunter22",
        'token: "abcdef123456"',
        "AKIAABCDEFGHIJKLMNOP",
        "ghp_0123456789abcdefghij0123456789abcdef",
        "-----BEGIN PRIVATE KEY-----\nMIIE",
        "Authorization: Bearer 0123456789abcdef",
    ],
)
def test_values_that_look_like_secrets_are_refused_without_showing_them(spec, value):
    for given_value in ({"label": value}, {"loose": [{"a": value}]}, {"loose": [{value: 1}]}):
        with pytest.raises(InputError, match="looks like a secret") as caught:
            check_parameters(spec, given_value)
        assert value not in str(caught.value)


@pytest.mark.parametrize(
    "value", ["sort_key", "a key fact", "v1.0-town", "https://example.org/a?b=c", "token", "2026-03-01T06:00:00Z"]
)
def test_ordinary_text_is_not_taken_for_a_secret(spec, value):
    assert check_parameters(spec, {"label": value})["label"] == value
    assert redact(value) == value


HOSTILE = st.sampled_from(
    [
        "__import__('os').environ.__setitem__('PWNED','1')",
        "x = 1; import os",
        "'; raise SystemExit #",
        '""" + str(1/0) + """',
        "\n1/0\n",
        "{0.__class__}",
        "%run evil",
        "!touch pwned",
        "\\",
        "\x00",
        "\u2028",
        "${HOME}",
    ]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    HOSTILE,
    st.integers(-128, 127).map(np.int8),
    st.integers(-(2**63), 2**63 - 1).map(np.int64),
    st.floats(width=32).map(np.float32),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=8) | HOSTILE, inner, max_size=3),
    ),
    max_leaves=6,
)
NAMES = st.one_of(
    st.sampled_from([line.split(":")[0] for line in PARAMETERS.splitlines()]), HOSTILE, st.text(max_size=10)
)
FITTING = st.fixed_dictionaries(
    {},
    optional={
        "count": st.integers(-(2**62), 2**62) | st.integers(0, 9).map(np.int16),
        "share": st.floats(allow_nan=False, allow_infinity=False),
        "label": st.text(st.characters(exclude_categories=("Cs",))) | HOSTILE,
        "on": st.booleans(),
        "sizes": st.lists(st.integers(-9, 9)),
        "pair": st.tuples(st.integers(0, 9), HOSTILE),
        "table": st.dictionaries(HOSTILE, st.floats(-1, 1)),
        "loose": st.lists(HOSTILE | st.none() | st.lists(HOSTILE)),
    },
)


def injected(folder: Path, values) -> str:
    "Return the source of the cell through which values enter a notebook."
    source = folder / "spec.ipynb"
    if not source.exists():
        write(source)
    import tempfile

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        notebook = notebooks._prepare(source, values, Path(scratch))
    return next(cell.source for cell in notebook.cells if "injected-parameters" in cell.metadata.get("tags", []))


@hypothesis_settings(max_examples=800, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(parameters=st.dictionaries(NAMES, VALUES, max_size=4))
def test_whatever_is_given_is_refused_or_arrives_unchanged(spec, parameters):
    kinds = {item.name: item.type for item in spec}
    try:
        checked = check_parameters(spec, parameters)
    except CallingError as error:
        assert "\n" not in str(error)
        return
    assert parameters.keys() <= kinds.keys()
    for name, value in parameters.items():
        assert type(checked[name]).__module__ == "builtins"
        plain = value.item() if isinstance(value, np.generic) else value
        if kinds[name] == "float":
            assert type(plain) in (int, float) and float(plain) == checked[name] and int(plain) == int(checked[name])
        elif type(plain) in (int, str, bool):
            assert same(plain, checked[name])


@hypothesis_settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(parameters=FITTING)
def test_the_injected_cell_holds_literals_only_and_they_are_the_values(spec, tmp_path_factory, parameters):
    try:
        checked = check_parameters(spec, parameters)
    except InputError as error:
        assert "looks like a secret" in str(error)
        return
    tree = ast.parse(injected(tmp_path_factory.getbasetemp(), checked))
    found = {}
    for statement in tree.body:
        assert isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
        assert not any(isinstance(node, (ast.Call, ast.Attribute, ast.Subscript)) for node in ast.walk(statement))
        found[statement.targets[0].id] = ast.literal_eval(statement.value)
    assert same(found, checked)


# --- running ---------------------------------------------------------------------------------------------------------

SHOW = """import json, os, sys
from pathlib import Path
Path(record).write_text(json.dumps({"values": repr((count, share, label, sizes, pair, loose)), "python": sys.executable,
    "folder": os.getcwd(), "pwned": os.environ.get("PWNED"), "extra": os.environ.get("EXTRA")}))"""


def test_values_reach_the_kernel_exactly_and_nothing_is_executed(tmp_path, monkeypatch):
    decoy = tmp_path / "decoy" / "kernels" / "python3"
    decoy.mkdir(parents=True)
    (decoy / "kernel.json").write_text(
        json.dumps({"argv": ["/bin/false"], "display_name": "decoy", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(decoy.parent.parent))
    label = "'''\n\"\\ {x} __import__('os').environ.__setitem__('PWNED', '1') \x00 é \u2028 🌍"
    given_values = {
        "count": np.int64(-5),
        "share": 1e16,
        "label": label,
        "sizes": [],
        "pair": (0, "!touch pwned"),
        "loose": [{label: (None, -0.0)}],
    }
    folder = tmp_path / "a {b} c"
    source = write(folder / "show.ipynb", "## Show", SHOW)
    heard = []
    run = run_notebook(
        source,
        {**given_values, "record": str(folder / "r.json")},
        folder / "out" / "show.ipynb",
        progress=heard.append,
        environment={"EXTRA": "yes"},
    )
    record = read_record(folder / "r.json")
    assert same(ast.literal_eval(record["values"]), (-5, 1e16, label, [], (0, "!touch pwned"), [{label: (None, -0.0)}]))
    assert record["python"] == sys.executable and Path(record["folder"]) == folder and record["extra"] == "yes"
    assert record["pwned"] is None and not list(tmp_path.rglob("pwned"))
    assert run.ok and run.cells == 5 and run.error == "" and run.notebook_digest == sha256_file(source)
    assert run.output_digest == sha256_file(run.output)
    assert [item.done for item in heard] == sorted(item.done for item in heard) and (
        heard[-1].done,
        heard[-1].total,
    ) == (5, 5)
    assert heard[-1].section == "Show"
    text = Path(run.output).read_text()
    assert str(tmp_path) not in text and sys.prefix not in text
    assert [item.name for item in (folder / "out").iterdir()] == ["show.ipynb"]
    assert "__import__" not in html_body(source)


ONE = "a: int = 1  # one"
EPOCHS = """import time
from calling_ai.core.progress import track
for _ in track(range(8), 'epochs'):
    time.sleep(0.1)"""


def test_progress_inside_a_cell_is_heard(tmp_path):
    source = write(tmp_path / "slow.ipynb", "## Fit the network", EPOCHS, parameters=ONE)
    heard = []
    run_notebook(source, {}, tmp_path / "out.ipynb", progress=heard.append)
    inside = [item for item in heard if item.task == "epochs"]
    assert len(inside) >= 2 and all(item.section == "Fit the network" and item.task_total == 8 for item in inside)
    assert [item.task_done for item in inside] == sorted(item.task_done for item in inside)


PLANT = """import os, sys, base64, urllib.parse
for name in sorted(os.environ):
    if name.startswith("PLANTED_"):
        value = os.environ[name]
        print(name, value)
        print(repr(value), urllib.parse.quote(value, safe=""), file=sys.stderr)
        print(base64.b64encode(value.encode()).decode(), file=sys.stderr)
print("postgresql://ada:lovelace-1815@db/calls")
print("api_key=zxcvbnm-123456")
os.environ"""


def test_a_failure_keeps_the_notebook_and_no_secret(tmp_path):
    planted = {
        f"PLANTED_{number}_{kind}": f"s3cr3t '{kind}' {number:03d} ü\""
        for number in range(50)
        for kind in ["PASSWORD", "TOKEN", "KEY"][number % 3 : number % 3 + 1]
    }
    source = write(
        tmp_path / "plant.ipynb",
        "## Print",
        PLANT,
        "## Fail",
        "held = os.environ['PLANTED_0_PASSWORD']\nraise ValueError(f'no\\nentry for {held}')",
        "print('never')",
    )
    with pytest.raises(NotebookError) as caught:
        run_notebook(source, {}, tmp_path / "out.ipynb", environment=planted)
    message, text = str(caught.value), (tmp_path / "out.ipynb").read_text()
    assert message == 'plant.ipynb failed in "Fail": ValueError: no entry for [redacted]'
    assert caught.value.exit_code == 1 and not caught.value.run.ok
    everything = text + json.dumps(json.loads(text), ensure_ascii=False) + message + repr(caught.value.run)
    assert everything.count("PLANTED_49") >= 2  # the prints are there
    for value in [*planted.values(), "lovelace-1815", "zxcvbnm-123456"]:
        for spelling in (
            value,
            json.dumps(value)[1:-1],
            repr(value)[1:-1],
            urllib.parse.quote(value, safe=""),
            base64.b64encode(value.encode()).decode(),
        ):
            assert spelling not in everything
    cells = nbformat.read(tmp_path / "out.ipynb", 4).cells
    assert [cell.metadata.papermill.status for cell in cells][-3:] == ["completed", "failed", "pending"]
    assert not any("papermill-error" in str(cell.metadata) for cell in cells)


def test_a_refusal_inside_keeps_its_exit_code(tmp_path):
    source = write(
        tmp_path / "gate.ipynb",
        "from calling_ai.core.errors import RefusedError\nraise RefusedError('the interval includes zero')",
    )
    with pytest.raises(
        NotebookError, match=r'gate.ipynb failed in "Example": RefusedError: the interval includes zero$'
    ) as caught:
        run_notebook(source, {}, tmp_path / "out.ipynb")
    assert caught.value.exit_code == 3


def test_a_killed_kernel_ends_the_step_with_its_outputs(tmp_path):
    source = write(
        tmp_path / "die.ipynb",
        "## Before",
        "print('reached')",
        "## Die",
        "import os, time\nprint('last words', flush=True)\ntime.sleep(0.5)\nos.kill(os.getpid(), 9)",
        "print('never')",
    )
    start = time.monotonic()
    with pytest.raises(NotebookError, match='failed in "Die": the kernel died'):
        run_notebook(source, {}, tmp_path / "out.ipynb")
    assert time.monotonic() - start < 12
    text = (tmp_path / "out.ipynb").read_text()
    assert '"reached\\n"' in text and '"last words\\n"' in text
    states = [cell.metadata.papermill.status for cell in nbformat.read(tmp_path / "out.ipynb", 4).cells]
    assert states[-2:] == ["failed", "pending"]


STUBBORN = """import os, time, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
from pathlib import Path
print('started', flush=True)
Path('kernel.pid').write_text(str(os.getpid()))
time.sleep(60)"""


def test_a_timeout_ends_even_a_stubborn_kernel(tmp_path):
    source = write(tmp_path / "long.ipynb", "## Wait", STUBBORN)
    start = time.monotonic()
    with pytest.raises(NotebookError, match='failed in "Wait": TimeoutError: not finished after 10 seconds'):
        run_notebook(source, {}, tmp_path / "out.ipynb", timeout=10)  # a slow machine starts the kernel first
    assert time.monotonic() - start < 45
    assert not psutil.pid_exists(int((tmp_path / "kernel.pid").read_text()))
    assert '"started\\n"' in (tmp_path / "out.ipynb").read_text()


PARENT = "import sys\nfrom calling_ai.operate.notebooks import run_notebook\nrun_notebook(sys.argv[1], {}, sys.argv[2])"


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_when_the_parent_is_stopped_nothing_stays_behind(tmp_path, number, code):
    source = write(
        tmp_path / "wait.ipynb", "## Wait", STUBBORN.replace("signal.signal(signal.SIGINT, signal.SIG_IGN)\n", "")
    )
    scratch = tmp_path / "t {x}"  # papermill would fill in the braces
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, source, tmp_path / "out.ipynb"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch)},
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "kernel.pid").exists() or not (tmp_path / "kernel.pid").read_text():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        kernel = psutil.Process(int((tmp_path / "kernel.pid").read_text()))
        papermill = kernel.parent()
        start = time.monotonic()
        process.send_signal(number)
        _, stderr = process.communicate(timeout=20)
        with contextlib.suppress(psutil.NoSuchProcess):
            kernel.wait(10)
        with contextlib.suppress(psutil.NoSuchProcess):
            papermill.wait(10)
        assert time.monotonic() - start < 10
        assert not kernel.is_running() and not papermill.is_running()
        assert process.returncode == code
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if number != signal.SIGKILL:
        text = (tmp_path / "out.ipynb").read_text()
        assert '"started\\n"' in text and "interrupted" in json.loads(text)["metadata"]["calling_ai"]["error"]
        assert not list(scratch.iterdir())
        assert number != signal.SIGINT or "KeyboardInterrupt" in stderr
    else:
        assert not (tmp_path / "out.ipynb").exists() and not list(scratch.iterdir())


def test_what_is_wrong_is_said_before_anything_runs(tmp_path):
    source = write(tmp_path / "plain.ipynb", "1")
    start = time.monotonic()
    with pytest.raises(InputTypeError):
        run_notebook(source, {"count": "3"}, tmp_path / "out.ipynb")
    assert time.monotonic() - start < 1 and not (tmp_path / "out.ipynb").exists()


# --- records and secrets ---------------------------------------------------------------------------------------------


def test_a_missing_or_odd_record_is_named(tmp_path):
    with pytest.raises(NotFoundError, match="without writing it"):
        read_record(tmp_path / "r.json")
    (tmp_path / "r.json").write_text("[1]")
    with pytest.raises(IntegrityError, match="list: it must be a JSON object"):
        read_record(tmp_path / "r.json")


def test_secrets_of_an_environment():
    found = secrets_in(
        {
            "DB_URL": "postgresql://u:p%40ssw0rd@h/d",
            "MAIL_TOKEN": "abcdefgh",
            "SSH_AUTH_SOCK": "/run/agent",
            "A_SECRET": "short",
            "HOME": "/".join(("", "home", "ada")),
        }
    )
    assert "p%40ssw0rd" in found and "p@ssw0rd" in found and "abcdefgh" in found
    assert not any("agent" in item or item == "short" or "ada" in item for item in found)
    assert found == sorted(found, key=lambda item: (-len(item), item))


@hypothesis_settings(max_examples=100, deadline=None)
@given(
    value=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=8, max_size=40),
    around=st.text(max_size=20),
)
def test_a_secret_of_the_environment_never_survives(value, around):
    found = secrets_in({"SERVICE_TOKEN": value})
    if value.startswith("/"):
        return
    for spelling in (value, repr(value), urllib.parse.quote(value, safe=""), base64.b64encode(value.encode()).decode()):
        assert value not in redact(f"{around}{spelling}{around}", found) or value in "[redacted]"
