"""Tables on the terminal, as wide as it is.

A table that does not fit is cut into narrower ones that repeat its first column; no heading is ever
shortened. COLUMNS and NO_COLOR are obeyed; where nothing tells a width, as in a pipe, it is 80.
Drawn by rich, or, without it, in plain text: the doctor runs where rich is not installed.
"""

from __future__ import annotations

import importlib.util
import shutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

NARROWEST = 40
FIRST, WORDS = 24, 18
"""Characters that the first, and any other, column of words may be narrowed to: it is wrapped"""
BETWEEN = 3
"""characters that a column costs beside its content"""


def ranks_in_words(ranks: int) -> str:
    return "1 process" if ranks == 1 else f"{ranks} ranks"


class Coloured(str):
    """A cell, or a line, with a colour that rich knows."""

    colour: str

    def __new__(cls, text: str, colour: str) -> Coloured:
        made = super().__new__(cls, text)
        made.colour = colour
        return made


@dataclass(frozen=True)
class Column:
    heading: str
    """may hold line breaks"""
    words: bool = False
    """It holds words, which stand at the left and may be wrapped; else numbers, at the right."""


@dataclass
class Table:
    """What is shown. Every row has one cell for each column."""

    title: str
    columns: Sequence[Column]
    rows: list[Sequence[str]] = field(default_factory=list)
    caption: str = ""

    def add(self, *cells: str) -> None:
        self.rows.append(cells)


def words(*headings: str) -> list[Column]:
    return [Column(heading, words=True) for heading in headings]


def numbers(*headings: str) -> list[Column]:
    return [Column(heading) for heading in headings]


def terminal_width() -> int:
    return max(NARROWEST, shutil.get_terminal_size((80, 24)).columns)


def has_rich() -> bool:
    return importlib.util.find_spec("rich") is not None


# --- what fits --------------------------------------------------------------------------------


def _cells(table: Table, index: int) -> list[str]:
    return [table.columns[index].heading, *(row[index] for row in table.rows)]


def _natural(table: Table, index: int) -> int:
    """Characters that a column takes if nothing is wrapped."""
    return max(len(line) for cell in _cells(table, index) for line in cell.split("\n"))


def _usual(table: Table, index: int) -> int:
    """Characters that a column of words may be narrowed to; numbers are not wrapped."""
    natural = _natural(table, index)
    return min(natural, WORDS if index else FIRST) if table.columns[index].words else natural


def _least(table: Table, index: int) -> int:
    """Characters that a column must have: no word is cut."""
    return max(_usual(table, index), _longest_word(table, index))


def _longest_word(table: Table, index: int) -> int:
    """Of a column; numbers are not wrapped, so theirs is a whole line."""
    if not table.columns[index].words:
        return _natural(table, index)
    return max(len(word) for cell in _cells(table, index) for word in cell.split() or [""])


def narrowed(table: Table, width: int) -> Iterator[Table]:
    """The table, or several that fit: each has the first column and as many others as go beside."""
    first, rest = _least(table, 0) + BETWEEN + 1, range(1, len(table.columns))
    groups: list[list[int]] = [[]]
    used = first
    for index in rest:
        wanted = _least(table, index) + BETWEEN
        if groups[-1] and used + wanted > width:
            groups.append([])
            used = first
        groups[-1].append(index)
        used += wanted
    for group in groups:
        kept = [0, *group]
        columns = [table.columns[index] for index in kept]
        yield Table("", columns, [[row[index] for index in kept] for row in table.rows])


def _fitted(table: Table, room: int) -> list[int]:
    """Characters of each column, together ``room``: words are broken only where they must be."""
    widths = [_natural(table, index) for index in range(len(table.columns))]
    for least in (_least, _usual, _longest_word):
        while sum(widths) > room:
            wrapped = [index for index, each in enumerate(widths) if each > least(table, index)]
            if not wrapped:
                break
            widths[max(wrapped, key=lambda index: widths[index])] -= 1
    return widths


# --- drawing ----------------------------------------------------------------------------------


def show(table: Table) -> None:
    """Prints it on standard output: title, what fits beside each other, caption."""
    width = terminal_width()
    _show_wrapped(table.title, "bold", width)
    for part in narrowed(table, width):
        if has_rich():
            _rich_console(width).print(_of_rich(part, width))
        else:
            print("\n".join(plain(part, width)))
    _show_wrapped(table.caption, "dim", width)


def _show_wrapped(text: str, colour: str, width: int) -> None:
    for line in text.split("\n") if text else []:
        for part in textwrap.wrap(line, width):
            show_line(Coloured(part, colour))


def show_line(text: str) -> None:
    """Prints a line in its colour, if it has one; it is not wrapped, so that it can be searched."""
    if has_rich():
        _rich_console(terminal_width()).print(_rich_text(text), soft_wrap=True)
    else:
        print(text)


def _rich_console(width: int) -> Any:
    from rich.console import Console

    return Console(width=width, highlight=False)


def _rich_text(text: str) -> Any:
    from rich.text import Text

    return Text(text, style=getattr(text, "colour", ""))


def _of_rich(table: Table, width: int) -> Any:
    from rich.table import Table as RichTable

    drawn = RichTable()
    room = width - BETWEEN * len(table.columns) - 1
    for column, each in zip(table.columns, _fitted(table, room), strict=True):
        justify: Any = "left" if column.words else "right"
        # "fold": what cannot fit is broken, not cut; the sign of a cut is beyond some encodings.
        drawn.add_column(_rich_text(column.heading), justify=justify, width=each, overflow="fold")
    for row in table.rows:
        drawn.add_row(*(_rich_text(cell) for cell in row))
    return drawn


def plain(table: Table, width: int) -> Iterator[str]:
    """Lines of text, for where rich is not installed."""
    widths = _fitted(table, width - 2 * (len(table.columns) - 1))
    headings = [column.heading for column in table.columns]
    yield from _plain_row(table, headings, widths)
    yield "  ".join("-" * each for each in widths)
    for row in table.rows:
        yield from _plain_row(table, row, widths)


def _plain_row(table: Table, row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    wrapped = [
        [part for line in cell.split("\n") for part in textwrap.wrap(line, width) or [""]]
        for cell, width in zip(row, widths, strict=True)
    ]
    for number in range(max(map(len, wrapped))):
        parts = [lines[number] if number < len(lines) else "" for lines in wrapped]
        yield "  ".join(
            part.ljust(width) if column.words else part.rjust(width)
            for part, width, column in zip(parts, widths, table.columns, strict=True)
        ).rstrip()


# --- how far it is ----------------------------------------------------------------------------


@contextmanager
def progress(total: int, name: str, show_it: bool) -> Iterator[Callable[[str, int], None]]:
    """A bar on standard error; yields ``tell(text, steps)``: what is done, how many are behind.

    Nothing is shown without rich. Drawn only when told something: a drawing thread would run inside
    the timed parts.
    """
    if not has_rich() or not show_it:
        yield lambda text, done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn(f"[bold]{name}[/]"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, auto_refresh=False) as bar:
        task = bar.add_task("starting", total=total)

        def tell(text: str, done: int) -> None:
            bar.update(task, description=text, advance=done, refresh=console.is_terminal)

        yield tell
        bar.update(task, description="done", completed=total, refresh=True)
