"""Tables at every width: no heading and no number is cut, with rich and without."""

from __future__ import annotations

import io
import re
import sys

import pytest

from vocab_parallel_ce.launch import terminal
from vocab_parallel_ce.launch.terminal import Coloured, Table, narrowed, numbers, plain, show, words

HEADINGS = ["forward\nms", "backward\nms", "against ours\nin place", "collectives\nf + b"]


def table() -> Table:
    made = Table(
        "Title [1, 2]", [*words("implementation"), *numbers(*HEADINGS), *words("in words")]
    )
    made.add("Megatron-core unfused: not installed", "1,234.56", "7.8", "12.3x", "1 + 0", "met")
    made.add(Coloured("ours", "bold"), "0.1", "22", "1.0x", "?", Coloured("MISSED by 5%", "red"))
    made.caption = "a caption of several words that goes on and on, so that it is longer than 80"
    return made


def test_what_fits_stays_one_table() -> None:
    assert len(list(narrowed(table(), 200))) == 1


def test_what_does_not_fit_repeats_its_first_column() -> None:
    parts = list(narrowed(table(), 60))
    assert len(parts) > 1
    assert [part.columns[0].heading for part in parts] == ["implementation"] * len(parts)
    headings = [column.heading for part in parts for column in part.columns[1:]]
    assert headings == [*HEADINGS, "in words"]
    assert all([row[0] for row in part.rows] == [row[0] for row in table().rows] for part in parts)


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_nothing_is_cut(
    width: int, rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    if not rich:
        monkeypatch.setattr(terminal, "has_rich", lambda: False)
    show(table())
    said = capsys.readouterr().out
    assert "…" not in said
    assert max(map(len, said.splitlines())) <= width
    for word in " ".join([*HEADINGS, "implementation", "1,234.56", "Megatron-core", "5%"]).split():
        assert word in said
    assert "Title [1, 2]" in said
    assert ("┏" in said) == rich


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_words_that_no_line_holds_are_broken_and_not_cut(
    rich: bool, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sign of a cut hides what was found, and many an encoding does not have it."""
    monkeypatch.setenv("COLUMNS", "40")
    if not rich:
        monkeypatch.setattr(terminal, "has_rich", lambda: False)
    name, value = "VOCAB_PARALLEL_CE_CHECK", "Linux-6.18.44-x86_64-with-glibc2.36"
    made = Table("", words("name", "value", "verdict"), [[name, value, "is ok"]])
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding=encoding) as out:
        monkeypatch.setattr(sys, "stdout", out)
        show(made)
        out.flush()
        said = raw.getvalue().decode(encoding)
    assert "…" not in said
    rows = [re.split(" *[|\u2502] *|  +", line) for line in said.splitlines()]
    cells = [[cell for cell in row if cell] for row in rows]
    assert value in "".join(row[-1] for row in cells if row)
    assert max(map(len, said.splitlines())) <= 43


def test_a_width_that_nobody_tells_is_80(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "__stdout__", None)
    assert terminal.terminal_width() == 80
    monkeypatch.setenv("COLUMNS", "12")
    assert terminal.terminal_width() == terminal.NARROWEST


def test_no_color_is_obeyed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal.show_line(Coloured("warning", "yellow"))
    assert "\x1b[33m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    terminal.show_line(Coloured("warning", "yellow"))
    assert "\x1b[33m" not in capsys.readouterr().out


def test_plain_text_keeps_columns_apart() -> None:
    made = Table("", [*words("name"), *numbers("n")])
    made.add("a", "10")
    assert list(plain(made, 80)) == ["name   n", "----  --", "a     10"]


def test_a_long_line_is_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show_line("word " * 60)
    assert len(capsys.readouterr().out.splitlines()) == 1
