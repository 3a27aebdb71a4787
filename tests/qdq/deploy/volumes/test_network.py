"""A session or a runner of an engine as a function of patches, whatever axes it has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from clinic import Array, classes_of, image, save, thresholds

from calib_data import InputSpec, open_samples
from calib_data.volumes.spec import volume_spec
from engines.core.onnx_runtime import run, session
from qdq.build.keys.segmentation import Segmentation, WholeVolumes
from qdq.build.keys.window import Window
from qdq.core.errors import InputError
from qdq.deploy.volumes.network import Layout, Network, Reader, inferring
from qdq.deploy.volumes.segment import Opened, segment


class Engine:
    """A runner that uses the memory of its outputs again, as one of an engine does."""

    def __init__(self, model: Any) -> None:
        self._session, self._held = session(model), np.zeros(0, np.float32)
        self.active = 0

    def __enter__(self) -> Engine:
        self.active += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.active -= 1

    def infer(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        assert self.active == 1
        (found,) = next(run(self._session, [feed])).values()
        if self._held.shape != found.shape:
            self._held = np.empty_like(found)
        self._held[...] = found
        return {"logits": self._held}


@pytest.mark.parametrize("graph", [None, thresholds(1, 2)], ids=["alone", "its model beside it"])
def test_an_engine_segments_as_its_model_does(tmp_path: Path, graph: Any) -> None:
    import nibabel

    picture = image(0)
    spec = InputSpec(name="image", dtype="float32", shape=(1, 1, None, None, None))
    samples = open_samples(save(tmp_path / "d", [picture]), [spec], volume=volume_spec({"orientation": "LPI"}))
    engine = Opened(path=tmp_path, model=Engine(thresholds(1, 2)), inputs=(spec,), graph=graph)
    asked = Segmentation(activation="auto" if graph else "softmax")
    whole = WholeVolumes(window=Window(patch=(8, 8, 8), mirror=(0, 1)), segmentation=asked)
    made = segment(engine, samples, whole, tmp_path / "out")
    path = next(tmp_path / "out" / name for name in made.files if name.endswith(".nii.gz"))
    np.testing.assert_array_equal(np.asarray(nibabel.load(path).dataobj), classes_of(picture, 1, 2))
    assert engine.model.active == 0


@pytest.mark.parametrize(
    ("axes", "shape", "sizes", "expected"),
    [
        ("cxyz", (1, 2, None, None, None), (4, 5, 6), (1, 2, 4, 5, 6)),
        ("xyzc", (None, None, None, None, 2), (4, 5, 6), (1, 4, 5, 6, 2)),
        ("cxyz", (2, None, None, None), (4, 5, 6), (2, 4, 5, 6)),
        ("cxyz", (None, 2, None, None), (1, 5, 6), (1, 2, 5, 6)),
        ("cxyz", (None, 2, None, None), (4, 1, 6), (1, 2, 4, 6)),
        ("cxy", (None, 2, None, None), (4, 5, 1), (1, 2, 4, 5)),
    ],
)
def test_patches_in_the_axes_of_the_input(
    axes: str, shape: tuple[int | None, ...], sizes: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    spec = InputSpec(name="x", dtype="float16", shape=shape)
    layout = Layout.of(spec, axes, sizes)
    seen: list[Array] = []

    def infer(feed: Mapping[str, Array]) -> Mapping[str, Array]:
        seen.append(feed["x"])
        return {"y": feed["x"]}

    rank = len(expected)
    where = (layout.axes.index("c") + (layout.batch != 0)) % rank
    reader = Reader(graph=None, output="y", asked=Segmentation(activation="sigmoid"), class_axis=where)
    patches = np.random.default_rng(0).uniform(size=(1, 2, *sizes)).astype(np.float16).astype(np.float32)
    found = Network(infer=infer, spec=spec, layout=layout, reader=reader)(patches)
    assert seen[0].shape == expected and seen[0].dtype == np.float16
    np.testing.assert_array_equal(found, patches)


def test_a_batch_that_is_fixed_is_filled_up() -> None:
    spec = InputSpec(name="x", dtype="float32", shape=(4, 1, None, None, None))
    sizes = []

    def infer(feed: Mapping[str, Array]) -> Mapping[str, Array]:
        sizes.append(len(feed["x"]))
        return {"y": feed["x"]}

    reader = Reader(graph=None, output="", asked=Segmentation(activation="sigmoid"))
    network = Network(infer=infer, spec=spec, layout=Layout.of(spec, "cxyz", (4, 4, 4)), reader=reader)
    patches = np.random.default_rng(0).normal(size=(6, 1, 4, 4, 4)).astype(np.float32)
    np.testing.assert_array_equal(network(patches), patches)
    assert sizes == [4, 4]


def test_labels_cannot_be_blended() -> None:
    reader = Reader(graph=None, output="y", asked=Segmentation())
    with pytest.raises(InputError, match="whose windows can be blended"):
        reader.channels({"x": np.zeros((1, 1, 4, 4, 4))}, np.zeros((1, 4, 4, 4), np.int64))


def test_another_rank_is_refused() -> None:
    with pytest.raises(InputError, match="has 2 axes, and images have cxyz"):
        Layout.of(InputSpec(name="x", dtype="float32", shape=(1, 10)), "cxyz", (4, 4, 4))


def test_a_failed_run_of_an_engine_is_said() -> None:
    from engines.core import onnx_runtime as ort
    from engines.core.errors import EngineError

    def fail(_: object) -> None:
        raise ort.failures()[0]("no memory")

    with pytest.raises(EngineError, match="Running the engine on a patch failed: no memory"):
        inferring(SimpleNamespace(infer=fail))({})
