"""A table in Markdown, and a page of which a command writes a part."""

from __future__ import annotations

from collections.abc import Sequence

from vocab_parallel_ce.launch.refusal import Refusal


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; the first cell of a line is what the line is about."""
    rows = [list(header), ["---"] * len(header), *map(list, lines)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def markers(name: str) -> tuple[str, str]:
    """What stands in a page before and after the part of that name."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def filled(page: str, name: str, part: str) -> str:
    """``page`` with ``part`` between the markers of that name."""
    begin, end = markers(name)
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise Refusal(f"a page must hold {begin!r} once, and after it {end!r} once")
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{part}\n\n{end}{rest.split(end)[1]}"
