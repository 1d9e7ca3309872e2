"""Who is run when, and what is made of what they report."""

from __future__ import annotations

from vocab_parallel_ce.launch.measuring import rounds


def test_the_start_moves_on() -> None:
    assert list(rounds.turns("abc", 2)) == [
        (0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (1, "a"),
    ]  # fmt: skip
    assert list(rounds.turns([], 2)) == []


def test_warm_up_is_not_kept() -> None:
    order: list[str] = []

    def run(name: str) -> int:
        order.append(name)
        return len(order)

    found = rounds.in_turns({"a": lambda: run("a"), "b": lambda: run("b")}, rounds=2)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert found == {"a": [4, 5], "b": [3, 6]}


def test_every_run_follows_its_beginning() -> None:
    order: list[str] = []
    seconds = iter([9.0, 8.0, 1.0, 2.0])

    def run() -> float:
        order.append("run")
        return next(seconds)

    assert rounds.repeated(run, lambda: order.append("before"), 2, warm_up=2) == [1.0, 2.0]
    assert order == ["before", "run"] * 4


def test_numbers_by_hand() -> None:
    assert rounds.slowest([[1.0, 5.0], [2.0, 4.0]]) == [2.0, 5.0]
    assert rounds.median_known([None, 3, 1, 8]) == 3
    assert rounds.median_known([None]) is None
    assert [rounds.lower_quartile([*range(9, 9 - n, -1)]) for n in (1, 3, 5, 9)] == [9, 7, 6, 3]
    assert rounds.summary([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "all": [3.0, 1.0, 2.0]}
