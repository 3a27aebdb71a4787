"""Every form of DATA, read lazily; shards, shapes and fingerprints."""

from __future__ import annotations

import hashlib
import itertools
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

import calib_data
from calib_data import DataError, InputSpec, Samples, open_samples, random_samples

IMAGE = InputSpec(name="image", dtype="float32", shape=("batch", 2, None))
MASK = InputSpec(name="mask", dtype="int64", shape=("batch", 3))


def images(n: int) -> list[np.ndarray]:
    """Samples (1, 2, 4) float32, all different."""
    return [np.full((1, 2, 4), i, np.float32) + np.arange(4, dtype=np.float32) / 8 for i in range(n)]


def assert_same(samples: Samples, expected: list[np.ndarray]) -> None:
    """The samples' images are exactly these, on two passes: nothing is computed, so no tolerance."""
    for _ in range(2):
        got = [sample["image"] for sample in samples]
        assert [g.dtype for g in got] == [np.dtype("float32")] * len(expected)
        for g, e in zip(got, expected, strict=True):
            np.testing.assert_array_equal(g, e, strict=True)


def write_function(folder: Path, body: str) -> str:
    """A data source file with these lines; returns its module.py:function form."""
    (folder / "source.py").write_text(f"import numpy as np\nCALLS = []\nDRAWN = []\n{body}\n", encoding="utf-8")
    return f"{folder / 'source.py'}:samples"


def test_public_names() -> None:
    assert calib_data.__all__ == sorted(calib_data.__all__)
    assert {"DataError", "InputSpec", "Samples", "open_samples", "random_samples"} <= set(calib_data.__all__)


def test_folder_of_npz_in_order_of_name_ignores_other_files(tmp_path: Path) -> None:
    for i in (2, 0, 1):
        np.savez(tmp_path / f"{i}.npz", image=images(3)[i])
    (tmp_path / "readme.txt").write_text("not a sample")
    (tmp_path / "._0.npz").write_bytes(b"what macOS leaves beside a file")
    samples = open_samples(tmp_path, [IMAGE])
    assert len(samples) == samples.len_or_none() == 3
    assert_same(samples, images(3))


def test_folder_of_npy(tmp_path: Path) -> None:
    for i, image in enumerate(images(3)):
        np.save(tmp_path / f"{i}.npy", image)
    assert_same(open_samples(str(tmp_path), [IMAGE], limit=2), images(2))


