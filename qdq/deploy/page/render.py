"""Plain values into one self-contained HTML file: templates with autoescape, style and script inside, nothing fetched.

view -> jinja2 -> text -> file. The page's policy lets nothing run but our own script, by its hash, and nothing load.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from engines.verify.manifest import package_versions
from qdq.core.files import write_text
from qdq.deploy.compare.result import Comparison
from qdq.deploy.page import words
from qdq.deploy.page.changes import changes
from qdq.deploy.page.folder import Run, page_beside, read
from qdq.deploy.page.schemes import schemes
from qdq.deploy.page.view import view
from qdq.deploy.report.report import count

TEMPLATES = Path(str(files("qdq.deploy.page") / "templates"))


def page(path: Path, *, with_images: bool = False) -> str:
    """The page of a run, or of a comparison of schemes: HTML text, the same for the same files.

    Args:
        path: as of `folder.read`.
        with_images: show slices of the images that a run kept.

    Raises:
        InputError: see `folder.read`.
    """
    return html(read(path, with_images=with_images), pictures=with_images)


def html(made: Run | Comparison, *, pictures: bool = False) -> str:
    """The page of what `folder.read` gave."""
    if isinstance(made, Comparison):
        return _filled("schemes.html.j2", schemes(made))
    return _filled("run.html.j2", view(made, pictures=pictures))


def page_of_changes(before: Path, after: Path) -> str:
    """The page that says what differs between two runs.

    Raises:
        InputError: see `folder.read`, or one of them is a comparison of schemes.
    """
    return _filled("changes.html.j2", changes(before, after))


def write_page(folder: Path, *, with_images: bool = False) -> Path:
    """Write the page of a run, or of a comparison, beside its JSON file; whole or not at all.

    Args:
        folder: as of `folder.read`.
        with_images: as of `page`.

    Raises:
        InputError: see `page`; the folder is not writable.
    """
    place = page_beside(folder)
    write_text(place, page(folder, with_images=with_images))
    return place


def _filled(template: str, content: Mapping[str, Any]) -> str:
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        _environment()
        .get_template(template)
        .render(
            v=content,
            style=Markup(style),
            script=Markup(script),
            policy=f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
            "base-uri 'none'; form-action 'none'",
            version=package_versions().get("qdq", "without a version"),
        )
    )


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(os.fspath(TEMPLATES)),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "us": words.time,
        "db": words.decibels,
        "bare": lambda value: words.decibels(value).removesuffix(" dB"),
        "sortable": words.number,
        "count": _count,
    }
    return made


def _count(value: int | None) -> str:
    return "" if value is None else count(value)


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
