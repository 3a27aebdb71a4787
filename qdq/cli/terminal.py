"""How the command line talks: progress bars, tables, errors of one paragraph, and "did you mean".

verb -> values -> `show_rows` on standard output; progress, notes and errors on standard error.
Must not know a verb, and must stay light: `qdq --help` imports it.
"""

from __future__ import annotations

import difflib
import re
import sys
import time
import traceback
from collections.abc import Iterable
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import click

from qdq.cli.answer.error import answered

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

EVERY_S = 10.0  # between two lines about a run without a terminal
WIDTH_WITHOUT_TERMINAL = 160  # columns of a table in a file or a pipe


class Refusal(click.ClickException):
    """An error of ours, printed as one paragraph; its exit code is that of the command."""

    def __init__(self, message: str, exit_code: int) -> None:
        """The message, and 2 (bad input) or 3 (a runtime is missing)."""
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code  # type: ignore[misc]  # click's own subclasses do the same

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the paragraph."""
        if voice().verbose and self.__cause__ is not None:
            click.echo("".join(traceback.format_exception(self.__cause__)), file=file or sys.stderr)
        click.echo(f"Error: {self.message}", file=file or sys.stderr)


class ClosedError(Exception):
    """Nobody reads the output any more. No OSError, which click turns into exit code 1."""


class Verbs(click.Group):
    """A group of commands that suggests the nearest verb, and turns our exceptions into refusals."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command of the first argument.

        Raises:
            UsageError: there is none of that name; names the nearest.
        """
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            near = difflib.get_close_matches(name, self.list_commands(ctx), n=1)
            hint = (
                f" Did you mean {near[0]!r}?" if near else f" It must be one of {', '.join(self.list_commands(ctx))}."
            )
            ctx.fail(f"No such command {name!r}.{hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb.

        Raises:
            ClosedError: nobody reads the output.
            Refusal: in place of an exception that a user can act on; anything else is a bug and keeps its traceback.
        """
        try:
            return super().invoke(ctx)
        except _expected() as error:
            if isinstance(error, BrokenPipeError):
                raise ClosedError from None
            text = str(error)
            if isinstance(error, OSError):
                where = error.filename or "a file"
                text = f"Cannot use {where}: {error.strerror or error}. Check the path and its rights."
            voice().say(f"Error: {' '.join(text.split())}", shown=False)
            raise Refusal(text, getattr(error, "exit_code", 2)) from error


def _expected() -> tuple[type[Exception], ...]:
    """The roots of what the three packages raise on purpose; imported only once something was raised."""
    from calib_data import DataError
    from engines.core.errors import EngineError
    from qdq.core.errors import QdqError

    return (QdqError, EngineError, DataError, OSError)


@dataclass
class Voice:
    """How much a verb says, and where else it is written."""

    quiet: bool = False
    verbose: bool = False
    log: IO[str] | None = None

    def say(self, text: str, *, shown: bool = True) -> None:
        """A line on standard error, where it is `shown`, and in the log file with the time."""
        if shown:
            click.echo(text, err=True)
        if self.log:
            self.log.write(f"{datetime.now().astimezone().isoformat(timespec='milliseconds')} {text}\n")
            self.log.flush()


_VOICE: ContextVar[Voice] = ContextVar("how much is said")


def voice() -> Voice:
    """That of the verb that runs."""
    return _VOICE.get(Voice())


def _set(**change: Any) -> None:
    _VOICE.set(replace(voice(), **change))