def test_limit_above_the_number_of_samples_takes_all(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", images(1)[0])
    assert len(open_samples(tmp_path, [IMAGE], limit=9)) == 1


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_one_npz_one_more_axis_than_the_input(
    tmp_path: Path, save: Callable[..., None], order: Literal["C", "F"]
) -> None:
    stack = np.asarray(np.stack(images(5)), order=order)
    save(tmp_path / "all.npz", image=stack, mask=np.arange(15, dtype=np.int64).reshape(5, 1, 3))
    samples = open_samples(tmp_path / "all.npz", [IMAGE, MASK])
    assert_same(samples, images(5))
    np.testing.assert_array_equal([s["mask"] for s in samples], np.arange(15).reshape(5, 1, 3))


def test_one_npz_of_the_inputs_own_rank_is_split_in_batches_of_one(tmp_path: Path) -> None:
    np.savez(tmp_path / "all.npz", image=np.concatenate(images(5)))
    assert_same(open_samples(tmp_path / "all.npz", [IMAGE]), images(5))


def test_one_npz_is_split_in_batches_of_the_models_fixed_size(tmp_path: Path) -> None:
    np.savez(tmp_path / "all.npz", image=np.concatenate(images(6)))
    spec = InputSpec(name="image", dtype="float32", shape=(3, 2, 4))
    assert_same(
        open_samples(tmp_path / "all.npz", [spec]), [np.concatenate(images(6)[:3]), np.concatenate(images(6)[3:])]
    )


def test_one_npy_for_a_model_of_one_input(tmp_path: Path) -> None:
    np.save(tmp_path / "all.npy", np.stack(images(4)))
    assert_same(open_samples(tmp_path / "all.npy", [IMAGE]), images(4))


def test_scalar_input_keeps_rank_zero(tmp_path: Path) -> None:
    np.savez(tmp_path / "all.npz", step=np.array([1.5, 2.5], np.float32))
    samples = open_samples(tmp_path / "all.npz", [InputSpec(name="step", dtype="float32", shape=())])
    assert [(s["step"].shape, float(s["step"])) for s in samples] == [((), 1.5), ((), 2.5)]
    assert samples.shapes()["step"].max == ()
    assert len(samples.sha256()) == 64


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_large_npz_is_streamed(tmp_path: Path, save: Callable[..., None]) -> None:
    save(tmp_path / "all.npz", image=np.zeros((64, 1, 2, 32768), np.float32))  # 16 MiB, each sample 256 KiB
    samples = open_samples(tmp_path / "all.npz", [IMAGE])
    tracemalloc.start()
    try:
        assert sum(1 for _ in samples) == 64
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20  # a handful of samples and zip buffers; the whole array would be 16 MiB


def test_folder_reads_no_file_before_its_turn(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", images(1)[0])
    (tmp_path / "1.npy").write_bytes(b"damaged")
    reading = iter(open_samples(tmp_path, [IMAGE]))
    np.testing.assert_array_equal(next(reading)["image"], images(1)[0])
    with pytest.raises(DataError, match=r"1\.npy"):
        next(reading)


def test_function_is_called_afresh_and_drawn_one_at_a_time(tmp_path: Path) -> None:
    source = write_function(
        tmp_path,
        "def samples():\n"
        "    CALLS.append(1)\n"
        "    for i in range(3):\n"
        "        DRAWN.append(i)\n"
        "        yield {'image': np.full((1, 2, 4), i) + np.arange(4) / 8}",
    )
    samples = open_samples(source, [IMAGE])
    (module,) = (vars(m) for name, m in sys.modules.items() if name == f"calib_data_source_{Path(source).stem}")
    assert module["DRAWN"] == [0]  # which tells what a sample is
    next(iter(samples))
    assert module["DRAWN"] == [0, 0]
    assert_same(samples, images(3))
    assert module["DRAWN"][:5] == [0, 0, 0, 1, 2]
    assert samples.len_or_none() is None
    with pytest.raises(TypeError, match="not known"):
        len(samples)


def test_function_source_that_never_ends_works_with_a_limit(tmp_path: Path) -> None:
    body = "import itertools\ndef samples():\n    for i in itertools.count():\n"
    source = write_function(tmp_path, body + "        yield {'image': np.full((1, 2, 4), i) + np.arange(4) / 8}")
    assert_same(open_samples(source, [IMAGE], limit=3), images(3))
    assert_same(open_samples(source, [IMAGE], limit=3).shard(1, 2), images(3)[1:2])


def test_function_may_return_a_list_or_one_dict_and_import_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "calib_test_neighbour.py").write_text("SHAPE = (1, 2, 4)")
    body = "from calib_test_neighbour import SHAPE\ndef samples():\n    return "
    assert len(list(open_samples(write_function(tmp_path, body + "{'image': np.ones(SHAPE)}"), [IMAGE]))) == 1
    assert len(list(open_samples(write_function(tmp_path, body + "[{'image': np.ones(SHAPE)}] * 2"), [IMAGE]))) == 2


@pytest.mark.parametrize("form", ["folder", "npz", "function", "random"])
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_shards_part_the_samples(tmp_path: Path, form: str, n: int) -> None:
    if form == "folder":
        for i, image in enumerate(images(5)):
            np.save(tmp_path / f"{i}.npy", image)
        samples = open_samples(tmp_path, [IMAGE])
    elif form == "npz":
        np.savez(tmp_path / "all.npz", image=np.stack(images(5)))
        samples = open_samples(tmp_path / "all.npz", [IMAGE])
    elif form == "function":
        body = "def samples():\n    return [{'image': np.full((1, 2, 4), i)*.5} for i in range(5)]"
        samples = open_samples(write_function(tmp_path, body), [IMAGE])
    else:
        samples = random_samples([IMAGE], 5, seed=1, sizes={("image", 2): 4})
    whole = [sample["image"] for sample in samples]
    for i in range(n):
        shard = [sample["image"] for sample in samples.shard(i, n)]
        np.testing.assert_array_equal(np.array(shard), np.array(whole[i::n]))
        assert samples.shard(i, n).len_or_none() in (None, len(shard))
    nested = [sample["image"] for sample in samples.shard(1, 2).shard(0, 2)]
    np.testing.assert_array_equal(nested, whole[1::2][0::2])


@pytest.mark.parametrize(("i", "n"), [(-1, 2), (2, 2), (0, 0)])
def test_a_shard_that_does_not_exist(i: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"Shard {i} of {n}"):
        random_samples([IMAGE], 2, seed=0, sizes={("image", 2): 4}).shard(i, n)


def test_shapes_over_samples_read_headers_only(tmp_path: Path) -> None:
    for i, size in enumerate([4, 9, 4, 6]):
        np.save(tmp_path / f"{i}.npy", np.full((1, 2, size), np.nan, np.float32))  # NaN: reading values would fail
    shapes = open_samples(tmp_path, [IMAGE]).shapes()["image"]
    assert (shapes.min, shapes.opt, shapes.max) == ((1, 2, 4), (1, 2, 4), (1, 2, 9))


def test_shapes_of_equally_common_sizes_do_not_depend_on_order(tmp_path: Path) -> None:
    for order in itertools.permutations([4, 6, 9]):
        body = f"def samples():\n    return [{{'image': np.zeros((1, 2, s))}} for s in {order}]"
        assert open_samples(write_function(tmp_path, body), [IMAGE]).shapes()["image"].opt == (1, 2, 9)


def test_a_sample_may_be_empty_along_dynamic_axes_and_usual_shapes_fit_each_other(tmp_path: Path) -> None:
    """A decoder: three prompts with an empty cache, then steps with caches of other lengths."""
    specs = [
        InputSpec(name="ids", dtype="int64", shape=("b", "t")),
        InputSpec(name="past", dtype="float32", shape=("b", "p")),
    ]
    for index, (past, new) in enumerate(((0, 7), (0, 7), (0, 7), (8, 1), (9, 1), (10, 1), (11, 1))):
        arrays = {"ids": np.ones((1, new), np.int64), "past": np.ones((1, past), np.float32)}
        np.savez(tmp_path / f"{index}.npz", **arrays)  # type: ignore[arg-type]
    samples = open_samples(tmp_path, specs)
    assert [sample["past"].shape for sample in samples][:2] == [(1, 0), (1, 0)]
    shapes = samples.shapes()
    assert (shapes["past"].min, shapes["past"].opt, shapes["past"].max) == ((1, 0), (1, 0), (1, 11))
    assert (shapes["ids"].min, shapes["ids"].opt, shapes["ids"].max) == ((1, 1), (1, 7), (1, 7))


def test_shapes_of_a_stacked_file_are_those_of_its_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "all.npz", image=np.zeros((5, 2, 4)), mask=np.zeros((5, 1, 3), np.int64))
    shapes = open_samples(tmp_path / "all.npz", [IMAGE, MASK]).shapes()
    assert (shapes["image"].opt, shapes["mask"].opt) == ((1, 2, 4), (1, 3))


