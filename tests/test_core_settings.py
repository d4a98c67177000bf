"""Settings: every key from every source, and nothing ignored in silence."""

import configparser
import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calling_ai.core.errors import SettingsError, StorageError
from calling_ai.core.settings import Settings, settings

SECTIONS = {item.name: item.default for item in dataclasses.fields(Settings) if item.name != "root"}
KEYS = [(section, item) for section, default in SECTIONS.items() for item in dataclasses.fields(default)]
RANGED = [(section, item) for section, item in KEYS if "low" in item.metadata]


def name_of(pair: tuple[str, dataclasses.Field]) -> str:
    """Return the name of a key, for the list of tests."""
    return f"{pair[0]}.{pair[1].name}"


def write(folder: Path, text: str) -> Path:
    """Write settings.ini and return its folder."""
    (folder / "settings.ini").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def empty(workspace: Path) -> Path:
    """Return a workspace without settings."""
    (workspace / "settings.ini").unlink()
    return workspace


def test_the_file_of_the_repository_holds_every_key_with_its_default(workspace: Path) -> None:
    parser = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=("#", ";"))
    parser.read(workspace / "settings.ini", encoding="utf-8")
    written = {(section, key) for section in parser.sections() for key in parser[section]}
    assert written == {(section, item.name) for section, item in KEYS}
    found = settings(workspace)
    assert {name: getattr(found, name) for name in SECTIONS} == SECTIONS


def test_every_setting_says_what_it_is() -> None:
    for section, item in KEYS:
        assert item.metadata["meaning"], f"[{section}] {item.name}"
        if "low" in item.metadata:
            assert item.metadata["low"] <= item.default <= item.metadata["high"]


def test_no_file_gives_the_defaults(empty: Path) -> None:
    found = settings()
    assert found == Settings(empty) and found.root == empty
    assert found.var == empty / "var" and found.reports == empty / "reports"
    assert found.database_url == f"sqlite:///{empty / 'var' / 'calling_ai.db'}"


@pytest.mark.parametrize("pair", KEYS, ids=name_of)
@pytest.mark.parametrize("source", ["file", "environment"])
def test_every_key_can_be_set(
    pair: tuple[str, dataclasses.Field], source: str, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, item = pair
    value = item.metadata.get("low", "some text")
    if source == "file":
        write(empty, f"[{section}]\n{item.name} = {value}   # why\n")
    else:
        write(empty, f"[{section}]\n{item.name} = {item.default}\n")
        monkeypatch.setenv(f"CALLING_AI_{section.upper()}__{item.name.upper()}", f" {value} ")
    found = getattr(getattr(settings(), section), item.name)
    assert found == value and type(found) is type(item.default)
    others = {other.name: other.default for name, other in KEYS if name == section and other is not item}
    assert all(getattr(getattr(settings(), section), name) == default for name, default in others.items())


@pytest.mark.parametrize("pair", RANGED, ids=name_of)
def test_both_ends_of_a_range_are_allowed_and_no_more(
    pair: tuple[str, dataclasses.Field], empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, item = pair
    name = f"CALLING_AI_{section.upper()}__{item.name.upper()}"
    step = 1 if isinstance(item.default, int) else 1e-6
    low, high = item.metadata["low"], item.metadata["high"]
    write(empty, "[evaluation]\ntest_share = 0.05\nvalidation_share = 0.05\n")  # together they must leave some people
    for text in (f"{low}", f"{high}"):
        monkeypatch.setenv(name, text)
        settings()
    for bad in (f"{low - step}", f"{high + step}", "nan", "inf", "-inf", "much", ""):
        monkeypatch.setenv(name, bad)
        with pytest.raises(SettingsError, match=rf"setting \[{section}\] {item.name} is .*{name}.*it must"):
            settings()


@given(st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=20))
def test_no_text_of_the_environment_escapes_the_rule(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALLING_AI_POLICY__WEIGHT", text)
        try:
            weight = settings(Path(__file__).parent).policy.weight
        except SettingsError as error:
            assert "[policy] weight" in str(error)
        else:
            assert 0 <= weight <= 0.5 and weight == float(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[policy]\nwieght = 0.1\n", r"setting \[policy\] wieght is unknown \(settings.ini\); did you mean weight"),
        ("[polisy]\nweight = 0.1\n", r"section \[polisy\] of settings.ini is unknown; did you mean policy"),
        ("[polisy]\n", r"section \[polisy\] of settings.ini is unknown"),
        ("[DEFAULT]\nweight = 0.1\n", "DEFAULT"),
        ("weight = 0.1\n", "settings.ini cannot be read"),
        ("[policy]\nweight = 0.1\nweight = 0.2\n", "settings.ini cannot be read"),
        ("[policy]\nweight\n", "settings.ini cannot be read"),
        ("[town]\npeople = 100.5\n", r"\[town\] people is '100.5' \(settings.ini\): it must be a whole number"),
        ("[policy]\nweight = 0.6\n", r"\[policy\] weight is 0.6 \(settings.ini\): it must lie in \[0, 0.5\]"),
    ],
)
def test_mistakes_in_the_file_are_named(text: str, message: str, empty: Path) -> None:
    write(empty, text)
    with pytest.raises(SettingsError, match=message):
        settings()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "CALLING_AI_POLICY__WIEGHT",
            r"\[policy\] wieght is unknown \(CALLING_AI_POLICY__WIEGHT\); did you mean weight",
        ),
        ("CALLING_AI_POLISY__WEIGHT", r"section polisy is unknown \(CALLING_AI_POLISY__WEIGHT\); did you mean policy"),
        ("CALLING_AI_POLICY__", r"\[policy\]  is unknown"),
    ],
)
def test_mistakes_in_the_environment_are_named(
    name: str, message: str, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "0.1")
    with pytest.raises(SettingsError, match=message):
        settings()


