"""Train the 3-D U-Net that ``qdq demo`` ships, on the MNI152 template inside the pip package nilearn.

Flow: nilearn's 1 mm T1, grey and white matter maps -> 2 mm crop -> train on the left hemisphere, CPU, a few minutes
-> ``demo_unet.onnx``, ``demo_volume.npz`` and ``NOTICE`` under ``--out``.
It must not be imported by, nor shipped with, the packages: torch, nilearn and nibabel are needed only here.

The template is (almost) left-right symmetric, so the right hemisphere alone would be no fair test. Hence no left-right
flip is used in training, and the front third of the head (``HELD_OUT``) is left out on the left side too: the Dice of
the right hemisphere's front third is the one on anatomy that the network has never seen, not even mirrored.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import nibabel as nib
import nilearn.datasets
import numpy as np
import onnx
import torch
from torch import Tensor, nn

CROP_MM = (slice(18, 178), slice(22, 214), slice(0, 160))
"""Voxels of the 1 mm template that are kept: x -80..79 mm, y -112..79 mm, z -72..87 mm; holds the whole brain."""
HALF = 40
"""First right-hemisphere voxel of the 2 mm crop along x: x = 0 mm."""
HELD_OUT = slice(64, 96)
"""y voxels of the 2 mm crop (16 mm and forward) that are never trained on, in either hemisphere."""
PATCH = (32, 32, 32)

NOTICE = """\
demo_volume.npz and demo_unet.onnx derive from the ICBM 152 2009a nonlinear symmetric template (T1, grey and white
matter maps), as carried, brain-extracted and stored as 8-bit integers, by the Python package nilearn {nilearn}
(nilearn/datasets/data/mni_icbm152_*_tal_nlin_sym_09a_converted.nii.gz). nilearn's own description of the template
gives its licence as "unknown"; the notice below is the one that McGill University publishes with the template, at
https://www.mcgill.ca/bic/software/tools-data-analysis/anatomical-mri/atlases/icbm152-non-linear-2009

    Copyright (C) 1993-2004 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute,
    McGill University. Permission to use, copy, modify, and distribute this software and its documentation for any
    purpose and without fee is hereby granted, provided that the above copyright notice appear in all copies. The
    authors and McGill University make no representations about the suitability of this software for any purpose. It
    is provided "as is" without express or implied warranty. The authors are not responsible for any data loss,
    equipment damage, property loss, or injury to subjects or patients resulting from the use or misuse of this
    software package.

Changes made by tools/train_demo.py: cropped to the brain, averaged over 2 x 2 x 2 voxels to 2 mm, rounded to 8 bits;
labels are the most probable of background, grey and white matter; the network was trained on these. The template is
an average of 152 people and shows no one person. Not for clinical use.

