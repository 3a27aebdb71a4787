"""Packages that only some samples need: imported when they are, and named with their pip command where absent."""

from __future__ import annotations

import importlib
from typing import Any

from calib_data.validation import DataError


class MissingExtraError(DataError):
    """A package that these samples need is not installed. Exit code 3."""

    exit_code = 3


def need(module: str, *, install: str, for_what: str) -> Any:
    """Import a module of a package that `pip install INSTALL` brings.

    Raises:
        MissingExtraError: it is not installed; says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise MissingExtraError(
            f"{for_what} needs the package {package}, which is not installed: pip install '{install}'."
        ) from None
