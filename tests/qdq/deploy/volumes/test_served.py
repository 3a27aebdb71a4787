"""`engines.open(...).segment`: the bytes of `qdq segment`, from many threads, whatever came before."""

from __future__ import annotations

import gzip
import json
import logging
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from clinic import AFFINE, classes_of, image, save, thresholds
from fake_gpu import FakeCuda, FakeEngine, FakeKernel, fake_runtime, install
from image_files import write_nifti, write_series

import engines
from calib_data.validation import DataError
from calib_data.volumes.case import told
from engines.backends.compiler import ShapeRange
from engines.backends.doctor import gpus
from engines.core import arithmetic, onnx_runtime as ort
from engines.core.documents import replace
from engines.core.errors import EngineError, OutOfMemoryError
from engines.runtime import predictor
from engines.runtime.arrays import TensorSpec
from qdq.cli.main import main
from qdq.core.errors import InputError
from qdq.deploy.volumes.inference import InferenceFile
from qdq.deploy.volumes.served import Served

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")

VOLUME = "volume: {orientation: RAS, spacing_mm: [1.25, 1.25, 1.25], grid: edges, patch: [8, 8, 8]}"
WHOLE = """
window: {patch: [8, 8, 8], overlap: 0.25, mirror: [0]}
segmentation: {structures: {background: 0, grey: 1, white: 2}, resample: logits}
"""


def qdq(*words: object) -> str:
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, f"{done.output}{done.exception!r}"
    return done.output


