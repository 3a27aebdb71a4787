"""Quantized weights of a large model on disk: written one at a time as they are made, mapped when they are looked at.

    weight -> `WeightStore.weight`: made once per key -> QTensor whose codes are mapped from a file
    codes -> `WeightStore.tensor`: TensorProto that says where the values lie; `storage.save` copies them from there
    with kept(folder): ...   a run that is killed leaves its finished weights there, and the same run takes them up

A weight appears under its key by a rename when it is complete. Without `kept` the folder is a temporary one, gone with
the last value that refers to it. This module must not quantize.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper

from engines.core.files import Scratch, new_files
from qdq.core.errors import InputError
from qdq.core.formats import FORMATS
from qdq.core.qtensor import QParams, QTensor
from qdq.model.external import CHUNK, placed, release

FORMAT = "qdq.weights/2"
LEAST = 1 << 20  # bytes of codes; fewer stay in memory and in the model file

_BITS = {np.dtype(row.dtype): row.bits for row in FORMATS.values()}
_FOLDER: ContextVar[Path | None] = ContextVar("folder of finished weights", default=None)
_HEADERS = Lock()


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Every large model that is solved inside keeps its finished weights in this folder; it goes when all went well.

    It is made when the first weight is done. Weights that an earlier run left there are taken up if they are of the
    same model, settings, scales and version.
    """
    token = _FOLDER.set(folder)
    try:
        yield
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        _FOLDER.reset(token)


class WeightStore:
    """A folder of quantized weights, and of tensors made of them. May be used from several threads at once."""

    def __init__(self) -> None:
        """Name the folder, that of `kept` or a temporary one.

        Raises:
            InputError: it cannot be made.
        """
        folder = _FOLDER.get()
        try:
            if folder is None:
                scratch = Scratch()
                weakref.finalize(self, scratch.remove)
                folder = scratch.path
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise _unwritable(folder, error) from None
        self.folder = folder.absolute()

    def weight(self, key: str, make: Callable[[], QTensor]) -> QTensor:
        """A weight that an earlier run has finished under a hash of all that decides its codes, else a new one.

        Its codes are a read-only view of a file unless they are few.

        Raises:
            InputError: the disk is full or not writable.
        """
        if (found := self.finished(key)) is not None:
            return found
        made = make()
        try:
            with new_files(self.folder / f"{key}.codes", resumed=True) as (file,):
                _write(file, made.codes)
            facts = {
                "params": _facts(made.params),
                "compute_params": None if made.compute_params is None else _facts(made.compute_params),
            }
            head = {"format": FORMAT, "shape": made.codes.shape, **facts}
            scales = {"scale": made.params.scale} | (
                {} if made.compute_params is None else {"compute_params": made.compute_params.scale}
            )
            # Written last: the sign that the weight is complete.
            with new_files(self.folder / f"{key}.npz", resumed=True) as (file,):
                np.savez(file, allow_pickle=False, head=np.array(json.dumps(head)), **scales)
        except OSError as error:
            raise _unwritable(self.folder, error) from None
        found = self.finished(key)
        assert found is not None
        return found

    def tensor(self, name: str, values: npt.NDArray[np.generic]) -> TensorProto:
        """A tensor of these values; they lie in a file of the store, in that of a weight where it holds just them.

        Raises:
            InputError: the disk is full or not writable.
        """
        if values.nbytes < LEAST:
            return numpy_helper.from_array(np.asarray(values), name)
        kind = helper.np_dtype_to_tensor_dtype(values.dtype)
        source = values
        while isinstance(source.base, np.ndarray) and not isinstance(source, np.memmap):
            source = source.base
        packs = _BITS.get(values.dtype, 8) < 8
        if isinstance(source, np.memmap) and values.flags.c_contiguous and not packs:
            whole = values.ctypes.data == source.ctypes.data and values.nbytes == source.nbytes
            if whole and (path := Path(str(source.filename))).parent == self.folder.absolute():
                return placed(name, kind, values.shape, path)
        path = self.folder / f"{uuid.uuid4().hex}.tensor"
        try:
            with new_files(path) as (file,):
                _write(file, values, packed=packs)
            release(values)
        except OSError as error:
            raise _unwritable(self.folder, error) from None
        return placed(name, kind, values.shape, path)

    def finished(self, key: str) -> QTensor | None:
        """The finished weight of that key; None if there is none, or one of another version of this module."""
        codes, facts = self.folder / f"{key}.codes", self.folder / f"{key}.npz"
        if not (codes.is_file() and facts.is_file()):
            return None
        # numpy reads an array's header by ast.literal_eval, which CPython 3.11 does not run safely in two threads.
        with _HEADERS, np.load(facts, allow_pickle=False) as held:
            head = json.loads(str(held["head"]))
            scales = {name: held[name] for name in held.files if name != "head"}
        if head["format"] != FORMAT:
            return None
        params = QParams(scale=scales["scale"], **head["params"])
        compute_params = (
            QParams(scale=scales["compute_params"], **head["compute_params"]) if head["compute_params"] else None
        )
        dtype, shape = np.dtype(FORMATS[params.format].dtype), tuple(head["shape"])
        if codes.stat().st_size != dtype.itemsize * int(np.prod(shape)):
            return None
        few = codes.stat().st_size < LEAST
        values = np.fromfile(codes, dtype).reshape(shape) if few else np.memmap(codes, dtype, mode="r", shape=shape)
        return QTensor(codes=np.asarray(values), params=params, compute_params=compute_params)


def key_of(*parts: object) -> str:
    """A hash of arrays, and of other values by their repr, for `WeightStore.weight`."""
    digest = hashlib.sha256(FORMAT.encode())
    for part in parts:
        digest.update(b"\0")
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.name}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


def _facts(params: QParams) -> dict[str, Any]:
    """Everything of parameters but the scale."""
    return {name: value for name, value in asdict(params).items() if name != "scale"}


def _write(file: BinaryIO, values: npt.NDArray[np.generic], *, packed: bool = False) -> None:
    """Write codes in C order, a piece at a time; `packed` as ONNX stores them, two to a byte."""
    flat = np.ascontiguousarray(values).reshape(-1)
    for start in range(0, flat.size, CHUNK):  # an even number of elements
        piece = flat[start : start + CHUNK]
        file.write(numpy_helper.from_array(piece).raw_data if packed else piece.view(np.uint8).data)


def _unwritable(folder: Path | None, error: OSError) -> InputError:
    return InputError(
        f"Cannot write the weights of a large model to {folder or tempfile.gettempdir()}: {error.strerror or error}. "
        "They need as many bytes there as the quantized model; make room, or set TMPDIR to another disk."
    )