def test_other_variables_of_the_environment_are_left_alone(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALLING_AI_PROGRESS", "x")
    monkeypatch.setenv("CALLING_AIR_POLICY__WEIGHT", "7")
    assert settings() == Settings(empty)


def test_a_file_that_is_not_text_or_not_readable(empty: Path) -> None:
    (empty / "settings.ini").write_bytes(b"[policy]\nweight = \xff\n")
    with pytest.raises(SettingsError, match="settings.ini cannot be read"):
        settings()


def test_a_file_that_the_disk_refuses(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(empty, "[policy]\n")

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(StorageError, match="reading settings.ini failed: permission denied"):
        settings()


def test_the_workspace_is_found_upwards(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CALLING_AI_WORKSPACE")
    deep = empty / "one" / "two"
    deep.mkdir(parents=True)
    write(empty, "[policy]\nweight = 0.25\n")
    monkeypatch.chdir(deep)
    assert (settings().root, settings().policy.weight) == (empty, 0.25)
    write(deep.parent, "[policy]\nweight = 0.125\n")
    assert (settings().root, settings().policy.weight) == (deep.parent, 0.125)
    monkeypatch.setenv("CALLING_AI_WORKSPACE", str(empty))
    assert settings().root == empty
    assert settings(deep).root == deep


def test_a_workspace_that_does_not_exist_is_an_error(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALLING_AI_WORKSPACE", str(empty / "nowhere"))
    with pytest.raises(SettingsError, match="CALLING_AI_WORKSPACE is .*nowhere.*must be an existing folder"):
        settings()
    with pytest.raises(SettingsError, match="must be an existing folder"):
        settings(empty / "nowhere")


def test_a_url_and_absolute_folders_are_kept(empty: Path, tmp_path: Path) -> None:
    write(
        empty, f"[store]\nurl = postgresql+psycopg://me:a%40#b@host/db  # comment\nfolder = {tmp_path / 'elsewhere'}\n"
    )
    found = settings()
    assert found.database_url == "postgresql+psycopg://me:a%40#b@host/db"
    assert found.var == tmp_path / "elsewhere"


def test_held_out_people_leave_some_for_training(empty: Path) -> None:
    write(empty, "[evaluation]\ntest_share = 0.9\nvalidation_share = 0.2\n")
    with pytest.raises(SettingsError, match="share"):
        settings()