def test_sha256_ignores_names_order_storage_and_rounding_free_dtype(tmp_path: Path) -> None:
    forward, backward = tmp_path / "forward", tmp_path / "backward"
    forward.mkdir()
    backward.mkdir()
    for i, image in enumerate(images(4)):
        np.savez(forward / f"a{i}.npz", image=image)
        np.savez_compressed(backward / f"z{9 - i}.npz", image=image.astype(">f8"))  # eighths are exact in both dtypes
    np.savez(tmp_path / "all.npz", image=np.stack(images(4)))
    prints = {open_samples(path, [IMAGE]).sha256() for path in (forward, backward, tmp_path / "all.npz")}
    assert len(prints) == 1
    changed = np.stack(images(4))
    changed[2, 0, 1, 3] += 1 / 8
    np.savez(tmp_path / "all.npz", image=changed)
    assert open_samples(tmp_path / "all.npz", [IMAGE]).sha256() not in prints
    assert open_samples(forward, [IMAGE], limit=3).sha256() not in prints


def test_sha256_is_what_its_docstring_says_on_any_machine(tmp_path: Path) -> None:
    np.save(tmp_path / "all.npy", np.array([[2.0], [1.0]], np.float32))
    one, two = (hashlib.sha256(b"x\0float32\0(1,)\0" + values).digest() for values in (b"\0\0\x80\x3f", b"\0\0\0\x40"))
    expected = hashlib.sha256(b"".join(sorted([one, two]))).hexdigest()
    samples = open_samples(tmp_path / "all.npy", [InputSpec(name="x", dtype="float32", shape=(1,))])
    assert samples.sha256() == expected


def test_random_samples_are_reproducible_and_of_each_dtype() -> None:
    inputs = [
        InputSpec(name="x", dtype="float32", shape=("batch", "width", 1000)),
        InputSpec(name="ids", dtype="int64", shape=(None, 50)),
        InputSpec(name="on", dtype="bool", shape=(50,)),
    ]
    first, second = (random_samples(inputs, 3, seed=7, sizes={"width": 2}) for _ in range(2))
    assert first.sha256() == second.sha256() != random_samples(inputs, 3, seed=8, sizes={"width": 2}).sha256()
    x, ids, on = next(iter(first)).values()
    assert (x.shape, ids.shape, on.dtype) == ((1, 2, 1000), (1, 50), np.dtype("bool"))
    # 2000 draws: the mean has standard deviation 1/sqrt(2000) = 0.022, the deviation about 0.016; 5 of either
    assert abs(x.mean()) < 0.11 and abs(x.std() - 1) < 0.08
    assert len({sample["x"].tobytes() for sample in first}) == 3
    assert set(ids.ravel().tolist()) <= set(range(8))
    assert first.shapes()["x"].opt == (1, 2, 1000)
    assert next(iter(random_samples(inputs, 1, seed=0, sizes={("x", 1): 5, "batch": 2})))["x"].shape == (2, 5, 1000)