def _open_log(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    if path is not None:
        if not _replaceable(path):
            raise Refusal(
                f"Cannot write the log {path}: there is a file that holds no log of qdq. Give another name.", 2
            )
        log = ctx.with_resource(path.open("w", encoding="utf-8"))
        ctx.call_on_close(lambda: _set(log=None))
        _set(log=log)
        voice().say(f"qdq {ctx.info_name}", shown=False)


def _replaceable(log: Path) -> bool:
    """Whether nothing is lost if a log takes a file's place: it is empty, a log, or no regular file."""
    if not log.is_file():
        return True
    with log.open("rb") as file:
        head = file.read(100)
    return not head or re.match(rb"\d{4}-\d\d-\d\dT\S+ qdq ", head) is not None


def voice_options() -> list[click.Option]:
    """What every verb takes: -q, -v and --log-file."""

    def setter(key: str) -> Any:
        return lambda ctx, param, value: _set(**{key: value})

    return [
        click.Option(
            ["-q", "--quiet"],
            is_flag=True,
            expose_value=False,
            callback=setter("quiet"),
            help="Say only results, warnings and errors.",
        ),
        click.Option(
            ["-v", "--verbose"],
            is_flag=True,
            expose_value=False,
            callback=setter("verbose"),
            help="Say when each step begins and how long it took, and where an error arose.",
        ),
        click.Option(
            ["--log-file"],
            type=click.Path(path_type=Path, dir_okay=False, writable=True),
            expose_value=False,
            callback=_open_log,
            help="Write what is said, and when, to this file.",
        ),
    ]


class Bars:
    """What a run is at, on standard error, with the time left: a bar for each step, or lines where no terminal is.

    A call says (steps done, steps in all or None, name of the step); a new name starts a new bar.
    """

    def __init__(self, every_s: float = EVERY_S) -> None:
        """No bar yet; without a terminal a line comes every `every_s` seconds."""
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._label = ""
        self._done = 0
        self._total: int | None = None
        self._began = time.monotonic()
        self._every_s = every_s
        self._over = Event()
        self._lines: Thread | None = None

    def __enter__(self) -> Bars:
        """Show the bars."""
        if voice().quiet:
            return self
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=Console(stderr=True),
            )
            self._progress.start()
        else:
            told = copy_context()  # with this verb's voice
            self._lines = Thread(target=told.run, args=(self._tell,), daemon=True, name="progress")
            self._lines.start()
        return self

    def __call__(self, done: int, total: int | None, label: str) -> None:
        """Move the bar of a step."""
        label = label[:1].upper() + label[1:]
        if label != self._label:
            self._finish()
            self._label, self._began, self._task = label, time.monotonic(), None
            voice().say(label, shown=voice().verbose and self._progress is None)
            if self._progress is not None:
                self._task = self._progress.add_task(label, total=total)
        self._done, self._total = done, total
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the finished bars on the screen."""
        self._over.set()
        if self._lines is not None:
            self._lines.join()
        if error is None:
            self._finish()
        if self._progress is not None:
            self._progress.stop()

    def _finish(self) -> None:
        """Fill the last bar, whatever its step last said."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=1, completed=1)
        if self._label:
            took = f"{self._label}: {time.monotonic() - self._began:.1f} s"
            voice().say(took, shown=voice().verbose and self._progress is None)

    def _tell(self) -> None:
        """Say every few seconds where the run is."""
        while not self._over.wait(self._every_s):
            if self._label:
                voice().say(self._where())

    def _where(self) -> str:
        gone = time.monotonic() - self._began
        if not self._total or not self._done:
            return f"{self._label}: for {gone:.0f} s"
        left = gone * (self._total - self._done) / self._done
        return f"{self._label}: {self._done} of {self._total}, about {left:.0f} s left"


def show_json(text: str) -> None:
    """Print a verb's answer, JSON text with its line end: the only thing on standard output."""
    click.echo(text, nl=False)
    answered()


def show_rows(title: str, rows: Iterable[tuple[str, ...]]) -> None:
    """Print a table without borders; long cells are folded, never cut."""
    from rich.console import Console
    from rich.table import Table

    console = Console(
        file=sys.stdout,
        width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL,
        markup=False,
        highlight=False,
        emoji=False,
    )
    rows = list(rows)
    if not rows:  # a table without columns would lose its title
        console.print(title)
        return
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    for _ in range(max((len(row) for row in rows), default=0)):
        table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def warn(lines: Iterable[str]) -> None:
    """Lines on standard error that a reader of the result must not miss; empty ones are left out."""
    for text in filter(None, lines):
        voice().say(f"Warning: {text}")


def note(text: str) -> None:
    """One line on standard error that a reader of the result must know."""
    voice().say(f"Note: {text}", shown=not voice().quiet)
