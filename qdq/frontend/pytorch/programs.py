"""A saved ExportedProgram, whose operators may be those of a library that registers them as it is imported.

file -> `program_in` -> torch.export.ExportedProgram. Must not export it.
"""

from __future__ import annotations

import re
import zipfile
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from qdq.core.errors import InputError
from qdq.frontend.pytorch.libraries import quiet, torch_here
from qdq.frontend.pytorch.refused import why

LIBRARIES = ("torch.ao.quantization.fx._decomposed", "torchao")  # of operators that quantize, as PT2E writes them
_CALLED = re.compile(rb'"torch\.ops\.(\w+)\.(\w+)\.\w+"')


def program_in(path: Path) -> Any:
    """The ExportedProgram of a file that `torch.export.save` wrote.

    Raises:
        InputError: no such file, it is none, or it calls operators that nothing here registers; names them.
        MissingRuntimeError: torch is not installed.
    """
    torch = torch_here()
    if not path.is_file():
        raise InputError(f"No such file: {path}. Give one that torch.export.save wrote.")
    try:
        with quiet():
            if unknown(path):
                for library in LIBRARIES:
                    with suppress(ImportError):
                        import_module(library)
            return torch.export.load(str(path))
    except Exception as error:  # whatever torch raises
        if names := unknown(path):
            raise InputError(
                f"Cannot read {path}: it calls {', '.join(names)}, which nothing here registers. Install the package "
                "that does, or let a factory import it and load the program: torch:package.module:factory."
            ) from error
        raise InputError(
            f"Cannot read {path}: it is no ExportedProgram that torch {torch.__version__} reads ({why(error).says}). "
            "Write it again with torch.export.save(torch.export.export(module, example_inputs), path)."
        ) from error


def unknown(path: Path) -> list[str]:
    """Operators that a program calls and torch does not know now; none of a file that is no archive."""
    called: set[tuple[bytes, bytes]] = set()
    with suppress(OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError), zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            if member.endswith(".json"):
                called.update(_CALLED.findall(archive.read(member)))
    ops = torch_here().ops
    names = sorted((space.decode(), name.decode()) for space, name in called)
    return [f"{space}::{name}" for space, name in names if not hasattr(getattr(ops, space), name)]
