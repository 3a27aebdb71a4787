"""What a model's inputs need, and whether a sample gives it.

Flow: InputSpec (name, dtype, shape) + raw arrays -> check_sample -> arrays of the model's own dtypes, or a DataError
that says what is wrong, in which sample, and how to fix it.
It must not read files, nor convert anything where a value could change its meaning.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]

NUMERIC = "biuf"  # numpy kinds that a sample may have: bool, signed, unsigned, float


class DataError(Exception):
    """The samples are not what the model needs; the message is one paragraph for the user. Exit code 2."""

    exit_code = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """One input of a model.

    A dimension is an int where the model fixes it, and a name or None where it is dynamic. ``dtype`` is the name of a
    numpy dtype that is bool, integer or float ("float32", "int64").
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]

    def __post_init__(self) -> None:
        """Refuse a dtype that no sample can have.

        Raises:
            DataError: the dtype is not a bool, integer or float dtype that numpy knows.
        """
        try:
            supported = np.dtype(self.dtype).kind in NUMERIC
        except TypeError:
            supported = False
        if not supported:
            raise DataError(
                f"Cannot read samples for input {self.name!r}: the model takes {self.dtype}; only bool, integer and "
                "float inputs can be read. Export the model with such an input (token ids instead of strings, "
                "float32 instead of bfloat16)."
            )


def check_names(got: Collection[str], inputs: Sequence[InputSpec], where: str) -> None:
    """Require exactly the names of the model's inputs.

    Raises:
        DataError: a name is missing or unknown; the message gives the right names and the closest one.
    """
    needed = [spec.name for spec in inputs]
    known, there = set(needed), set(got)
    missing = [name for name in needed if name not in there]
    extra = [name for name in got if name not in known]
    if not missing and not extra:
        return
    near = [(name, close) for name in extra[:8] for close in get_close_matches(name, missing, n=1)]
    guesses = [f" Did you mean {close!r} instead of {name!r}?" for name, close in near]
    faults = [f"no array for {_listed(missing)}"] * bool(missing) + [f"unknown {_listed(extra)}"] * bool(extra)
    raise DataError(
        f"Wrong input names in {where}: {' and '.join(faults)}. The model needs exactly {_listed(needed)}; "
        f"got {_listed(got)}.{''.join(guesses)} Save each array under its input's name."
    )


def require_one_input(path: Path, inputs: Sequence[InputSpec]) -> None:
    """Require a model of one input, for a file that holds one array.

    Raises:
        DataError: the model has several.
    """
    if len(inputs) != 1:
        names = ", ".join(repr(spec.name) for spec in inputs)
        raise DataError(
            f"Cannot tell which input {path} is for: a .npy file holds one array, the model has {len(inputs)} inputs "
            f"({names}). Save .npz files: numpy.savez(path, **{{name: array}})."
        )


def check_shapes(shapes: Mapping[str, tuple[int, ...]], inputs: Sequence[InputSpec], where: str) -> None:
    """Require the rank and the fixed dimensions of every input, and that the sample holds something.

    An input may be empty along a dynamic dimension, as the cache of a decoder's first step is, but not all may, unless
    the model declares sizes of zero.

    Raises:
        DataError: another rank, another size of a fixed dimension, or no element in any input.
    """
    for spec in inputs:
        check_shape(shapes[spec.name], spec, where)
    empty = [spec for spec in inputs if 0 in shapes[spec.name] and 0 not in spec.shape]
    if empty and all(0 in shapes[spec.name] for spec in inputs):
        raise DataError(
            f"Empty array for {empty[0].name!r} in {where}: got shape {_shape(shapes[empty[0].name])}, the model needs "
            f"{_shape(empty[0].shape)} with at least one element. Remove this sample or save its values."
        )


