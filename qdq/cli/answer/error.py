"""An error as JSON on standard output, for who asked for JSON.

kind, exit code, message -> one object with the schema `qdq.error/1` -> printed where nothing else was.
Must stay as light as `entry`, which prints it after a signal at any moment.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress

SCHEMA = "qdq.error/1"
KINDS = ("usage", "input", "runtime", "fault", "interrupted", "terminated")
EXIT_CODES = {
    0: "done, and every limit kept",
    1: "done, all results written, and a limit failed",
    2: "bad input: one paragraph says what, where and how to fix it; nothing is left behind",
    3: "a needed runtime or GPU is missing; the message says what to install",
    70: "a fault of qdq; the message names a log file for a report, which holds none of your data",
    130: "Ctrl-C; nothing is left behind but a calibration that the same command goes on with",
    141: "nobody reads the output any more",
    143: "SIGTERM; as Ctrl-C",
}
VARIABLES = {
    "QDQ_CACHE": "folder of earlier work, where --cache is not given",
    "QDQ_CACHE_SIZE": "how large that folder may grow, as 20G; default 10 GiB; what was of use longest ago goes first",
    "_QDQ_COMPLETE": "set by the shell's script of `qdq completion`",
}
_BY_CODE = {2: "input", 3: "runtime", 70: "fault", 130: "interrupted", 143: "terminated"}
_OPTION = "--json"
_answered: list[bool] = []


def asked_for(arguments: Sequence[str]) -> bool:
    """Whether a command line wants JSON, also one that cannot be parsed.

    >>> asked_for(["deploy", "--json"]), asked_for(["deploy", "--", "--json"])
    (True, False)
    """
    words = list(arguments)
    return _OPTION in (words[: words.index("--")] if "--" in words else words)


def answered() -> None:
    """Remember that a verb has printed its JSON: a second object would spoil it."""
    _answered.append(True)


def forget() -> None:
    """Begin a command: nothing is printed yet."""
    _answered.clear()


def error_json(exit_code: int, message: str, *, kind: str = "", cause: str = "", log: str | None = None) -> str:
    """The object as text.

    Args:
        exit_code: of the process.
        message: the paragraph that standard error gets too.
        kind: of `KINDS`; "" is what the exit code says.
        cause: class of the exception, "" where there is none.
        log: file with the traceback of a fault.
    """
    error = {
        "kind": kind or _BY_CODE.get(exit_code, "input"),
        "exit_code": exit_code,
        "message": " ".join(message.split()),
        "cause": cause,
        "log": log,
    }
    return json.dumps({"schema": SCHEMA, "error": error}, indent=1, ensure_ascii=False) + "\n"


def tell(arguments: Sequence[str], text: str) -> None:
    """Print an error where JSON was asked for and none was printed yet; nobody may read it any more."""
    if asked_for(arguments) and not _answered:
        with suppress(OSError, ValueError):  # ValueError: closed
            sys.stdout.write(text)
            sys.stdout.flush()
