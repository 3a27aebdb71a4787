"""Pictures that verbs draw into one file: asked before the work, written whole or not at all.

Matplotlib is loaded only here. This module must not know what is drawn.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from engines.core.files import write_atomic
from qdq.core.errors import InputError, MissingRuntimeError


def figures() -> Any:
    """Matplotlib's class of figures.

    Raises:
        MissingRuntimeError: it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingRuntimeError(
            "--plot needs matplotlib, which is not installed. Install it with: pip install 'qdq[plot]'"
        ) from None
    return Figure


def require_form(path: Path) -> None:
    """Refuse before the work a file whose ending says no form that can be drawn.

    Raises:
        MissingRuntimeError: see `figures`.
        InputError: matplotlib knows no such form.
    """
    known = figures()().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise InputError(f"Cannot draw {path}: its ending says no form of picture. Name a .png or .svg file.")


def write(figure: Any, path: Path) -> None:
    """Write a figure in the form of the file's ending, without the date, so that equal pictures are equal bytes.

    Raises:
        InputError: the file cannot be written.
    """
    from matplotlib import rc_context

    form, made = path.suffix[1:].lower(), io.BytesIO()
    with rc_context({"svg.hashsalt": "qdq"}):
        figure.savefig(made, dpi=110, format=form, metadata={"Date": None} if form in ("svg", "svgz") else None)
    write_atomic(path, made.getvalue(), error=InputError)
