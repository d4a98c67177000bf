"""Fifty planted secrets, and nowhere that is kept holds one of them (B24)."""

import json
import random
import string
from pathlib import Path

import pytest

from calling_ai.core.settings import settings
from calling_ai.operate.alerts import tell
from calling_ai.operate.notebooks import NotebookError, run_notebook
from calling_ai.operate.reports import RunRecord, render, write_run
from calling_ai.store.database import engine
from calling_ai.store.runs import claim

SHAPES = {
    "environment": lambda word: ("PLANTED_{number}_TOKEN", word),
    "address": lambda word: ("PLANTED_{number}_URL", f"postgresql://user:{word}@host.example/db"),
    "key": lambda word: ("PLANTED_{number}_API_KEY", word),
    "password": lambda word: ("PLANTED_{number}_PASSWORD", word),
}


def planted() -> tuple[dict[str, str], list[str]]:
    """Return variables of the environment, and the secrets in them and beside them."""
    draw = random.Random(5)
    variables, secrets = {}, []
    for number in range(40):
        word = "".join(draw.choices(string.ascii_letters + string.digits, k=draw.randint(12, 40)))
        name, value = list(SHAPES.values())[number % len(SHAPES)](word)
        variables[name.format(number=number)] = value
        secrets.append(word)
    return variables, secrets


SHAPED = [  # known by their shape, wherever they come from
    "ghp_" + "A1b2C3d4" * 5,
    "AKIA" + "ABCDEFGH12345678",
    "glpat-" + "x9Y8z7W6" * 3,
    "hf_" + "Q1w2E3r4" * 4,
    "xoxb-" + "123456789012-abcdefABCDEF",
    "sk-" + "a1B2c3D4" * 4,
    "npm_" + "Z9y8X7w6" * 4,
    "pypi-" + "M5n6B7v8" * 4,
    "AIza" + "SyA1b2C3d4E5f6G7h8I9j0K1l2M3n4O5",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhZGEifQ.c2lnbmF0dXJl",
]


def test_fifty_planted_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables, secrets = planted()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    secrets += SHAPED
    assert len(secrets) == 50
    (tmp_path / "settings.ini").write_text("")
    workspace = settings(tmp_path)
    cell = {"cell_type": "code", "execution_count": None, "outputs": [], "metadata": {}}
    sources = [
        "import os, sys, html\nfor name in sorted(os.environ): print(name, os.environ[name])",
        f"for word in {[item[::-1] for item in SHAPED]!r}: print('found', word[::-1])",
        "print({name: value for name, value in os.environ.items() if 'PLANTED' in name}, file=sys.stderr)",
        "word = os.environ['PLANTED_0_TOKEN']\nraise RuntimeError(f'{word} at ' + os.environ['PLANTED_1_URL'])",
    ]
    cells = [
        {**cell, "metadata": {"tags": ["parameters"]}, "source": "record: str = ''  # where the record goes", "id": "p"}
    ]
    cells += [
        {**cell, "source": source, "id": f"c{number}", "metadata": {"tags": ["raises-exception"]} if number < 3 else {}}
        for number, source in enumerate(sources)
    ]
    notebook = tmp_path / "leaky.ipynb"
    notebook.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    executed = workspace.var / "runs" / "one" / "leaky.ipynb"
    said = ""
    with pytest.raises(NotebookError) as caught, claim(engine(workspace.database_url), "retrain", "2026-03-02"):
        run_notebook(notebook, {}, executed)
    said = str(caught.value)
    render(executed, workspace.reports / "one" / "leaky.html", "Leaky")
    now = "2026-03-02T03:00:00+00:00"
    write_run(RunRecord("one", now, now, "failed", "retrain", error=said), workspace.reports)
    tell(workspace, "retrain", "warning", "A retraining failed", f"{said} {variables['PLANTED_1_URL']}")
    notebook.unlink()
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in kept} >= {".ipynb", ".html", ".db", ".jsonl", ".json"}
    left = [(secret[:4], path.name) for path in kept for secret in secrets if secret.encode() in path.read_bytes()]
    assert left == [] and not [secret for secret in secrets if secret in said]
    assert b"[redacted]" in executed.read_bytes()
    print(f"50 planted secrets, {len(kept)} files of notebooks, reports, alerts and database: {len(left)} left")
