"""Does `--preprocess nnunet:FOLDER` give the arrays of nnU-Net's own preprocessing?

Plans are written here after the published format, images at random; both sides read the same files. Prints the largest
difference of each case and ends with 1 if one is above 1e-4. nnU-Net has an environment of its own, which also holds
this package; without the constraint it takes gigabytes:

    python3 -m venv nnunet && echo torch==2.13.0 > torch.txt
    nnunet/bin/pip install -c torch.txt nnunetv2==2.8.1 '.[medical]'
    nnunet/bin/python tools/peer_nnunet.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from calib_data.sources import ImageForm, form_of
from calib_data.volumes.case import keyed
from calib_data.volumes.nnunet import plans_spec
from calib_data.volumes.prepare import prepared

MOST = 1e-4
CT = {"mean": 99.5, "std": 39.0, "percentile_00_5": -41.0, "percentile_99_5": 176.0, "median": 100, "min": 0, "max": 9}
RESAMPLING = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Plans, and an image for them; sizes in the order of the file's axes, the plans' in nnU-Net's."""

    name: str
    grid: tuple[int, int, int]
    spacing: tuple[float, float, float]
    target: tuple[float, ...]
    schemes: tuple[str, ...]
    masks: tuple[bool, ...]
    transpose: tuple[int, int, int] = (0, 1, 2)
    reader: str = "NibabelIO"
    configuration: str = "3d_fullres"
    border: int = 0
    flipped: bool = False


TRIALS = (
    Trial(name="CT, isotropic", grid=(41, 37, 29), spacing=(0.9, 0.9, 1.2), target=(1.5,) * 3,
          schemes=("CTNormalization",), masks=(False,)),
    Trial(name="CT, thick slices", grid=(40, 44, 13), spacing=(0.8, 0.8, 5.0), target=(2.5, 1.1, 1.1),
          schemes=("CTNormalization",), masks=(False,)),
    Trial(name="CT to thick slices", grid=(31, 33, 29), spacing=(1.0, 1.0, 1.0), target=(4.0, 0.9, 0.9),
          schemes=("CTNormalization",), masks=(False,)),
    Trial(name="MR, 2 channels, mask, transpose", grid=(38, 30, 34), spacing=(1.0, 2.2, 1.0), target=(2.0, 1.2, 1.2),
          schemes=("ZScoreNormalization", "ZScoreNormalization"), masks=(True, True), transpose=(1, 0, 2), border=5),
    Trial(name="MR, thick slices along y, transpose", grid=(30, 9, 34), spacing=(0.7, 4.4, 0.7), target=(4.4, 0.9, 0.9),
          schemes=("ZScoreNormalization",), masks=(False,), transpose=(1, 0, 2), border=2),
    Trial(name="2d", grid=(30, 34, 9), spacing=(0.8, 0.8, 3.0), target=(1.0, 1.0),
          schemes=("ZScoreNormalization",), masks=(False,), configuration="2d"),
    Trial(name="turned to RAS", grid=(30, 28, 26), spacing=(1.0, 1.1, 1.3), target=(1.5, 1.5, 1.5),
          schemes=("RescaleTo01Normalization",), masks=(False,), reader="NibabelIOWithReorient", flipped=True),
)  # fmt: skip


def write(trial: Trial, folder: Path) -> list[str]:
    """Plans and the channels of one case."""
    sizes = {"spacing": list(trial.target), "patch_size": [16] * len(trial.target)}
    chosen: dict[str, Any] = {
        "data_identifier": "x",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "median_image_size_in_voxels": [32] * len(trial.target),
        **sizes,
        "normalization_schemes": list(trial.schemes),
        "use_mask_for_norm": list(trial.masks),
        "batch_dice": False,
    }
    for what, order in (("data", 3), ("seg", 1), ("probabilities", 1)):
        chosen[f"resampling_fn_{what}"] = "resample_data_or_seg_to_shape"
        chosen[f"resampling_fn_{what}_kwargs"] = {**RESAMPLING, "order": order, "is_seg": what == "seg"}
    chosen["architecture"] = {"network_class_name": "x", "arch_kwargs": {}, "_kw_requires_import": []}
    backward = [trial.transpose.index(axis) for axis in range(3)]
    plans = {
        "dataset_name": "Dataset001_x",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1, 1, 1],
        "original_median_shape_after_transp": [32, 32, 32],
        "image_reader_writer": trial.reader,
        "transpose_forward": list(trial.transpose),
        "transpose_backward": backward,
        "configurations": {trial.configuration: chosen},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(n): CT for n in range(len(trial.schemes))},
    }
    names = {str(n): scheme for n, scheme in enumerate(trial.schemes)}
    data = {"channel_names": names, "labels": {"background": 0, "x": 1}, "file_ending": ".nii.gz", "numTraining": 1}
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(data))
    random, files = np.random.default_rng(0), []
    affine = np.diag([*trial.spacing, 1.0])
    if trial.flipped:
        affine = affine[:, [1, 0, 2, 3]] @ np.diag([-1, 1, -1, 1])
    for n, scheme in enumerate(trial.schemes):
        image = random.normal(50, 200, trial.grid).astype(np.float32 if scheme.startswith("Z") else np.int16)
        if trial.border:
            inside = np.zeros(trial.grid, bool)
            inside[(slice(trial.border, -trial.border),) * 3] = True
            image[~inside] = 0
            image[tuple(size // 2 for size in trial.grid)] = 0  # a hole
        path = folder / f"images/case_{n:04d}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        header = nibabel.Nifti1Image(image, affine)
        header.set_qform(affine, code=1)
        header.set_sform(affine, code=1)
        nibabel.save(header, path)
        files.append(str(path))
    return files


def theirs(trial: Trial, folder: Path, files: list[str]) -> np.ndarray:
    """What nnU-Net makes of the files."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(str(folder / "plans.json"))
    data = json.loads((folder / "dataset.json").read_text())
    made = DefaultPreprocessor(verbose=False).run_case(
        files, None, plans, plans.get_configuration(trial.configuration), data
    )
    return np.asarray(made[0])


def ours(trial: Trial, folder: Path) -> np.ndarray:
    """What this package makes of them."""
    form = form_of(str(folder / "images"))
    assert isinstance(form, ImageForm)
    (case,) = keyed(form.cases(str(folder / "images")))
    return prepared(case, plans_spec(folder, trial.configuration)).image.array


def main() -> None:
    """Compare them all."""
    worst = 0.0
    for trial in TRIALS:
        with tempfile.TemporaryDirectory() as name:
            files = write(trial, Path(name))
            mine, other = ours(trial, Path(name)), theirs(trial, Path(name), files)
        same = mine.shape == other.shape
        apart = float(np.abs(mine - other).max()) if same else float("inf")
        worst = max(worst, apart)
        print(f"{trial.name}: {mine.shape} and {other.shape}, largest difference {apart:.2g}")
    sys.exit(worst > MOST)


if __name__ == "__main__":
    main()
