"""Where the command starts: what ends it, and with which exit code.

    0   done and passed             70  a fault of ours, with a log file for a report
    1   a limit failed             130  Ctrl-C
    2   bad input                  141  nobody reads the output any more
    3   a runtime is missing       143  SIGTERM

With --json an error is also a JSON object on standard output (`answer.error`), which holds nothing else.
Everything else is imported inside `main`, so that Ctrl-C during the imports ends with its one line too.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

FAULT = 70  # EX_SOFTWARE of sysexits.h
CLOSED = 128 + 13  # as after SIGPIPE
AGAIN_S = 0.02  # after which a signal that cannot be obeyed yet is looked at again
LOST_S = 1.0  # after which one that was obeyed without effect is obeyed again
LATE_S = 20.0  # after which a process that still runs is ended: in another language, which does not see signals
_ENDINGS = {signal.SIGINT: "Interrupted", signal.SIGTERM: "Terminated"}


class Stopped(BaseException):
    """Ctrl-C or SIGTERM, raised wherever the main thread is. No KeyboardInterrupt: click says `Aborted!` to that."""


class _Signals:
    """What arrived; the first of them raises `Stopped`, a second one ends the process at once.

    What is raised in a destructor, or in a callback of another language, is dropped there and ends nothing: it is
    raised again while nothing that is being handled comes of it.
    """

    def __init__(self) -> None:
        self.number = 0
        self._ends = False

    def end_late(self) -> None:
        """Ends the process `LATE_S` after a signal, whatever it is in; what it leaves goes with the next run."""
        if os.name != "posix":
            return
        source, arrived = os.pipe()
        os.set_blocking(arrived, False)
        signal.set_wakeup_fd(arrived, warn_on_full_buffer=False)

        def wait() -> None:
            while (number := os.read(source, 1)[0]) not in _ENDINGS:
                pass
            time.sleep(LATE_S)
            _say_ended_by(number)
            os._exit(128 + number)

        threading.Thread(target=wait, daemon=True, name="end late").start()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            os._exit(128 + number)
        if _imports_native(frame) and hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, lambda _, where: self(number, where))
            signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
            return
        self.number = number
        self._watch()
        raise Stopped

    def end(self) -> None:
        """From now on nothing is raised again."""
        self._ends = True
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _watch(self) -> None:
        if hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, self._lost)
            signal.setitimer(signal.ITIMER_REAL, LOST_S)

    def _lost(self, number: int, frame: FrameType | None) -> None:
        if self._ends:
            return
        self._watch()
        error = sys.exc_info()[1]
        while error is not None and not isinstance(error, Stopped):
            error = error.__cause__ or error.__context__
        if error is None:
            raise Stopped


def _imports_native(frame: FrameType | None) -> bool:
    """Whether a compiled module is being set up: what is raised meanwhile may end the process, not the import."""
    while frame is not None:
        code, loader = frame.f_code, frame.f_locals.get("self")
        if code.co_name in ("create_module", "exec_module") and type(loader).__name__ == "ExtensionFileLoader":
            return True
        frame = frame.f_back
    return False


def main() -> None:
    """Run the command line of this process, and exit."""
    stopped, code = _Signals(), FAULT
    try:
        try:
            for number in _ENDINGS:
                signal.signal(number, stopped)
            stopped.end_late()
            _open_streams()
            code = _run()
        except BaseException as error:
            stopped.end()
            if not stopped.number:  # else whatever it became on its way: numpy and others catch what is raised in them
                code = _ending(error)
        for number in _ENDINGS:  # the result stands: Python's own end, which takes a while, is not interrupted
            signal.signal(number, signal.SIG_IGN)
    except Stopped:
        pass
    stopped.end()
    if stopped.number:
        code = 128 + stopped.number
        _say_ended_by(stopped.number)
    sys.exit(code)


def _say_ended_by(number: int) -> None:
    from qdq.cli.answer.error import error_json, tell

    text = f"{_ENDINGS[signal.Signals(number)]}; no file is left half written."
    _say(text)
    tell(sys.argv[1:], error_json(128 + number, text))


def _open_streams() -> None:
    """Give a process that was started without standard output or error, as by `>&-`, one that goes nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # until Python ends


def _say(text: str) -> None:
    """A line on standard error, if that can still be written: its disk may be full, its reader gone."""
    from contextlib import suppress

    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _run() -> int:
    """The exit code of the verb."""
    from qdq.cli.answer.error import forget
    from qdq.cli.main import main as verbs

    forget()
    code = int(verbs.main(standalone_mode=False) or 0)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _closed()
    return code


def _ending(error: BaseException) -> int:
    """The exit code of what was raised, said in one paragraph."""
    import click

    from qdq.cli.answer.error import error_json, tell
    from qdq.cli.terminal import ClosedError

    if isinstance(error, ClosedError):
        return _closed()
    if isinstance(error, click.ClickException):
        from contextlib import suppress

        with suppress(OSError):  # as in `_say`
            error.show()
        usage = isinstance(error, click.UsageError)
        cause = error if error.__cause__ is None else error.__cause__
        said = error_json(
            error.exit_code, error.format_message(), kind="usage" if usage else "", cause=type(cause).__name__
        )
        tell(sys.argv[1:], said)
        return error.exit_code
    if isinstance(error, SystemExit) and isinstance(error.code, int):  # of a verb
        return error.code
    from qdq.cli.answer.fault import report

    told, log = report(error, sys.argv)
    _say(told)
    tell(sys.argv[1:], error_json(FAULT, told.removeprefix("Error: "), cause=type(error).__name__, log=log))
    return FAULT


def _closed() -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still in the buffer would fail again
    return CLOSED


if __name__ == "__main__":
    main()
