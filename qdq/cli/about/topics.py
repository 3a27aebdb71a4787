"""The topics of `qdq help`: text made of the tables and options that the program itself works by.

topic -> sections, each a head and rows or a paragraph -> text of a given width. Must not state what a table states.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence

import click

Rows = Sequence[tuple[str, ...]]
WIDTH = 100
INDENT = "    "


def topics() -> dict[str, tuple[str, Callable[[click.Group], Iterator[str]]]]:
    """Name -> what it is about, and its paragraphs and tables for the program's verbs."""
    return {
        "schemes": ("what --scheme quantizes, and what that needs", _schemes),
        "limits": ("what can be required of a result", _limits),
        "exit-codes": ("what the command ends with, and errors as JSON", _exit_codes),
        "files": ("what is read, written and printed as JSON", _files),
        "compilers": ("what --compiler compiles with, for which GPUs", _compilers),
        "samples": ("what --data takes", _data),
        "environment": ("variables that qdq reads", _environment),
    }


def text_of(topic: str, program: click.Group, width: int = WIDTH) -> str:
    """A topic as text that ends with a line end.

    Raises:
        KeyError: there is no such topic.
    """
    what, sections = topics()[topic]
    head = f"QDQ {topic.upper()}"
    return "\n".join([head, "", *_wrapped(f"{topic}: {what}", width), "", *sections(program)]).rstrip() + "\n"


def contents() -> str:
    """The list of topics."""
    rows = [(f"qdq help {name}", what) for name, (what, _) in topics().items()]
    return "\n".join(["Topics:", *_table(rows), "", "qdq help VERB is qdq VERB --help."]) + "\n"


def _schemes(program: click.Group) -> Iterator[str]:
    from engines.backends.profile import profiles
    from qdq.plan.scheme import SCHEMES
    from qdq.plan.settings import Settings

    yield from _wrapped(
        "A scheme is the formats of the operands of products; every other node stays in float. Data none: "
        "weights alone are quantized. A format in brackets is what 4-bit weights are multiplied as."
    )
    usual = list({p.backend: p for p in reversed(list(profiles().values()))}.values())[::-1]
    rows = [("scheme", "weights", "data", "convolutions", *(f"{p.title} needs" for p in usual))]
    for scheme in SCHEMES.values():
        weight = scheme.weight + (f" ({scheme.compute_format})" if scheme.compute_format else "")
        formats = Settings(scheme=scheme.name).formats
        least = [[p.formats.get(name) for name in formats] for p in usual]
        needs = [f"sm{max(map(int, filter(None, some)))}" if all(some) else "has it not" for some in least]
        rows.append((scheme.name, weight, scheme.data or "none", scheme.convolution or "float", *needs))
    yield ""
    yield from _table(rows)
    yield ""
    yield from _wrapped("Settings that go with one, and what is chosen from where nothing is said:")
    yield ""
    rows = [("scheme", "--rounding", "--equalize")]
    rows += [(s.name, " or ".join(s.roundings), " or ".join(s.equalizations)) for s in SCHEMES.values()]
    yield from _table(rows)


def _limits(program: click.Group) -> Iterator[str]:
    from qdq.build.recipe import LIMITS

    yield from _wrapped(
        "Each holds for every output or structure; a result that misses one is written all the same, and the command "
        "ends with 1. Below one of --warn it ends as ever, and says so. In a recipe they have underscores, as "
        "min_sqnr_db: 20."
    )
    wanted = {*LIMITS, "min_int8_share", "max_size_mib", "warn_sqnr_db", "warn_top1"}
    where: dict[str, list[str]] = {}
    options: dict[str, click.Option] = {}
    for verb, command in sorted(program.commands.items(), key=lambda pair: pair[0] != "deploy"):
        for option in command.params:
            if isinstance(option, click.Option) and option.name in wanted:
                options.setdefault(option.name, option)
                where.setdefault(option.name, []).append(verb)
    yield ""
    yield from _table([(o.opts[0], o.help or "", ", ".join(where[n])) for n, o in options.items()])


def _exit_codes(program: click.Group) -> Iterator[str]:
    from qdq.cli.answer.error import EXIT_CODES, KINDS, SCHEMA

    yield from _table([(str(code), what) for code, what in EXIT_CODES.items()])
    yield ""
    yield from _wrapped(
        f"With --json an error is also an object with the schema {SCHEMA} on standard output, whose error.kind is "
        f"{', '.join(KINDS[:-1])} or {KINDS[-1]}; standard error has its paragraph as ever. A limit that failed is no "
        "error: standard output has the report, which names it."
    )


def _files(program: click.Group) -> Iterator[str]:
    from qdq.deploy.report.schemas import versions

    yield from _wrapped('Each has its name and version under "schema"; `qdq schema NAME` prints its JSON Schema.')
    yield ""
    yield from _table([(name, version, maker) for name, version, _, maker in versions()])


def _compilers(program: click.Group) -> Iterator[str]:
    from engines.backends.backend import backends
    from engines.backends.profile import profiles
    from engines.cost.gpus import GPUS

    rows = [("--compiler", "what", "builds")]
    for backend in backends().values():
        for profile in (p for p in profiles().values() if p.backend == backend.name):
            where = "on its GPU" if backend.needs_gpu else "here, without a GPU"
            rows.append((profile.key, profile.title, where))
    yield from _table(rows)
    yield ""
    usual = {kind: p.name for p in reversed(list(profiles().values())) for kind in p.kinds}
    gpus = [(g.name, g.target, g.kind or "", usual.get(g.kind or "", "")) for g in GPUS.values()]
    yield from _wrapped("Without --compiler the --gpu decides, by what it is sold as; without --gpu it is the first.")
    yield ""
    yield from _table([("--gpu", "target", "sold as", "--compiler"), *gpus])


def _data(program: click.Group) -> Iterator[str]:
    from calib_data.sources import forms

    yield from _table([("--data", form.says) for form in forms()])
    yield ""
    yield from _wrapped(
        "Samples must be what the model gets at inference: the same scaling and the same types. `qdq data DATA` says "
        "what they hold, and `qdq data IMAGES --preview seen.png` draws what a model will see."
    )


def _environment(program: click.Group) -> Iterator[str]:
    from qdq.cli.answer.error import VARIABLES

    yield from _table(list(VARIABLES.items()))


def _wrapped(text: str, width: int = WIDTH) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False)


def _table(rows: Iterable[tuple[str, ...]], width: int = WIDTH) -> list[str]:
    """Columns as wide as they need; one that does not fit is folded, the widest first."""
    held = [row for row in rows]
    widths = [max(len(row[i]) for row in held) for i in range(len(held[0]))]
    while sum(widths) + 2 * len(widths) + len(INDENT) > width:
        widest = max(range(len(widths)), key=lambda i: widths[i])
        widths[widest] -= 1
    lines = []
    for row in held:
        cells = [
            textwrap.wrap(cell, size, break_on_hyphens=False) or [""] for cell, size in zip(row, widths, strict=True)
        ]
        for number in range(max(map(len, cells))):
            part = [
                (cell[number] if number < len(cell) else "").ljust(size)
                for cell, size in zip(cells, widths, strict=True)
            ]
            lines.append((INDENT + "  ".join(part)).rstrip())
    return lines