def deployed(place: Path, *, volume: str = VOLUME, whole: str = WHOLE, sigmoid: bool = False) -> Path:
    """A model deployed on two images."""
    onnx.save(thresholds(1, 2, batch="n", sigmoid=sigmoid), place / "float.onnx")
    (place / "recipe.yaml").write_text(f"{volume}\n{whole}\ntune: off\n")
    data = save(place / "data", [image(n) for n in range(2)])
    words = ("--data", data, "--recipe", place / "recipe.yaml", "--out", place / "out")
    qdq("deploy", place / "float.onnx", *words)
    return place / "out"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    deployed(folder)
    return folder


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor, "gpus", list)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_a_file_gives_the_bytes_of_the_command(tmp_path: Path, sigmoid: bool) -> None:
    whole = "window: {patch: [8, 8, 8]}" if sigmoid else WHOLE
    out = deployed(tmp_path, whole=whole, sigmoid=sigmoid)
    name = json.loads((out / "report.json").read_text())["model_file"]
    for n in range(3):
        one = tmp_path / f"one{n}"
        write_nifti(one / "a.nii.gz", image(n, (20, 17, 12 + n)), AFFINE)
        words = ("--data", one, "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / f"labels{n}")
        qdq("segment", out / name, *words)
        (expected,) = (tmp_path / f"labels{n}").glob("case-*.nii.gz")
        with engines.open(out) as model:
            found = model.segment(one / "a.nii.gz")
            array = model.segment(image(n, (20, 17, 12 + n)), AFFINE)
        assert found.to_bytes() == expected.read_bytes() == array.to_bytes()
        found.save(tmp_path / "saved.nii")
        plain = nib.load(tmp_path / "saved.nii")
        np.testing.assert_array_equal(np.asarray(plain.dataobj), found.array)
        np.testing.assert_array_equal(plain.affine, found.affine)
        assert found.names == json.loads((tmp_path / f"labels{n}" / "labels.json").read_text())
    with pytest.raises(InputError, match=r"must end in \.nii or \.nii\.gz"):
        found.save(tmp_path / "x.txt")
    assert not (tmp_path / "x.txt").exists()


def test_a_dicom_folder_is_one_image(place: Path, tmp_path: Path) -> None:
    """As the command has it; an array with the series' affine gives the same."""
    pytest.importorskip("pydicom")
    voxels = image(3).round().astype(np.int16)
    write_series(tmp_path / "DOE^JOHN" / "series", voxels, AFFINE)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(VOLUME.replace("}", ", intensity: {mean: 0, std: 1}}") + WHOLE)
    out = deployed(tmp_path, volume=recipe.read_text().partition("\n")[0])
    name = json.loads((out / "report.json").read_text())["model_file"]
    qdq("segment", out / name, "--data", tmp_path / "DOE^JOHN", "--recipe", recipe, "-o", tmp_path / "labels")
    (expected,) = (tmp_path / "labels").glob("case-*.nii.gz")
    with engines.open(out) as model:
        found = model.segment(tmp_path / "DOE^JOHN")
    assert found.to_bytes() == expected.read_bytes() and len(np.unique(found.array)) == 3
    assert b"DOE" not in gzip.decompress(found.to_bytes())


def test_an_engine_segments_on_a_gpu_in_batches_of_its_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A real engine and its papers on a fake GPU, which runs out of memory once: the bytes of the Q/DQ model."""
    shapes = "\nshape: [image:1x1x8x8x8:4x1x8x8x8:6x1x8x8x8]"
    out = deployed(tmp_path, whole=WHOLE + shapes)
    with engines.open(out, on="cpu") as model:
        expected = model.segment(image(0), AFFINE).to_bytes()
        name = model.name
    runs = arithmetic.session(out / name)
    profile = tuple((n, 1, 8, 8, 8) for n in (1, 4, 6))
    batches: list[int] = []

    def compute(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        batches.append(len(arrays["image"]))
        return next(ort.run(runs, [arrays]))

    loaded = FakeEngine(
        [FakeKernel("all", lambda _: 1.0)],
        tensors={"image": ((-1, 1, 8, 8, 8), "FLOAT", True), "logits": ((-1, 3, 8, 8, 8), "FLOAT", False)},
        profiles=[{"image": profile}],
        sizes=lambda given: {"logits": (given["image"][0], 3, 8, 8, 8)} if given else {},
        compute=compute,
    )
    cuda = FakeCuda()
    install(monkeypatch, cuda)
    monkeypatch.setattr(predictor, "gpus", gpus)
    runtime = fake_runtime(cuda, {(out / "float.engine").read_bytes(): loaded})
    runtime.__version__ = json.loads((out / "float.engine.json").read_text())["version"]
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", runtime)
    caplog.set_level(logging.WARNING, "engines")
    with engines.open(out) as model:
        assert model.name == "float.engine" and model.describe()["segments"]["windows_per_run"] == 6
        model.warm_up()
        assert model.segment(image(0), AFFINE).to_bytes() == expected and max(batches) == 6
    cuda.limit_bytes, batches[:] = 4 * 512 * 4 * 4, []  # image and logits of four windows
    with engines.open(out) as model, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: model.segment(image(0), AFFINE).to_bytes(), range(8)))
        assert found == [expected] * 8 and max(batches) == 2
    assert [r.getMessage() for r in caplog.records] == [
        "A run of 5 windows needs more memory than there is: 2 at a time from now on."
    ]
    assert not cuda.memory


def test_what_came_before_changes_nothing_from_eight_threads(place: Path) -> None:
    pictures = [image(n, (20 - n, 17, 12 + n)) for n in range(6)]
    with engines.open(place / "out") as model:
        alone = [model.segment(picture, AFFINE).to_bytes() for picture in pictures]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda n: model.segment(pictures[n % 6], AFFINE).to_bytes(), range(48)))
    assert found == alone * 8


def test_a_model_of_any_batch_takes_as_many_windows_as_are_asked_for(place: Path) -> None:
    """The bytes are those of one window at a time."""
    batches = []
    with engines.open(place / "out") as model:
        expected = model.segment(image(0), AFFINE).to_bytes()
        served = model._segmenting()
        real = model.run
        model.run = lambda sample: batches.append(len(sample["image"])) or real(sample)  # type: ignore[func-returns-value, method-assign]
        served.batch = 6
        assert model.segment(image(0), AFFINE).to_bytes() == expected
    assert max(batches) == 6


class Fake:
    """A GPU with room for some windows."""

    def __init__(self, place: Path, room: int, *, ranges: tuple[ShapeRange, ...] = ()) -> None:
        self.model = engines.open(place / "out")
        self.inputs = tuple(replace(spec, ranges=ranges) for spec in self.model.inputs)
        self.outputs, self.sha256, self.graph, self.room = self.model.outputs, self.model.sha256, self.model.graph, room
        self.runs: list[int] = []

    def run(self, sample: Any) -> Any:
        self.runs.append(len(sample["image"]))
        if len(sample["image"]) > self.room:
            raise OutOfMemoryError("The CUDA driver refuses cuMemAlloc_v2: out of memory (error 2).")
        return self.model.run(sample)


RANGE = (ShapeRange(min=(1, 1, 8, 8, 8), opt=(1, 1, 8, 8, 8), max=(16, 1, 8, 8, 8)),)


def test_out_of_memory_is_handled_by_a_smaller_batch_and_said_once(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with engines.open(place / "out") as model:
        expected = model.segment(image(0), AFFINE).to_bytes()
    fake = Fake(place, 3, ranges=RANGE)
    served = Served(fake, (place / "out/inference.json").read_bytes())
    assert served.batch == 16  # all that the profile takes
    caplog.set_level(logging.WARNING, "engines")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: served(image(0), AFFINE).to_bytes(), range(8)))
    assert found == [expected] * 8 and served.batch == 2 and max(fake.runs) == 8  # in a row of them
    assert [r.getMessage() for r in caplog.records] == [
        "A run of 8 windows needs more memory than there is: 4 at a time from now on.",
        "A run of 4 windows needs more memory than there is: 2 at a time from now on.",
    ]
    fake.room = 0
    with pytest.raises(EngineError, match="out of memory"):
        served(image(0), AFFINE)


def test_the_outputs_of_a_batch_fit_the_memory(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (place / "out/inference.json").read_bytes()
    monkeypatch.setattr("qdq.deploy.volumes.served.default_bytes", lambda: 4 * 8 * 16 * 512 * 3)
    assert Served(Fake(place, 99, ranges=RANGE), content).batch == 3


def test_warm_up_runs_one_window(place: Path) -> None:
    with engines.open(place / "out") as model:
        real, seen = model.run, []
        model.run = lambda sample: seen.append(sample["image"].shape) or real(sample)  # type: ignore[func-returns-value, method-assign]
        assert model.warm_up() > 0 and seen == [(1, 1, 8, 8, 8)]
        known = model._segmenting()._known  # type: ignore[attr-defined]
        assert len(known) == 1
        model.segment(image(0), AFFINE)
        assert len(known) == 1  # of a large graph the slow part


def test_what_is_no_single_image_is_refused(place: Path, tmp_path: Path) -> None:
    bad = image(0)
    bad[2, 2, 2] = np.inf
    np.savez(tmp_path / "a.npz", image=image(0))
    (tmp_path / "cut.nii.gz").write_bytes(b"\x1f\x8b garbage")
    cases: list[tuple[Callable[[Any], Any], type[Exception], str]] = [
        (lambda m: m.segment(place / "data"), InputError, "takes one image, and 2 lie there"),
        (lambda m: m.segment(tmp_path / "a.npz"), InputError, "arrays lie there"),
        (lambda m: m.segment(tmp_path / "none.nii.gz"), DataError, "No such file"),
        (lambda m: m.segment(tmp_path / "cut.nii.gz"), DataError, "Cannot use the image: "),
        (lambda m: m.segment(image(0)), InputError, "needs the affine of an array"),
        (lambda m: m.segment(image(0), np.eye(3)), InputError, r"as \(4, 4\) finite numbers, .*the shape \(3, 3\)"),
        (lambda m: m.segment(image(0), np.full((4, 4), np.nan)), InputError, "finite numbers"),
        (lambda m: m.segment(image(0), np.zeros((4, 4))), InputError, "whose axes have a length"),
        (lambda m: m.segment(image(0), "RAS"), InputError, "got str"),
        (lambda m: m.segment(image(0)[0], AFFINE), InputError, r"float32 \(17, 12\)"),
        (lambda m: m.segment("x", AFFINE), InputError, "belongs to an array"),
        (lambda m: m.segment(bad, AFFINE), DataError, "1 of its 4080 voxels are NaN or infinite"),
        (lambda m: m.segment(np.stack([image(0)] * 2), AFFINE), InputError, "has 2 channels"),
    ]
    with engines.open(place / "out") as model:
        for call, kind, said in cases:
            with pytest.raises(kind, match=said) as caught:
                call(model)
            assert "doe" not in str(caught.value)
        assert model.segment(image(0), AFFINE).array.shape == image(0).shape  # and it still works


def test_what_the_recipe_left_open_must_be_as_it_was(tmp_path: Path) -> None:
    out = deployed(tmp_path, volume="volume: {patch: [8, 8, 8]}", whole="window: {patch: [8, 8, 8]}")
    file = InferenceFile.from_json((out / "inference.json").read_bytes())
    assert file.orientation == "LAS" and file.spacing_mm == (1.0, 1.5, 2.0)
    turned = AFFINE @ np.diag([-1.0, 1, 1, 1])
    with engines.open(out) as model:
        np.testing.assert_array_equal(model.segment(image(0), AFFINE).array, classes_of(image(0), 1, 2))
        with pytest.raises(InputError, match=r"The orientation of the image is RAS, and all images .* are LAS"):
            model.segment(image(0), turned)
        with pytest.raises(InputError, match="The voxels of the image are 2 x 3 x 4 mm"):
            model.segment(image(0), AFFINE @ np.diag([2.0, 2, 2, 1]))


def test_inference_json_of_another_model_is_refused(place: Path) -> None:
    content = (place / "out/inference.json").read_bytes()
    other = replace(InferenceFile.from_json(content), model="1" * 64).to_json().encode()
    fake = Fake(place, 1)
    with pytest.raises(InputError, match="of another model: it names the sha256 111111111111…"):
        Served(fake, other)
    with pytest.raises(InputError, match=r"qdq\.inference/9"):
        Served(fake, content.replace(b"qdq.inference/1", b"qdq.inference/9"))
    fake.inputs = (*fake.inputs, TensorSpec(name="more", dtype="float32", shape=(1,)))
    with pytest.raises(InputError, match="has 2 inputs"):
        Served(fake, content)


def test_deploy_of_arrays_says_nothing_of_images(tmp_path: Path) -> None:
    out = deployed(tmp_path)
    np.savez(tmp_path / "a.npz", image=image(0)[None, None])
    qdq("deploy", tmp_path / "float.onnx", "--data", tmp_path / "a.npz", "--tune", "off", "--out", out)
    assert not (out / "inference.json").exists()  # what an earlier run left is gone
    with engines.open(out) as model, pytest.raises(EngineError, match=r"no inference\.json beside it"):
        model.segment(image(0), AFFINE)


def test_libraries_are_quiet_as_long_as_any_thread_reads() -> None:
    before, level = list(warnings.filters), logging.getLogger("pydicom").level
    with told("a"):
        inner = told("b")
        inner.__enter__()
    assert logging.getLogger("pydicom").level > logging.CRITICAL and warnings.filters != before
    inner.__exit__(None, None, None)
    assert logging.getLogger("pydicom").level == level and list(warnings.filters) == before
