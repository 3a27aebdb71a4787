"""nnU-Net's plans as a `VolumeSpec`. plans.json and dataset.json are data: reading them runs nothing.

FOLDER -> configuration, with what it inherits -> axes, spacing, normalization, patch, in nnU-Net's order of steps.
What would give other numbers than nnU-Net's is refused. Nothing of a checkpoint is opened.

Source: MIC-DKFZ/nnUNet 2.8.1, utilities/plans_handling, preprocessing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from calib_data.validation import DataError
from calib_data.volumes.spec import VolumeSpec, volume_spec

CONFIGURATION = "3d_fullres"
MOST_BYTES = 16 << 20
_READERS = {
    "NibabelIO": "stored",
    "SimpleITKIO": "stored",
    "NibabelIOWithReorient": "RAS",
    "SimpleITKIOWithReorient": "RAS",
}
_FIX = "Give the `volume:` block by hand in a recipe"


def plans_spec(folder: Path | str, configuration: str = CONFIGURATION) -> VolumeSpec:
    """What nnU-Net does to an image, for `FOLDER/plans.json` and `FOLDER/dataset.json`.

    Args:
        folder: of a trained model, or of a preprocessed data set.
        configuration: a key of the plans' `configurations`.

    Raises:
        DataError: no such folder or configuration, or one that an image alone is no input of, or steps not known here.
    """
    plans, data = _read(Path(folder) / "plans.json"), _read(Path(folder) / "dataset.json")
    try:
        return _spec(plans, data, configuration)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DataError(
            f"Cannot read nnU-Net's plans in {folder}: {type(error).__name__}, {str(error)[:80]}; plans.json and "
            "dataset.json of nnU-Net 2 are needed."
        ) from None


def plans_labels(folder: Path | str) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    """Of `FOLDER/dataset.json`: name -> label values, without the ignored one, and the order that regions are painted.

    Raises:
        DataError: it cannot be read.
    """
    data = _read(Path(folder) / "dataset.json")
    try:
        each = {str(name): tuple(v) if isinstance(v, list) else (v,) for name, v in data.get("labels", {}).items()}
        order = tuple(data.get("regions_class_order") or ())
        if not all(isinstance(v, int) for v in (*order, *(v for some in each.values() for v in some))):
            raise TypeError("a label is no whole number")
    except (TypeError, AttributeError) as error:
        raise DataError(
            f"Cannot read the labels in {folder}/dataset.json: {error}. nnU-Net 2 has a number for each name, or for "
            "regions a list of numbers."
        ) from None
    return {name: values for name, values in each.items() if name != "ignore"}, order


def _spec(plans: Mapping[str, Any], data: Mapping[str, Any], configuration: str) -> VolumeSpec:
    chosen = _configuration(plans["configurations"], configuration)
    if chosen.get("previous_stage"):
        raise DataError(
            f"The configuration {configuration} takes the segmentation of {chosen['previous_stage']} besides the "
            "image, so an image alone is no input of its network. Choose another, such as 3d_fullres."
        )
    _known(chosen.get("preprocessor_name", "DefaultPreprocessor"), "DefaultPreprocessor", "preprocessor_name")
    resampling = "resample_data_or_seg_to_shape"
    _known(chosen["resampling_fn_data"], resampling, "resampling_fn_data")
    how = chosen["resampling_fn_data_kwargs"]
    if how.get("force_separate_z"):
        raise DataError(f"The plans force separate_z, which is not known here. {_FIX}.")
    reader = plans["image_reader_writer"]
    if reader not in _READERS:
        raise DataError(f"The plans read images with {reader}; {', '.join(_READERS)} are known here. {_FIX}.")
    schemes, masks = chosen["normalization_schemes"], chosen["use_mask_for_norm"]
    names = data.get("channel_names", data.get("modality", {}))
    if len(names) != len(schemes) or len(masks) != len(schemes):
        raise DataError(
            f"dataset.json names {len(names)} channels and plans.json normalizes {len(schemes)}: they belong to "
            "different data sets."
        )
    by_modality = plans.get("foreground_intensity_properties_by_modality", {})
    properties = plans.get("foreground_intensity_properties_per_channel", by_modality)
    spacing, patch = list(chosen["spacing"]), list(chosen["patch_size"])
    if len(patch) == 2:  # slice by slice along the first axis
        spacing, patch = [None, *spacing[-2:]], [1, *patch]
    return volume_spec(
        {
            "orientation": _READERS[reader],
            "axes": "c" + "".join("zyx"[axis] for axis in plans["transpose_forward"]),
            "spacing_mm": spacing,
            "grid": "edges",
            "order": how["order"],
            "separate_z": "never" if how.get("force_separate_z") is False else "auto",
            "order_z": how["order_z"],
            "crop": "nonzero",
            "intensity": [
                _intensity(scheme, bool(mask), properties.get(str(n), {}))
                for n, (scheme, mask) in enumerate(zip(schemes, masks, strict=True))
            ],
            "normalize": "before",
            "patch": patch,
            "patches": {"kind": "sliding"},
        }
    )


def _configuration(all_: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration with what it inherits; its own keys go first."""
    found: dict[str, Any] = {}
    seen: list[str] = []
    while name:
        if name not in all_:
            near = get_close_matches(name, [*all_], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(f"nnU-Net's plans have no configuration {name!r}, only {', '.join(all_)}.{hint}")
        if name in seen:
            raise DataError(f"nnU-Net's plans inherit in a circle: {' from '.join([*seen, name])}.")
        seen.append(name)
        found = {**all_[name], **{key: value for key, value in found.items() if key != "inherits_from"}}
        name = all_[name].get("inherits_from", "")
    return found


def _intensity(scheme: str, masked: bool, known: Mapping[str, float]) -> dict[str, Any]:
    """One channel's normalization; nnU-Net divides by at least 1e-8, as `normalized` does."""
    if scheme == "CTNormalization":
        clip = [known["percentile_00_5"], known["percentile_99_5"]]
        return {"mean": known["mean"], "std": max(known["std"], 1e-8), "clip": clip}
    if scheme == "ZScoreNormalization":
        return {"zscore": "filled" if masked else "all"}
    plain: dict[str, dict[str, Any]] = {
        "RescaleTo01Normalization": {"percentile": [0, 100]},
        "RGBTo01Normalization": {"mean": 0.0, "std": 255.0},
        "NoNormalization": {"mean": 0.0, "std": 1.0},
    }
    if scheme not in plain:
        raise DataError(f"The plans normalize with {scheme}, which is not known here. {_FIX}.")
    return plain[scheme]


def _known(name: str, wanted: str, key: str) -> None:
    if name != wanted:
        raise DataError(f"The plans have {key} {name}, whose numbers are others; {wanted} is known here. {_FIX}.")


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES)
        found = json.loads(text)
    except OSError as error:
        raise DataError(
            f"Cannot read {path}: {error.strerror}. nnunet:FOLDER needs the folder with plans.json and dataset.json."
        ) from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DataError(f"Cannot read {path}: it is no mapping in JSON. nnU-Net writes it when it plans.")
    return found
