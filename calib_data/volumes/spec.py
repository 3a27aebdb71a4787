"""The block `volume:` of a recipe: what is done to an image, with units.

mapping -> `volume_spec` -> `VolumeSpec`, valid from then on -> `to_mapping`, the same block.

    volume:
      orientation: RAS                      # or stored
      axes: cxyz                            # the model's, without its batch axis; sizes below are in this order
      spacing_mm: [1, 1, 1]                 # or stored; null leaves an axis as it is
      grid: centers                         # the first voxel's centre stays (MONAI); edges: the outer edges (nnU-Net)
      order: 1                              # 0 nearest, 1 linear, 3 cubic spline
      crop: nonzero
      intensity: {window_hu: [-57, 164]}
      patch: [96, 96, 96]
      patches: {per_volume: 4, kind: foreground, seed: 0}

It must not read an image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from difflib import get_close_matches
from itertools import permutations
from typing import Annotated, Any, Literal

import msgspec

from calib_data.validation import DataError
from calib_data.volume import STORED, Volume, axis_of

_BY_BUNDLE = ("orientation", "spacing_mm", "grid", "order", "separate_z", "order_z", "crop", "intensity", "normalize")
AXES = tuple("".join(p) for p in permutations("cxyz")) + tuple("".join(p) for p in permutations("cxy"))
Pair = tuple[float, float]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]


class Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A mapping in which every key is known."""


class Intensity(Spec, frozen=True, kw_only=True):
    """How the values of a channel become those that a model sees; one of the first three, or mean and std.

    Attributes:
        window_hu: low and high; what lies beyond is clipped, then [low, high] becomes `to`.
        percentile: the same with these percentiles (0 to 100, linear) of the channel's voxels; [0, 100] is its range.
        zscore: less the mean, by the standard deviation (population) of these voxels. `nonzero`: those that are not 0,
            and the others keep their value; `filled`: those that are not 0 in some channel, and holes in them.
        mean, std: less `mean`, by `std`, after clipping to `clip`.
        clip: low and high.
        to: what a window or percentiles become.
    """

    window_hu: Pair | None = None
    percentile: Pair | None = None
    zscore: Literal["all", "nonzero", "filled"] | None = None
    mean: float | None = None
    std: Positive | None = None
    clip: Pair | None = None
    to: Pair = (0.0, 1.0)


class Patches(Spec, frozen=True, kw_only=True):
    """Which parts of an image are samples.

    Attributes:
        per_volume: how many of each.
        kind: `random`; `foreground`: around voxels of the label, or without one, voxels above the image's mean;
            `sliding`: windows that cover the image, evenly spread, each half over the next.
        seed: of what is drawn; what is drawn depends on it and on the image alone.
    """

    per_volume: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 4
    kind: Literal["random", "foreground", "sliding"] = "random"
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)] = 0


class VolumeSpec(Spec, frozen=True, kw_only=True):
    """What is done to an image, in this order: orientation, axes, crop, intensity, spacing, patch.

    Attributes:
        orientation: letters of the ends that x, y, z grow to, as nibabel's; `stored` leaves the file's axes; None where
            all files agree.
        axes: of the model's input, without its batch axis: c is channels, x, y, z the axes after `orientation`.
        spacing_mm: in the order of `axes`; None in it leaves an axis; `stored` leaves all; None where all files agree.
        grid: what stays where it is in resampling, `centers` of the first voxels or `edges` of the outer ones.
        order: of the spline that resamples images; labels are always nearest.
        separate_z: whether the axis of thick slices is resampled apart, with `order_z`. `auto`: where the largest
            spacing is more than three times the smallest, of the image, else of `spacing_mm`.
        order_z: of that axis.
        crop: `nonzero` cuts to the box of voxels that are not 0 in some channel; none: null.
        intensity: of every channel, or a list with one for each; `stored` takes the values as they are. There is no
            default for files of whole numbers and a model of floats, which hardly takes them as they are.
        normalize: `before` or `after` resampling.
        patch: in the order of `axes`; an image that is smaller is padded with `pad` on both sides.
        patches: which parts; without `patch` the whole image is the sample.
        pad: the value outside, after `intensity`.
        dtype: of the array.
        bundle: a MONAI bundle's inference.json, whose own transforms take the place of all but the keys of patches.
    """

    orientation: str | None = None
    axes: str = "cxyz"
    spacing_mm: Literal["stored"] | tuple[Positive | None, ...] | None = None
    grid: Literal["centers", "edges"] | None = None
    order: Literal[0, 1, 3] = 1
    separate_z: Literal["auto", "never"] = "never"
    order_z: Literal[0, 1, 3] = 0
    crop: Literal["nonzero"] | None = None
    intensity: Literal["stored"] | Intensity | tuple[Intensity, ...] | None = None
    normalize: Literal["before", "after"] = "after"
    patch: tuple[Size, ...] | None = None
    patches: Patches | None = None
    pad: float = 0.0
    dtype: str = "float32"
    bundle: str = ""

    @property
    def spatial(self) -> str:
        """The axes without channels."""
        return self.axes.replace("c", "")

    @property
    def flat(self) -> bool:
        """Whether images are pictures, without a place in a patient's space."""
        return "z" not in self.axes

    def said(self, image: Volume) -> str:
        """Size and place of an image in words."""
        if self.flat:
            return f"{'x'.join(map(str, image.grid[:2]))} pixels"
        spacing = " x ".join(f"{size:.4g}" for size in image.spacing_mm)
        return f"{'x'.join(map(str, image.grid))} voxels of {spacing} mm, {image.orientation}"

    def to_mapping(self) -> dict[str, Any]:
        """The block as plain values, without what is the default."""
        found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        return found


