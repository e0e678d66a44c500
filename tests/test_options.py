"""The environment variables: one parser for the switches, and one table of all of them in docs/environment.md."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from trlpatch.errors import InvalidOption
from trlpatch.options import (
    CACHE_DIR,
    DIRECTORIES,
    DISABLE,
    DUMP,
    LAUNCHERS,
    SECONDS,
    SWITCHES,
    read_directory,
    read_launcher,
    read_seconds,
    read_switch,
)

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("1 true t yes y on TRUE On Y", True),
        ("0 false f no n off FALSE Off N", False),
    ],
)
def test_every_switch_takes_the_words_of_clicks_bool(
    monkeypatch: pytest.MonkeyPatch, name: str, words: str, expected: bool
) -> None:
    import click

    for word in words.split():
        for value in (word, f" {word}\t"):
            monkeypatch.setenv(name, value)
            assert read_switch(name) is expected is click.BOOL.convert(value, None, None), value


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_switch_that_is_not_set_says_nothing(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv(DISABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(DISABLE, value)
    assert read_switch(DISABLE) is None


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", ["maybe", "2", "-1", "none"])
def test_another_word_is_an_error_that_names_variable_value_and_choice(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidOption, match=rf"^{name}='{value}': expected 1 or 0 .*y/n, on/off") as raised:
        read_switch(name)
    assert SWITCHES[name] in str(raised.value)


def test_a_directory_is_a_path_from_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv(DUMP, "~/patched")
    assert read_directory(DUMP) == Path("/home/me/patched")
    monkeypatch.setenv(DUMP, "")
    assert read_directory(DUMP) is None


@pytest.mark.parametrize("name", SECONDS)
def test_seconds_are_positive_numbers_and_inf(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for value, expected in {"1.5": 1.5, " 600 ": 600.0, "inf": math.inf, "": None, "  ": None}.items():
        monkeypatch.setenv(name, value)
        assert read_seconds(name) == expected, value
    for value in ("0", "-1", "nan", "ten", "10s"):
        monkeypatch.setenv(name, value)
        with pytest.raises(InvalidOption, match=rf"^{name}='{value}': expected a positive number") as raised:
            read_seconds(name)
        assert SECONDS[name] in str(raised.value)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_what_a_launcher_sets_is_a_whole_number(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for value, expected in {"2": 2, " 0 ": 0, "": 7, "  ": 7}.items():
        monkeypatch.setenv(name, value)
        assert read_launcher(name, 7) == expected, value
    for value in ("two", "-1", "1.0", "$(nproc)", "\u00b2"):
        with pytest.raises(
            InvalidOption, match=rf"^{name}={re.escape(repr(value))}: expected a whole number"
        ) as raised:
            read_launcher(name, 7, {name: value})
        assert LAUNCHERS[name] in str(raised.value)
    monkeypatch.delenv(name)
    assert read_launcher(name, 7) == 7


def test_no_module_reads_a_variable_by_itself() -> None:
    for file in (ROOT / "trlpatch").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert file.name == "options.py" or not re.search(r"environ\S*[\[(]\W*(TRLPATCH_|UNSLOTH_)", text), file
        assert file.name == "options.py" or not re.search(
            rf"int\(\S*environ\S*[\[(]\W*({'|'.join(LAUNCHERS)})", text
        ), file


def test_a_page_has_every_variable_in_one_table() -> None:
    page = (ROOT / "docs/environment.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert rows == [*SWITCHES, *DIRECTORIES, *SECONDS]
    assert CACHE_DIR in rows
