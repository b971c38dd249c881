"""Calls that SIGTERM or Ctrl-C ends: in order, with a status that is none of success, and a sentence that helps."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

logger = logging.getLogger(__name__)


class _Calls:
    depth = 0  # of one in another
    was_told = False  # in the outermost


def tell(sentence: str, *, unless_inside: bool = False) -> None:
    """Say once, of a call that is ended, what there is and what to do, or leave it to the call that it is a part of."""
    if unless_inside and _Calls.depth:
        return
    if not _Calls.was_told:
        logger.warning(sentence)
    _Calls.was_told = _Calls.depth > 0


@contextmanager
def told_when_interrupted(sentence: str) -> Iterator[None]:
    """Let SIGTERM end a call like Ctrl-C does, so that files are put away, and say what to do, unless it was said.

    Only the main thread of a program can, and nobody else's handler is replaced.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    is_mine = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if is_mine:
        signal.signal(signal.SIGTERM, _end)
    _Calls.depth += 1
    if _Calls.depth == 1:
        _Calls.was_told = False
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        tell(sentence)
        raise
    finally:
        _Calls.depth -= 1
        if is_mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)
