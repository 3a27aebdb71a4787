"""What `--preprocess` names: preprocessing that stands elsewhere, as a `VolumeSpec`."""

from __future__ import annotations

from pathlib import Path

from calib_data.validation import DataError
from calib_data.volumes.monai import require_trust
from calib_data.volumes.nnunet import CONFIGURATION, plans_spec
from calib_data.volumes.spec import VolumeSpec


def preprocess_spec(text: str) -> VolumeSpec:
    """The recipe of `nnunet:FOLDER[:CONFIGURATION]` or `monai:BUNDLE/configs/inference.json`.

    Raises:
        DataError: another form; see `plans_spec`; a bundle that is not trusted.
    """
    kind, _, rest = text.partition(":")
    if kind == "monai" and rest:
        require_trust(rest)
        return VolumeSpec(bundle=rest, orientation="stored", spacing_mm="stored")
    if kind != "nnunet" or not rest:
        raise DataError(
            f"Cannot read the preprocessing {text!r}: it must be nnunet:FOLDER, nnunet:FOLDER:CONFIGURATION, or "
            "monai:BUNDLE/configs/inference.json."
        )
    folder, _, name = rest.rpartition(":")
    if not folder or Path(rest).is_dir():
        folder, name = rest, CONFIGURATION
    return plans_spec(folder, name)
