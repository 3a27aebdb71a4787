"""Keep what a benchmark printed: `--results RESULTS.md[:SECTION]` on its command line replaces a section of that file.

A section is what stands between the lines `<!-- NAME -->` and `<!-- /NAME -->`; its name is that of the script unless
one is given. The command and the date stand above what was printed; paths in the command are cut to their last part.
With `--merge` too, rows of the section's table that were not printed again stay, and its older commands stand above.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import TextIO

OPTION, MERGE = "--results", "--merge"


class Copy(io.TextIOBase):
    """Writes to a stream and remembers what was written."""

    def __init__(self, stream: TextIO) -> None:
        """Nothing is written yet."""
        self.stream, self.parts = stream, list[str]()

    def write(self, text: str) -> int:
        """Write to both."""
        self.parts.append(text)
        return self.stream.write(text)

    def flush(self) -> None:
        """Flush the stream."""
        self.stream.flush()


def replaced(text: str, name: str, content: str) -> str:
    """A file's text with another content of one section.

    >>> replaced("a\\n<!-- x -->\\nold\\n<!-- /x -->\\nb\\n", "x", "new")
    'a\\n<!-- x -->\\nnew\\n<!-- /x -->\\nb\\n'

    Raises:
        ValueError: the file has no such section.
    """
    head, begin, unquantized_type = text.partition(f"<!-- {name} -->\n")
    _, end, tail = unquantized_type.partition(f"<!-- /{name} -->\n")
    if not begin or not end:
        raise ValueError(f"no section {name!r}: add the lines <!-- {name} --> and <!-- /{name} -->")
    return f"{head}{begin}{content.strip()}\n{end}{tail}"


def content_of(text: str, name: str) -> str:
    """What a section holds; "" where there is none."""
    return text.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- /{name} -->\n")[0]


def merged(old: str, new: str, key: int) -> str:
    """A new section with those rows of an old one that it has not; the first `key` cells say which row it is.

    A row that is new stands behind the last one with the same first cell.

    >>> table = "| a | b |\\n|---|---|\\n"
    >>> merged(f"`x`\\n\\n{table}| 1 | 2 |\\n| 3 | 4 |\\n", f"`y`\\n\\n{table}| 1 | 5 |\\n", 1)
    '`x`\\n`y`\\n\\n| a | b |\\n|---|---|\\n| 1 | 5 |\\n| 3 | 4 |'

    Raises:
        ValueError: the two are not tables of the same columns.
    """
    if not old.strip():
        return new
    (before, table, after), (command, rows, below) = map(_parts, (old, new))
    if not table or table[:1] != rows[:1]:
        raise ValueError("the section has no table of these columns: leave --merge out")
    for row in rows[2:]:
        same = [i for i, line in enumerate(table) if i > 1 and _cells(line)[:key] == _cells(row)[:key]]
        alike = [i for i, line in enumerate(table) if i > 1 and _cells(line)[0] == _cells(row)[0]]
        if same:
            table[same[0]] = row
        else:
            table.insert(max(alike, default=len(table) - 1) + 1, row)
    commands = [line for line in before if line not in command]
    notes = [line for line in after if line not in below]
    return "\n".join(["\n".join([*commands, *command]), "", *table, *([""] if notes or below else []), *notes, *below])


def _parts(section: str) -> tuple[list[str], list[str], list[str]]:
    """Lines above the table of a section, of the table, and below it."""
    lines = section.strip().splitlines()
    before = list(takewhile(lambda line: not line.startswith("|"), lines))
    table = list(takewhile(lambda line: line.startswith("|"), lines[len(before) :]))
    after = dropwhile(lambda line: not line, lines[len(before) + len(table) :])
    return [line for line in before if line], table, list(after)


def _cells(row: str) -> Sequence[str]:
    return [cell.strip() for cell in row.strip("| ").split(" | ")]


def shown(printed: str) -> str:
    """Markdown of what a benchmark printed: tables as they are, anything else in a fence."""
    text = printed.strip("\n")
    return text if "\n|---" in f"\n{text}" else f"```text\n{text}\n```"


def _words(argv: list[str]) -> Iterator[str]:
    """A command line without the folders of its paths."""
    for word in argv:
        yield Path(word).name if "/" in word else word


def record(main: Callable[[], None], *, key: int = 0) -> None:
    """Run a benchmark, and keep what it prints where its command line asks for that.

    Args:
        key: the number of first columns of its table that say which row it is; 0 has no such table to merge.
    """
    if OPTION not in sys.argv:
        main()
        return
    merge = key > 0 and MERGE in sys.argv
    if merge:
        sys.argv.remove(MERGE)
    index = sys.argv.index(OPTION)
    file, _, section = sys.argv[index + 1].partition(":")
    del sys.argv[index : index + 2]
    name = section or Path(sys.argv[0]).stem
    before = Path(file).read_text(encoding="utf-8")
    replaced(before, name, "")  # so that a missing section is said before the work
    copy = Copy(sys.stdout)
    with contextlib.redirect_stdout(copy):
        main()
    command = shlex.join(["python", f"tools/{Path(sys.argv[0]).name}", *_words(sys.argv[1:])])
    content = f"`{command}`, {datetime.date.today().isoformat()}\n\n{shown(''.join(copy.parts))}"
    text = Path(file).read_text(encoding="utf-8")
    if merge:
        content = merged(content_of(text, name), content, key)
    Path(file).write_text(replaced(text, name, content), encoding="utf-8")
