"""PyTorch's and Hugging Face's data sets give the calibration table of .npz files of the same arrays, byte for byte."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install 'qdq[torch]'")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")
pytestmark = pytest.mark.torch

import torch  # noqa: E402
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset  # noqa: E402

from calib_data import Stream, open_samples  # noqa: E402
from qdq import Model, collect, quantize  # noqa: E402
from qdq.measure.inference.inputs import as_samples, input_specs  # noqa: E402
from qdq.plan import placement  # noqa: E402
from qdq.plan.settings import Settings  # noqa: E402

COUNT = 10
X = np.random.default_rng(0).normal(size=(COUNT, 4, 6, 6)).astype(np.float32)
TENSOR, LABELS = torch.from_numpy(X), torch.arange(COUNT)


class Items(Dataset[Any]):
    """A map-style data set as users write it: an image and its class, and no IndexError at the end."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return TENSOR[index % COUNT].clone().requires_grad_(), index


class Rows(IterableDataset[Any]):
    """A stream with a length."""

    def __len__(self) -> int:
        return COUNT

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return ({"x": TENSOR[i : i + 1], "label": LABELS[i]} for i in range(COUNT))


def hugging_face() -> Any:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")
    return datasets.Dataset.from_dict({"x": X.tolist(), "label": list(range(COUNT))})


SOURCES = {
    "loader": lambda: DataLoader(TensorDataset(TENSOR, LABELS), batch_size=4),
    "shuffled": lambda: DataLoader(TensorDataset(TENSOR, LABELS), batch_size=3, shuffle=True),
    "unbatched": lambda: DataLoader(TensorDataset(TENSOR, LABELS), batch_size=None),
    "workers": lambda: DataLoader(Items(), batch_size=5, num_workers=2),
    "items": Items,
    "tensors": lambda: TensorDataset(TENSOR),
    "stream": Rows,
    "loader of a stream": lambda: DataLoader(Rows(), batch_size=None),
    "hugging face": hugging_face,
    "hugging face, torch": lambda: hugging_face().with_format("torch"),
    "array": lambda: X,
    "tensor": lambda: TENSOR,
    "double": lambda: TENSOR.double(),
}


def table(model: Model, samples: Any) -> str:
    plan = placement.plan(model, Settings())
    return collect(model, plan, samples).to_json()


@pytest.mark.filterwarnings("ignore:Not used of each sample")
@pytest.mark.parametrize("open_batch", [True, False])
def test_the_table_is_that_of_npz_files(open_batch: bool, tmp_path: Path) -> None:
    model = graphs.conv(batch="n") if open_batch else graphs.conv()
    for i, image in enumerate(X):
        np.savez(tmp_path / f"{i:03}.npz", x=image[None])
    wanted = table(model, open_samples(tmp_path, input_specs(model)))
    for name, make in SOURCES.items():
        if name.startswith("hugging") and not _has_datasets():
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert table(model, make()) == wanted, name


def _has_datasets() -> bool:
    from importlib.util import find_spec

    return find_spec("datasets") is not None


def test_labels_are_dropped_with_a_warning_and_a_map_style_data_set_ends() -> None:
    model = graphs.conv()
    with pytest.warns(UserWarning, match="value 2, behind the model's inputs"):
        samples = as_samples(Items(), model)
    assert len(samples) == COUNT and samples.shapes()["x"].opt == (1, 4, 6, 6)
    with pytest.warns(UserWarning, match="'label'"):
        as_samples(Rows(), model)


def test_low_types_gradients_and_hooks() -> None:
    model = graphs.conv()
    low = TENSOR.bfloat16()
    found = [sample["x"] for sample in as_samples(TensorDataset(low), model)]
    np.testing.assert_array_equal(np.concatenate(found), low.float().numpy())
    sparse = as_samples([{"x": TENSOR[:1].to_sparse()}], model)
    np.testing.assert_array_equal(next(iter(sparse))["x"], X[:1])
    bytes_ = DataLoader(TensorDataset((TENSOR * 10).byte()), batch_size=2)
    halves = Stream(bytes_, limit=6, preprocess=lambda batch: batch[0].float() / 255)
    made = quantize(model, halves, settings=Settings(equalize="none"))
    assert made.table is not None and made.table.count == 6
