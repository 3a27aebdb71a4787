"""Samples of what has an index, a length or neither: what a sample is, what is left out, and what never ends."""

from __future__ import annotations

import itertools
from collections import UserDict, namedtuple
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib_data import DataError, InputSpec, Stream, open_samples, reading
from calib_data.elements import Elements, limiting

IMAGE = InputSpec(name="image", dtype="float32", shape=("batch", 2, 3))
MASK = InputSpec(name="mask", dtype="int64", shape=("batch", 2))
FOUR = InputSpec(name="image", dtype="float32", shape=(4, 2, 3))
ITEMS = np.arange(60, dtype=np.float32).reshape(10, 2, 3)


class Dataset:
    """As torch's: an index, a length, and no end of its own."""

    def __init__(self, items: Sequence[Any] = ITEMS) -> None:
        self.items = items
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self.asked.append(index)
        return self.items[index % len(self.items)]  # never an IndexError


class Loader:
    """As torch's DataLoader over a data set with an index."""

    def __init__(self, dataset: Any, order: Sequence[Sequence[int]], batch_size: int = 4) -> None:
        self.dataset, self.batch_sampler, self.batch_size, self.sampler = dataset, order, batch_size, None

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def collate_fn(self, items: Sequence[Any]) -> Any:
        if isinstance(items[0], tuple):
            return tuple(np.stack(column) for column in zip(*items, strict=True))
        return np.stack(items)


def opened(thing: Any, *inputs: InputSpec, **hooks: Any) -> Elements:
    return Elements.open(Stream(thing, **hooks), inputs or (IMAGE,), "these")


def arrays(source: Elements, indices: range = range(100)) -> list[dict[str, Any]]:
    return [dict(sample.arrays) for sample in source.read(indices)]


def rows(source: Elements) -> np.ndarray:
    return np.concatenate([sample["image"] for sample in arrays(source)])


def test_a_data_set_without_an_end_is_read_by_its_length_and_only_where_asked() -> None:
    data = Dataset()
    source = opened(data)
    assert source.count == 10
    data.asked.clear()
    (found,) = arrays(source, range(7, 8))
    np.testing.assert_array_equal(found["image"], ITEMS[7:8])  # with the batch axis that the model has
    assert data.asked == [7]
    np.testing.assert_array_equal(rows(source), ITEMS)


@pytest.mark.parametrize("batch", [1, 3, 4, 10])
def test_batches_of_a_loader_are_cut_where_the_batch_is_open(batch: int) -> None:
    order = [list(range(i, min(i + batch, 10))) for i in range(0, 10, batch)]
    source = opened(Loader(Dataset(), order, batch))
    assert source.count == 10 and source.left_out == ""
    np.testing.assert_array_equal(rows(source), ITEMS)
    assert {a["image"].shape[0] for a in arrays(source)} == {1}


@pytest.mark.parametrize("thing", [Dataset(), Loader(Dataset(), [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]], 3)])
def test_items_and_other_batches_are_joined_to_the_batch_that_the_model_fixes(thing: Any) -> None:
    source = opened(thing, FOUR)
    assert source.count == 2 and "last 2 rows" in source.left_out
    assert [a["image"].shape for a in arrays(source)] == [(4, 2, 3)] * 2
    np.testing.assert_array_equal(rows(source), ITEMS[:8])


def test_larger_arrays_in_a_list_are_cut_and_others_kept() -> None:
    assert [a["image"].shape for a in arrays(opened([{"image": ITEMS[:8]}], FOUR))] == [(4, 2, 3)] * 2
    assert [a["image"].shape for a in arrays(opened([{"image": ITEMS[:8]}]))] == [(8, 2, 3)]
    stacked = opened([{"image": ITEMS[:8].reshape(2, 4, 2, 3)}], FOUR)
    assert [a["image"].shape for a in arrays(stacked)] == [(4, 2, 3)] * 2


def test_the_order_of_a_shuffled_loader_is_drawn_once() -> None:
    class Shuffled:
        def __iter__(self) -> Iterator[list[int]]:
            return iter(np.random.default_rng().permutation(10)[:, None].tolist())

        def __len__(self) -> int:
            return 10

    source = opened(Loader(Dataset(), Shuffled(), 1))  # type: ignore[arg-type]
    np.testing.assert_array_equal(rows(source), rows(source))


Named = namedtuple("Named", "label mask image")


@dataclass
class Fields:
    image: Any
    mask: Any
    extra: int = 0


