"""The order in which things are run to be compared, and what is made of many numbers.

Idea: a number is only comparable to its neighbours when both were taken under the same conditions.
So contenders take turns, a slow minute falls on all of them, and a median is taken at the end. What
several ranks do together takes as long as the slowest of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

Name = TypeVar("Name")
Found = TypeVar("Found")


def turns(names: Sequence[Name], rounds: int) -> Iterator[tuple[int, Name]]:
    """Each name once a round; the start moves on, so that nobody always follows the same one."""
    for number in range(rounds):
        for place in range(len(names)):
            yield number, names[(number + place) % len(names)]


def in_turns(
    runs: Mapping[str, Callable[[], Found]], rounds: int, warm_up: int = 1
) -> dict[str, list[Found]]:
    """What each returned, run by run; the first ``warm_up`` rounds are not kept."""
    found: dict[str, list[Found]] = {name: [] for name in runs}
    for number, name in turns(list(runs), warm_up + rounds):
        result = runs[name]()
        if number >= warm_up:
            found[name].append(result)
    return found


def repeated(
    run: Callable[[], float], before: Callable[[], object], rounds: int, warm_up: int = 1
) -> list[float]:
    """The seconds that ``run`` reports, several times, each after ``before``."""
    found = []
    for _ in range(warm_up + rounds):
        before()
        found.append(run())
    return found[warm_up:]


def slowest(ranks: Sequence[Sequence[float]]) -> list[float]:
    """Of each run [rank][run] the slowest rank's."""
    return [max(run) for run in zip(*ranks, strict=True)]


def median_known(values: Sequence[int | None]) -> int | None:
    """Of those that are not None; None where all are."""
    known = [value for value in values if value is not None]
    return int(statistics.median(known)) if known else None


def lower_quartile(values: Sequence[float]) -> float:
    """A quarter of the values is smaller: neither the disturbed ones nor a lucky one count."""
    return sorted(values)[len(values) // 4]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """What a report keeps of many runs."""
    return {"median": statistics.median(values), "min": min(values), "all": list(values)}
