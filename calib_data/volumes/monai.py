"""A MONAI bundle's own transforms, for who trusts it: its configuration is code that runs when it is read.

BUNDLE/configs/inference.json -> `preprocessing`, instantiated alone -> a case's files -> image and place.
It must not run anything that was not trusted, nor read more of the bundle than what its preprocessing refers to.

Source: MONAI, bundle/config_parser.py and docs/config_syntax.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from calib_data.extras import need
from calib_data.validation import DataError
from calib_data.volume import Volume
from calib_data.volumes.case import Case

_TRUSTED: ContextVar[bool] = ContextVar("bundles may run their code", default=False)


@contextmanager
def trusting(yes: bool = True) -> Iterator[None]:
    """Let bundles run their code inside, where `yes`."""
    token = _TRUSTED.set(yes)
    try:
        yield
    finally:
        _TRUSTED.reset(token)


def trust_here(yes: bool) -> None:
    """Let bundles run their code from here on, where `yes`: in a worker of a process that may."""
    _TRUSTED.set(yes)


def trusted() -> bool:
    """Whether they may."""
    return _TRUSTED.get()


def require_trust(bundle: str) -> None:
    """Refuse a bundle that nobody said to trust.

    Raises:
        DataError: nobody did.
    """
    if not trusted():
        raise DataError(
            f"Refused to open the MONAI bundle {bundle}: reading its configuration runs code that stands in it. Give "
            "--trust if you trust whoever made it, or write what it does as a `volume:` block in a recipe."
        )


def bundle_image(case: Case, bundle: str) -> Volume:
    """What the bundle's preprocessing makes of a case's files: (channels, i, j, k) with its place.

    Raises:
        DataError: not trusted; no such bundle; a DICOM series; its transforms give no image of three axes.
        MissingExtraError: MONAI is not installed.
    """
    transforms = _transforms(bundle)
    if any(origin.series for origin in case.origins):
        raise DataError(
            "a MONAI bundle reads files by itself, and whether it orders and checks the slices of a DICOM series is "
            "not known. Convert the series to NIfTI (dcm2niix), or write what the bundle does as a `volume:` block."
        )
    files = [str(origin.files[0]) for origin in case.origins]
    found = transforms({"image": files[0] if len(files) == 1 else files})["image"]
    array = np.asarray(found.detach().cpu().numpy() if hasattr(found, "detach") else found)
    affine = np.asarray(getattr(found, "affine", np.eye(4)), np.float64)
    if array.ndim != 4:
        raise DataError(f"the bundle's transforms make shape {array.shape} of it; (channels, x, y, z) is needed.")
    return Volume(array=array, affine=affine)


@lru_cache(maxsize=1)
def _transforms(bundle: str) -> Any:
    require_trust(bundle)
    path = Path(bundle)
    if not path.is_file():
        raise DataError(f"There is no MONAI bundle's configuration {bundle}. Name BUNDLE/configs/inference.json.")
    bundles = need("monai.bundle", install="monai", for_what="A MONAI bundle (or a `volume:` block in its place)")
    try:
        parser = bundles.ConfigParser()
        parser.read_config(bundle)
        parser["bundle_root"] = str(path.absolute().parents[1])
        made = parser.get_parsed_content("preprocessing", instantiate=True)
    except Exception as error:  # of the bundle's own code
        raise DataError(
            f"The preprocessing of the MONAI bundle {bundle} does not open: {type(error).__name__}, "
            f"{' '.join(str(error).split())[:300]}."
        ) from None
    if not callable(made):
        raise DataError(f"The MONAI bundle {bundle} has no preprocessing that can be called.")
    return made
