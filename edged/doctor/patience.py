"""How long the doctor waits for what may hang."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def bounded(work: Callable[[], T], seconds: float) -> T | Exception:
    """The result of ``work``, the exception that it raised, or ``TimeoutError``: it then goes on, and is forgotten."""
    future: Future[T | Exception] = Future()

    def settle() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001  # whatever it is, the other checks must be heard
            future.set_result(error)

    threading.Thread(target=settle, name="doctor", daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError as error:
        return error