def block(spec: VolumeSpec) -> str:
    """The recipe's block as YAML, with the keys that are not the default."""
    import yaml

    return yaml.safe_dump({"volume": spec.to_mapping()}, sort_keys=False, default_flow_style=None)


def volume_spec(values: object) -> VolumeSpec:
    """The block of a recipe.

    Raises:
        DataError: a key that is not known, whose nearest is named; a value of another type; keys that need each other.
    """
    if isinstance(values, VolumeSpec):
        return values
    try:
        spec = msgspec.convert(values, VolumeSpec, str_keys=True)
    except msgspec.ValidationError as error:
        raise DataError(f"The recipe's volume: {_explained(str(error))}.") from None
    if fault := _fault(spec):
        raise DataError(f"The recipe's volume: {fault}.")
    return spec


def _explained(error: str) -> str:
    """What msgspec says, with the nearest key."""
    text = error.replace("Object contains unknown field", "there is no key").replace("$.", "").replace("`$`", "volume")
    unknown = text.partition("no key `")[2].partition("`")[0]
    known = {name for kind in (VolumeSpec, Intensity, Patches) for name in kind.__struct_fields__}
    near = get_close_matches(unknown, sorted(known), n=1) if unknown else []
    return text + (f"; did you mean `{near[0]}`?" if near else "")


def _fault(spec: VolumeSpec) -> str:
    """What does not fit together, "" where all does."""
    letters = [axis_of(letter)[0] for letter in spec.orientation or ""]
    if spec.orientation not in (None, STORED) and sorted(letters) != [0, 1, 2]:
        return (
            f"orientation is {spec.orientation!r}; three letters are needed, one of L and R, one of P and A, one of I "
            "and S, such as RAS or LIA; or stored"
        )
    if spec.axes not in AXES:
        return (
            f"axes is {spec.axes!r}; c, x, y, z in the model's order are needed, such as cxyz or czyx (pictures: cyx)"
        )
    rank = len(spec.spatial)
    for name, sizes in (("spacing_mm", spec.spacing_mm), ("patch", spec.patch)):
        if sizes is not None and sizes != STORED and len(sizes) != rank:
            return f"{name} has {len(sizes)} values and axes is {spec.axes}; {rank} are needed, in the order of axes"
    if spec.spacing_mm not in (None, STORED) and spec.grid is None:
        return (
            "spacing_mm needs its grid: `centers` keeps the centre of the first voxel (MONAI, nibabel), `edges` the "
            "outer edges (nnU-Net); they differ by up to a voxel"
        )
    beside = [name for name in _BY_BUNDLE if getattr(spec, name) not in (getattr(VolumeSpec(), name), STORED)]
    if spec.bundle and beside:
        return f"bundle and {beside[0]} are given: the bundle's own transforms do all but axes, patches, pad and dtype"
    if spec.patches and not spec.patch:
        return "patches needs patch, their size"
    if spec.dtype not in ("float16", "float32", "float64", "uint8", "int16", "int32", "int64"):
        return f"dtype is {spec.dtype!r}; float32, float16, float64, uint8, int16, int32 or int64 is needed"
    each = spec.intensity if isinstance(spec.intensity, tuple) else (spec.intensity,)
    return next((fault for one in each if isinstance(one, Intensity) and (fault := _intensity_fault(one))), "")


def _intensity_fault(one: Intensity) -> str:
    given = [name for name in ("window_hu", "percentile", "zscore", "mean") if getattr(one, name) is not None]
    if len(given) != 1 or (one.mean is None) != (one.std is None):
        said = " and ".join(given) or "nothing"
        return f"intensity holds {said}; one of window_hu, percentile, zscore, or mean with std, is needed"
    if one.clip and one.mean is None:
        return "intensity has clip, which belongs to mean and std"
    for name in ("window_hu", "percentile", "clip", "to"):
        pair = getattr(one, name)
        if pair and not (math.isfinite(pair[0]) and math.isfinite(pair[1]) and pair[0] < pair[1]):
            return f"{name} is {list(pair)}; [low, high] is needed"
    if one.percentile and not 0 <= one.percentile[0] < one.percentile[1] <= 100:
        return f"percentile is {list(one.percentile)}; both lie from 0 to 100"
    return ""


def differing(values: Mapping[str, str], key: str) -> DataError:
    """Files disagree, and the recipe does not say what is wanted; `values` maps cases to what they have."""
    some = list(dict.fromkeys(values.values()))
    first = {value: where for where, value in reversed([*values.items()])}
    shown = "; ".join(f"{value}, as in {first[value]}" for value in some[:3])
    return DataError(
        f"The images differ in their {key.removesuffix('_mm')} ({shown}), and there is no default: say what the model "
        f"was trained on with `{key}:` under `volume:` in a recipe; `stored` takes each as it is."
    )