def check_shape(shape: tuple[int, ...], spec: InputSpec, where: str) -> None:
    """Require the rank and the fixed dimensions of an input.

    Raises:
        DataError: another rank, or another size of a fixed dimension.
    """
    if shape == spec.shape:
        return
    if len(shape) != len(spec.shape):
        fix = "Reshape it to the model's rank."
        if len(shape) == len(spec.shape) - 1:
            fix = "Is the batch axis missing? Save array[None]."
        elif len(shape) == len(spec.shape) + 1:
            fix = "One file holds one sample here; put many samples in a single .npz, or save array[0]."
        raise DataError(
            f"Wrong rank of {spec.name!r} in {where}: got shape {_shape(shape)} of rank {len(shape)}, the model needs "
            f"{_shape(spec.shape)} of rank {len(spec.shape)}. {fix}"
        )
    for axis, (got, needed) in enumerate(zip(shape, spec.shape, strict=True)):
        if isinstance(needed, int) and got != needed:
            raise DataError(
                f"Wrong shape of {spec.name!r} in {where}: got {_shape(shape)}, the model needs {_shape(spec.shape)}; "
                f"axis {axis} is {got} and must be {needed}. Crop, pad or transpose the sample as for inference."
            )


def check_sample(arrays: Mapping[str, Array], inputs: Sequence[InputSpec], where: str) -> dict[str, Array]:
    """Check one sample and bring it to the model's dtypes.

    Conversions allowed: float to float (rounding only), integer or bool to integer when every value fits. Never between
    integers and floats: raw 0..255 pixels in place of normalized ones would calibrate without a word and be wrong.

    Args:
        arrays: name -> array of any shape and dtype, as read.
        inputs: what the model takes.
        where: the file or sample, for messages.

    Returns:
        Input name -> C-contiguous array of the input's dtype and rank, in the order of ``inputs``; finite, or -inf as
        masks have it: whoever measures an input refuses that.

    Raises:
        DataError: wrong names, rank, fixed dimension or dtype; all empty; NaN or values that are too large.
    """
    check_names(arrays.keys(), inputs, where)
    check_shapes({name: array.shape for name, array in arrays.items()}, inputs, where)
    return {spec.name: _converted(arrays[spec.name], spec, where) for spec in inputs}


def _converted(array: Array, spec: InputSpec, where: str) -> Array:
    needed = np.dtype(spec.dtype)
    if array.dtype == needed and (needed.kind != "f" or np.isfinite(array).all()):
        return np.asarray(array, order="C")
    if array.dtype.kind == "f" and needed.kind == "f":
        mask = array == np.asarray(-np.inf, array.dtype)  # of attention: no value of a measured quantity
        _require(np.isfinite(array) | mask, spec, where, "Find out where it comes from, or remove this sample.")
        with np.errstate(over="ignore"):
            result = np.asarray(array, needed, order="C")
        if result.dtype != array.dtype:
            fix = f"The {array.dtype} values exceed {needed}: normalize them."
            _require(np.isfinite(result) | mask, spec, where, fix)
        return result
    if array.dtype.kind in "biu" and needed.kind in "iu":
        limits = np.iinfo(needed)
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
        if low < limits.min or high > limits.max:
            raise DataError(
                f"Values of {spec.name!r} in {where} do not fit: got {array.dtype} from {low} to {high}, the model "
                f"takes {needed}, {limits.min} to {limits.max}. Save the values that the model gets at inference."
            )
        return np.asarray(array, needed, order="C")
    fix = "Save the array with that dtype."
    if array.dtype.kind in "iu" and needed.kind == "f":
        fix = (
            "Preprocess the samples exactly as for inference (scale, mean, standard deviation) and save the floats: "
            "raw integer values would calibrate silently and wrongly."
        )
    elif array.dtype.kind == "f" and needed.kind in "iu":
        fix = f"If these are indices or raw pixels, save array.astype({needed.name!r}) yourself."
    raise DataError(f"Wrong dtype of {spec.name!r} in {where}: got {array.dtype}, the model needs {needed}. {fix}")


def _require(good: npt.NDArray[np.bool_], spec: InputSpec, where: str, fix: str) -> None:
    if not good.all():
        index = tuple(int(i) for i in np.unravel_index(int(np.argmin(good)), good.shape))
        raise DataError(
            f"NaN or infinite value in {spec.name!r} in {where}: {int((~good).sum())} of {good.size} values, the first "
            f"at index {index}; every value must be a finite {spec.dtype}, or -inf in a mask. {fix}"
        )


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(repr(name) for name in list(names)[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown or "nothing"


def _shape(shape: Sequence[int | str | None]) -> str:
    return "(" + ", ".join("?" if dim is None else str(dim) for dim in shape) + ")"