Fonov V, Evans AC, Botteron K, Almli CR, McKinstry RC, Collins DL and the Brain Development Cooperative Group:
Unbiased average age-appropriate atlases for pediatric studies, NeuroImage 54 (2011) 313-327.
Fonov VS, Evans AC, McKinstry RC, Almli CR, Collins DL: Unbiased nonlinear average age-appropriate brain templates from
birth to adulthood, NeuroImage 47 Supplement 1 (2009) S102.
"""


class UNet(nn.Module):
    """3-D U-Net of two levels, 16-32-64 channels: (1, 1, X, Y, Z) float32 in [0, 1] -> (1, 3, X, Y, Z) logits.

    X, Y and Z are multiples of 4. Every hidden width is a multiple of 16, as tensor cores like it.
    """

    def __init__(self) -> None:
        """Build the layers, with PyTorch's random initial weights."""
        super().__init__()
        self.encode1 = nn.Sequential(conv(1, 16), conv(16, 16))
        self.encode2 = nn.Sequential(conv(16, 32), conv(32, 32))
        self.bottom = conv(32, 64)
        self.up2 = nn.ConvTranspose3d(64, 32, 2, stride=2)
        self.decode2 = conv(64, 32)
        self.up1 = nn.ConvTranspose3d(32, 16, 2, stride=2)
        self.decode1 = nn.Sequential(conv(32, 16), conv(16, 16))
        self.head = nn.Conv3d(16, 3, 1)
        self.pool = nn.MaxPool3d(2)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of background, grey matter, white matter."""
        fine = self.encode1(image)
        coarse = self.encode2(self.pool(fine))
        bottom = self.bottom(self.pool(coarse))
        coarse = self.decode2(torch.cat([coarse, self.up2(bottom)], 1))
        return self.head(self.decode1(torch.cat([fine, self.up1(coarse)], 1)))  # type: ignore[no-any-return]


def conv(channels_in: int, channels_out: int) -> nn.Sequential:
    """3x3x3 convolution, batch norm (folded by the exporter), ReLU."""
    return nn.Sequential(
        nn.Conv3d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm3d(channels_out), nn.ReLU()
    )


def load_template() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The template at 2 mm.

    Returns:
        volume (80, 96, 80) uint8 T1 intensity; labels (80, 96, 80) uint8, 0 background, 1 grey, 2 white matter;
        affine (4, 4) float64, voxel to mm, RAS.
    """
    folder = Path(nilearn.datasets.__file__).parent / "data"
    maps = {}
    for name in ("t1", "gm", "wm"):
        image = nib.nifti1.load(folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz")
        fine = np.asarray(image.dataobj, np.float32)[CROP_MM]
        x, y, z = (n // 2 for n in fine.shape)
        maps[name] = fine.reshape(x, 2, y, 2, z, 2).mean((1, 3, 5))
    affine = image.affine.copy()
    affine[:3, 3] += [s.start + 0.5 for s in CROP_MM]  # a 2 mm voxel's centre lies between its two 1 mm voxels
    affine[:3, :3] *= 2
    labels = np.stack([255 - maps["gm"] - maps["wm"], maps["gm"], maps["wm"]]).argmax(0)
    return maps["t1"].round().astype(np.uint8), labels.astype(np.uint8), affine


def sample_batch(image: np.ndarray, labels: np.ndarray, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Random patches with random front-back and up-down flips, gain, gamma and noise; never a left-right flip."""
    images, targets = [], []
    for _ in range(size):
        start = [int(rng.integers(0, n - p + 1)) for n, p in zip(image.shape, PATCH, strict=True)]
        at = tuple(slice(s, s + p) for s, p in zip(start, PATCH, strict=True))
        patch, target = image[at], labels[at]
        for axis in (1, 2):
            if rng.random() < 0.5:
                patch, target = np.flip(patch, axis), np.flip(target, axis)
        patch = rng.uniform(0.95, 1.05) * patch ** rng.uniform(0.93, 1.07) + rng.normal(0, 0.02, PATCH) * (patch > 0)
        images.append(patch[None].astype(np.float32))
        targets.append(target.astype(np.int64))
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(targets))


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy plus one minus the mean soft Dice of the three classes."""
    probability = logits.softmax(1)
    truth = nn.functional.one_hot(target, 3).movedim(-1, 1).float()
    dims = (0, 2, 3, 4)
    dice = (2 * (probability * truth).sum(dims) + 1) / (probability.sum(dims) + truth.sum(dims) + 1)
    return nn.functional.cross_entropy(logits, target) + 1 - dice.mean()


def dice_of(got: np.ndarray, want: np.ndarray) -> str:
    """Dice of grey and white matter, as text."""
    return ", ".join(
        f"{name} {2 * ((got == k) & (want == k)).sum() / ((got == k).sum() + (want == k).sum()):.4f}"
        for k, name in ((1, "grey"), (2, "white"))
    )


def export(network: UNet, path: Path) -> None:
    """Write the network as ONNX, opset 17, dynamic X, Y, Z, without the exporter's notes about source files."""
    temporary = path.with_suffix(".part")
    torch.onnx.export(
        network,
        (torch.zeros(1, 1, 40, 48, 40),),
        temporary,
        dynamo=False,
        opset_version=17,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {2: "x", 3: "y", 4: "z"}, "logits": {2: "x", 3: "y", 4: "z"}},
    )
    model = onnx.load(temporary)
    for node in model.graph.node:
        node.doc_string = ""
    onnx.checker.check_model(model, full_check=True)
    temporary.write_bytes(model.SerializeToString(deterministic=True))
    temporary.replace(path)


def main() -> None:
    """Train, print the Dice, write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("qdq/demo_data"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(True)
    rng = np.random.default_rng(options.seed)

    volume, labels, affine = load_template()
    image = volume.astype(np.float32) / 255
    mirrored = np.corrcoef(image[:HALF].ravel(), image[: HALF - 1 : -1].ravel())[0, 1]
    print(f"volume {volume.shape}, left against mirrored right hemisphere: correlation {mirrored:.4f}")
    seen = (slice(0, HALF), slice(0, HELD_OUT.start))
    network = UNet()
    print(f"{sum(p.numel() for p in network.parameters())} parameters")
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=options.steps)
    start = time.monotonic()
    for step in range(options.steps):
        patches, targets = sample_batch(image[seen], labels[seen], options.batch, rng)
        loss = loss_of(network(patches), targets)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == options.steps - 1:
            print(f"step {step} loss {loss.item():.4f} {time.monotonic() - start:.0f} s", flush=True)

    network.eval()
    with torch.no_grad():
        got = network(torch.from_numpy(image[None, None, HALF:])).argmax(1)[0].numpy()
    threshold = np.where(volume[HALF:] < 195, (volume[HALF:] > 0).astype(np.uint8), 2)
    print("right hemisphere, Dice of plain thresholds (0, 195), for comparison:", dice_of(threshold, labels[HALF:]))
    print("right hemisphere, Dice:", dice_of(got, labels[HALF:]))
    print("its front third, unseen on both sides:", dice_of(got[:, HELD_OUT], labels[HALF:, HELD_OUT]))
    options.out.mkdir(parents=True, exist_ok=True)
    export(network, options.out / "demo_unet.onnx")
    np.savez_compressed(options.out / "demo_volume.npz", volume=volume, labels=labels[HALF:], affine=affine)
    (options.out / "NOTICE").write_text(NOTICE.format(nilearn=nilearn.__version__), encoding="utf-8")
    for path in sorted(options.out.iterdir()):
        print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
