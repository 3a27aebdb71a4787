"""What every process that qdq starts does first: it ends with the one that started it, and leaves Ctrl-C to that."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

LOOK_S = 0.5


@contextmanager
def without_ctrl_c() -> Iterator[None]:
    """Inside, Ctrl-C waits; what is started here never gets it, so not before it has called `as_child` either."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def as_child(parent: int) -> None:
    """Ignore Ctrl-C, which a terminal sends to all; end where the parent is gone, even if it was killed.

    `parent` is the process that started this one: it may have been killed before this is called.

    A look at the parent twice a second, for a pipe ends only between two jobs, and the signal that Linux sends follows
    the thread that started the process, not the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.getppid() != parent:
        os._exit(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch the parent").start()
