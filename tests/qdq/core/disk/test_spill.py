"""Arrays in files without a name: read as they were written, in parts, and no memory is kept for them."""

from __future__ import annotations

import gc
import os
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from qdq.core.disk import spill
from qdq.core.disk.spill import Spill
from qdq.core.errors import InputError


def test_arrays_come_back_whole_and_in_parts_after_later_ones() -> None:
    store, rng = Spill("numbers"), np.random.default_rng(0)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in ((5, 3), (0, 4), (7,), (2, 3, 4))]
    kept = [store.put(array) for array in arrays]
    del store
    for array, each in zip(arrays, kept, strict=True):
        assert each.shape == array.shape and each.read().tobytes() == array.tobytes()
    assert kept[0].read(1, 3).tolist() == arrays[0][1:3].tolist()
    assert kept[3].read(1, 9).tolist() == arrays[3][1:].tolist()
    assert kept[2].read(6, 2).shape == (0,)


@pytest.mark.parametrize("dtype", ["float64", "float16", "int64", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 0, 3), (4, 5)])
def test_an_array_keeps_its_type_and_rank(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).normal(size=shape).astype(dtype)
    found = Spill("numbers").put(array).read()
    assert found.dtype == array.dtype and found.shape == shape and found.tobytes() == array.tobytes()


def test_a_view_is_written_in_the_order_of_its_axes() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T
    kept = Spill("numbers").put(array)
    assert np.array_equal(kept.read(), array)
    assert kept.sha256 == Spill("numbers").put(array.copy()).sha256


def test_a_hundred_arrays_take_the_memory_of_none() -> None:
    array = np.ones((256, 256), np.float32)
    tracemalloc.start()
    try:
        store = Spill("numbers")
        kept = [store.put(array) for _ in range(100)]
        left, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(kept) == 100 and left < array.nbytes and peak < 2 * array.nbytes


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc here")
def test_one_file_holds_all_and_goes_with_the_last_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill.tempfile, "tempdir", str(tmp_path))
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    store = Spill("numbers")
    kept = [store.put(np.ones(4, np.float32)) for _ in range(50)]
    del store
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert not list(tmp_path.iterdir())
    del kept
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill.tempfile, "TemporaryFile", partial(Path("/dev/full").open, "r+b", buffering=0))
    with pytest.raises(InputError, match=r"Cannot write [\d.e-]+ MB of channel vectors to .*TMPDIR"):
        Spill("channel vectors").put(np.ones(4, np.float32))
