"""Keep what a benchmark printed: `--results RESULTS.md[:SECTION]` on its command line replaces a section of that file.

A section is what stands between the lines `<!-- NAME -->` and `<!-- /NAME -->`; its name is that of the script unless
one is given. The command and the date stand above what was printed; paths in the command are cut to their last part.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

OPTION = "--results"


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


def shown(printed: str) -> str:
    """Markdown of what a benchmark printed: tables as they are, anything else in a fence."""
    text = printed.strip("\n")
    return text if "\n|---" in f"\n{text}" else f"```text\n{text}\n```"


def _words(argv: list[str]) -> Iterator[str]:
    """A command line without the folders of its paths."""
    for word in argv:
        yield Path(word).name if "/" in word else word


def record(main: Callable[[], None]) -> None:
    """Run a benchmark, and keep what it prints where its command line asks for that."""
    if OPTION not in sys.argv:
        main()
        return
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
    Path(file).write_text(replaced(Path(file).read_text(encoding="utf-8"), name, content), encoding="utf-8")
