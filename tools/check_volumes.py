"""Hold the sliding window and the measures of masks against MONAI and surface-distance.

    python tools/check_volumes.py

Needs monai, torch and surface-distance beside qdq and scipy (MONAI 1.6.1, surface-distance 0.1), which qdq itself does
not. The same cheap network goes over the same volumes in MONAI's `sliding_window_inference` and in ours, with every
padding, both weights and odd sizes: at most 1e-5 apart. Masks of six kinds are measured by both: Dice, HD95 and mean
surface distance of MONAI within 1e-5; HD95 of surface-distance, whose surfaces lie at corners of voxels, within 2 %.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from qdq.build.keys.window import Window
from qdq.deploy.volumes.measures import measured
from qdq.deploy.volumes.sliding import Sliding, output

Array = npt.NDArray[Any]
NEAR, NEAR_CORNERS = 1e-5, 0.02
SIZE = 40  # of the masks


def network(patches: Array) -> Array:
    """Two channels that depend on where in the patch a voxel lies, as a network's do near borders."""
    place = np.linspace(-1, 1, patches.shape[3], dtype=np.float32)[:, None]
    return np.concatenate([patches[:, :1] * place, np.tanh(patches[:, :1]) + place**2], axis=1)


def windows() -> Iterator[tuple[str, float]]:
    """Each window, and how far apart the results are."""
    import torch
    from monai.inferers.utils import sliding_window_inference

    rng = np.random.default_rng(0)
    cases: list[tuple[tuple[int, int, int], tuple[int, int, int], float, str, str, float]] = [
        (shape, patch, overlap, weights, padding, value)
        for shape, patch in (((50, 37, 20), (32, 32, 32)), ((61, 40, 33), (24, 17, 32)))
        for overlap in (0.25, 0.5, 0.7)
        for weights in ("constant", "gaussian")
        for padding, value in (("constant", 0.0), ("constant", -3.0), ("replicate", 0.0), ("reflect", 0.0))
    ]
    for shape, patch, overlap, weights, padding, value in cases:
        volume = rng.normal(size=(1, *shape)).astype(np.float32)
        window = Window(
            patch=patch,
            overlap=overlap,
            weights=weights,  # type: ignore[arg-type]
            padding=padding,  # type: ignore[arg-type]
            pad_value=value,
        )
        ours = output(Sliding(run=network, window=window), volume)
        theirs = sliding_window_inference(
            torch.from_numpy(volume[None]),
            patch,
            1,
            lambda x: torch.from_numpy(network(x.numpy())),
            overlap=overlap,
            mode=weights,
            padding_mode=padding,
            cval=value,
        )
        name = f"{'x'.join(map(str, shape))} {window.said}, {padding} {value:g}"
        yield name, float(np.abs(ours - theirs[0].numpy()).max())


def masks() -> dict[str, tuple[Array, Array, tuple[float, float, float]]]:
    """Six pairs of masks that tell definitions apart, with their spacing in mm."""

    def empty() -> Array:
        return np.zeros((SIZE,) * 3, bool)

    def cube(at: int, size: int) -> Array:
        found = empty()
        found[at : at + size, 10:20, 10:20] = True
        return found

    def ball(radius: float, spacing: tuple[float, float, float]) -> Array:
        grid = (np.indices((SIZE,) * 3).T - SIZE // 2) * np.asarray(spacing)
        return np.asarray((grid**2).sum(-1) <= radius**2).T

    def island(mask: Array, size: int) -> Array:
        found = mask.copy()
        found[1 : 1 + size, 1 : 1 + size, 1 : 1 + size] = True
        return found

    flat, thick = (1.0, 1.0, 3.0), (0.7, 0.7, 2.5)
    even = (1.0, 1.0, 1.0)
    points = [empty(), empty()]
    points[0][5, 5, 5] = points[1][7, 5, 5] = True
    slabs = [empty(), empty()]
    slabs[0][:10], slabs[1][:11] = True, True
    return {
        "cube moved by a voxel": (cube(10, 10), cube(11, 10), even),
        "balls of 12 and 13 mm": (ball(12, flat), ball(13, flat), flat),
        "ball with a far island": (island(ball(8, even), 3), ball(8, even), even),
        "small ball with a far island": (island(ball(3, thick), 5), ball(3, thick), thick),
        "single voxels": (points[0], points[1], even),
        "slabs at the border": (slabs[1], slabs[0], even),
    }


def measures() -> Iterator[tuple[str, float, float]]:
    """Each measure of each pair, how far apart the results are, and what is allowed."""
    import torch
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.meandice import compute_dice
    from monai.metrics.surface_distance import compute_average_surface_distance
    from surface_distance import compute_robust_hausdorff, compute_surface_distances

    for name, (found, true, spacing) in masks().items():
        ours = measured(found, true, spacing)
        pair = [torch.from_numpy(m[None, None].astype(np.float32)) for m in (found, true)]
        kept: dict[str, Any] = {"include_background": True, "spacing": spacing}
        theirs: dict[str, Callable[[], Any]] = {
            "Dice": lambda pair=pair: compute_dice(*pair),
            "HD95": lambda pair=pair, kept=kept: compute_hausdorff_distance(*pair, percentile=95, **kept),
            "mean surface distance": lambda pair=pair, kept=kept: compute_average_surface_distance(
                *pair, symmetric=True, **kept
            ),
        }
        for (what, compute), value in zip(theirs.items(), (ours.dice, ours.hd95_mm, ours.surface_mm), strict=True):
            yield f"{name}: {what} {value:.4f}, MONAI", abs((value or 0.0) - float(compute())), NEAR
        other = compute_robust_hausdorff(compute_surface_distances(true, found, spacing), 95)
        assert ours.hd95_mm is not None
        yield f"{name}: HD95, surface-distance", abs(ours.hd95_mm - other), NEAR_CORNERS * max(other, 1.0)


def main() -> int:
    """Print what differs most and what is too far apart; 1 if anything is."""
    found = [*((name, apart, NEAR) for name, apart in windows()), *measures()]
    wrong = [row for row in found if not row[1] <= row[2]]
    for name, apart, allowed in wrong:
        print(f"{apart:.2e} apart, {allowed:.2g} allowed: {name}")
    for kind in ("patches of", ", MONAI", "surface-distance"):
        name, apart, _ = max((row for row in found if kind in row[0]), key=lambda row: row[1])
        print(f"largest of {sum(kind in row[0] for row in found)}: {apart:.2e}, {name}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