@pytest.mark.parametrize(
    ("element", "said"),
    [
        ((ITEMS[:1], [[1, 0]]), ""),
        ((ITEMS[:1], [[1, 0]], 3), "value 3"),
        ([ITEMS[:1], [[1, 0]], 3, 4], "values 3 to 4"),
        (((ITEMS[:1], [[1, 0]]), 3), "value 2"),
        (({"image": ITEMS[:1], "mask": [[1, 0]], "id": 5}, 3), "'id'"),
        ({"image": ITEMS[:1], "mask": [[1, 0]], "label": 3}, "'label'"),
        (UserDict(image=ITEMS[:1], mask=[[1, 0]]), ""),
        (Named(label=3, mask=[[1, 0]], image=ITEMS[:1]), "'label'"),
        (Fields(image=ITEMS[:1], mask=[[1, 0]]), "'extra'"),
    ],
)
def test_values_are_found_by_name_or_position_and_the_others_are_said(element: Any, said: str) -> None:
    source = opened([element], IMAGE, MASK)
    (found,) = arrays(source)
    assert list(found) == ["image", "mask"] and found["mask"].tolist() == [[1, 0]]
    assert said in source.left_out and bool(said) == bool(source.left_out)


def test_hooks_make_elements_what_the_model_gets() -> None:
    raw = [{"pixels": (255 * np.ones((2, 3), np.uint8)), "n": i} for i in range(5)]
    source = opened(raw, preprocess=lambda e: (np.float32(e["pixels"] / 255 * e["n"]),), limit=3)
    assert source.count == 3 and [float(a["image"].max()) for a in arrays(source)] == [0, 1, 2]
    padded = opened([[1, 2], [3], [4], [5]], InputSpec(name="ids", dtype="int64", shape=(2, "n")), collate=pad)
    assert [a["ids"].tolist() for a in arrays(padded)] == [[[1, 2], [3, 0]], [[4], [5]]]


def pad(items: list[list[int]]) -> np.ndarray:
    longest = max(map(len, items))
    return np.array([item + [0] * (longest - len(item)) for item in items])


def test_what_never_ends_is_stopped_and_a_limit_lets_it_be_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Endless:
        def __iter__(self) -> Iterator[dict[str, Any]]:
            return ({"image": ITEMS[:1] + i} for i in itertools.count())

    class NoLength:
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"image": ITEMS[:1] + index}

    monkeypatch.setattr(reading, "MOST", 20)
    for thing in (Endless(), NoLength()):
        with pytest.raises(DataError, match="may be endless"):
            arrays(opened(thing))
        assert len(arrays(opened(thing, limit=5))) == 5
    with pytest.raises(DataError, match=r"read only once.*limit=64"):
        opened(iter(Endless()))
    held = opened(iter(Endless()), limit=3)
    assert held.count == 3 and len(arrays(held)) == len(arrays(held)) == 3
    with pytest.raises(DataError, match="Raise the limit"):
        Stream([], limit=0)
    body = "import itertools, numpy as np\ndef f():\n    for i in itertools.count():\n"
    (tmp_path / "source.py").write_text(body + "        yield {'image': np.ones((1, 2, 3)) * i}\n")
    with pytest.raises(DataError, match="--max-samples N"):
        list(open_samples(f"{tmp_path / 'source.py'}:f", [IMAGE]))
    with limiting(7):
        assert len(list(open_samples(f"{tmp_path / 'source.py'}:f", [IMAGE]))) == 7


def test_random_augmentation_is_refused() -> None:
    class Augmented(Dataset):
        def __getitem__(self, index: int) -> Any:
            return ITEMS[index] + np.random.default_rng().normal(size=(2, 3))

    with pytest.raises(DataError, match=r"another sample 0 each time.*transforms of evaluation"):
        opened(Augmented())


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        ({"train": Dataset(), "test": Dataset()}, "several data sets: train, test"),
        ("volumes", "is text"),
        (3, "is a int"),
        ([(ITEMS[0],)], "1 values and the model 2 inputs: image, mask"),
        ([ITEMS[0]], "a dict of input name -> array, or a tuple"),
        ([{"image": object(), "mask": [[1, 0]]}], "."),
    ],
)
def test_what_is_no_sample_is_named(thing: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        for sample in open_or_read(thing):
            assert sample["image"].dtype.kind == "f", "an object is no array."


def open_or_read(thing: Any) -> Iterator[dict[str, Any]]:
    from calib_data.validation import check_sample

    for where, found in opened(thing, IMAGE, MASK).read(range(1)):
        yield check_sample(found, (IMAGE, MASK), where)


def test_a_module_is_found_by_its_name_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "qdq_test_package"
    folder.mkdir()
    (folder / "data.py").write_text(
        "import numpy as np\nITEMS = [{'image': np.ones((1, 2, 3), 'f4')}] * 3\n"
        "def twice(): return ITEMS[:2]\ndef broken(): raise KeyError('mine')\n"
    )
    (folder / "needs.py").write_text("import package_that_nobody_has\n")
    assert len(open_samples("qdq_test_package.data:ITEMS", [IMAGE])) == 3
    assert len(open_samples("qdq_test_package.data:twice", [IMAGE])) == 2
    for source, words in (
        ("data:broken", "KeyError.*line 4"),
        ("data:none", "No 'none' in .* it has np, ITEMS, twice, broken"),
        ("needs:f", "needs package_that_nobody_has.*pip install"),
        ("nowhere:f", "No module 'qdq_test_package.nowhere'"),
    ):
        with pytest.raises(DataError, match=words):
            list(open_samples(f"qdq_test_package.{source}", [IMAGE]))
