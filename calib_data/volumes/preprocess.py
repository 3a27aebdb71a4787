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
        return VolumeSpec(bundle=rest)
    if (plans := nnunet_plans(text)) is None:
        raise DataError(
            f"Cannot read the preprocessing {text!r}: it must be nnunet:FOLDER, nnunet:FOLDER:CONFIGURATION, or "
            "monai:BUNDLE/configs/inference.json."
        )
    return plans_spec(*plans)


def nnunet_plans(text: str) -> tuple[str, str] | None:
    """Folder and configuration of `nnunet:FOLDER[:CONFIGURATION]`; None of another text."""
    kind, _, rest = text.partition(":")
    if kind != "nnunet" or not rest:
        return None
    folder, _, name = rest.rpartition(":")
    return (rest, CONFIGURATION) if not folder or Path(rest).is_dir() else (folder, name)
