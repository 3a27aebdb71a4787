"""How the command line talks: progress bars, tables, errors of one paragraph, and "did you mean".

verb -> values -> `show_rows` on standard output; progress, notes and errors on standard error.
Must not know a verb, and must stay light: `qdq --help` imports it.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

WIDTH_WITHOUT_TERMINAL = 160  # columns of a table in a file or a pipe


class Refusal(click.ClickException):
    """An error of ours, printed as one paragraph; its exit code is that of the command."""

    def __init__(self, message: str, exit_code: int) -> None:
        """The message, and 2 (bad input) or 3 (a runtime is missing)."""
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code  # type: ignore[misc]  # click's own subclasses do the same

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the paragraph."""
        click.echo(f"Error: {self.message}", file=file or sys.stderr)


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
            Refusal: in place of an exception that a user can act on; anything else is a bug and keeps its traceback.
        """
        try:
            return super().invoke(ctx)
        except _expected() as error:
            if isinstance(error, BrokenPipeError):
                raise
            text = str(error)
            if isinstance(error, OSError):
                where = error.filename or "a file"
                text = f"Cannot use {where}: {error.strerror or error}. Check the path and its rights."
            raise Refusal(text, getattr(error, "exit_code", 2)) from error
        except KeyboardInterrupt:
            raise Refusal("Interrupted; nothing was written.", 130) from None


def _expected() -> tuple[type[Exception], ...]:
    """The roots of what the three packages raise on purpose; imported only once something was raised."""
    from calib_data import DataError
    from engines.core.errors import EngineError
    from qdq.core.errors import QdqError

    return (QdqError, EngineError, DataError, OSError)


class Bars:
    """Progress bars on standard error, one per step, with the time left; silent where that is no terminal.

    A call says (steps done, steps in all or None, name of the step); a new name starts a new bar.
    """

    def __init__(self) -> None:
        """No bar yet."""
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._label = ""

    def __enter__(self) -> Bars:
        """Show the bars."""
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._progress.start()
        return self

    def __call__(self, done: int, total: int | None, label: str) -> None:
        """Move the bar of a step."""
        if self._progress is None:
            return
        if label != self._label or self._task is None:
            self._finish()
            self._label, self._task = label, self._progress.add_task(label[:1].upper() + label[1:], total=total)
        self._progress.update(self._task, completed=done, total=total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the finished bars on the screen."""
        if self._progress is not None:
            if error is None:
                self._finish()
            self._progress.stop()

    def _finish(self) -> None:
        """Fill the last bar, whatever its step last said."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=1, completed=1)


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
    """Lines on standard error that a reader of the result must not miss."""
    for text in lines:
        click.echo(f"Warning: {text}", err=True)


def note(text: str) -> None:
    """One line on standard error that a reader of the result must know."""
    click.echo(f"Note: {text}", err=True)
