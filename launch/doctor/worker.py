"""Calls with a time limit, and errors in one line: for what may hang or raise. Needs no torch."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

T = TypeVar("T")


class LateError(Exception):
    """A call did not end in time."""


class Worker:
    """A thread that makes calls one after the other. One that is late is left behind in it."""

    def __init__(self, prepare: Callable[[], object] = lambda: None) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._prepare = prepare
        threading.Thread(target=self._serve, daemon=True).start()

    def call(self, function: Callable[[], T], seconds: float) -> T:
        """What ``function`` returns or raises; LateError after ``seconds``."""
        future: Future[T] = Future()
        self._calls.put((function, future))
        try:
            error = future.exception(seconds)
        except FutureTimeoutError:
            raise LateError(f"did not end within {seconds:g} s") from None
        if error is not None:
            raise error
        return future.result()

    def _serve(self) -> None:
        self._prepare()
        while True:
            function, future = self._calls.get()
            try:
                future.set_result(function())
            except BaseException as error:  # also what would end the thread is the caller's
                future.set_exception(error)
            del function, future  # whatever they hold ends with the call


def in_one_line(error: BaseException) -> str:
    """Class and first line of an exception."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
