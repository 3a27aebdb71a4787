"""Each script of tools/export writes its network, checked against PyTorch, with samples; checkpoints and real data."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import sys
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest
from image_files import write_nifti
from places import ROOT

SMALL_VOLUME = "--patch 32 32 32 --classes 3"
SMALL_LANGUAGE = "--length 16 --vocab 60 --layers 1 --heads 2 --hidden 32"
SMALL = {  # of each script
    "unet": f"{SMALL_VOLUME} --widths 4 8",
    "segresnet": f"{SMALL_VOLUME} --width 8 --down 1 1 --up 1",
    "swinunetr": "--patch 64 32 32 --classes 2 --width 12 --depths 1 1 1 1",
    "unetr": f"{SMALL_VOLUME} --width 4 --hidden 24 --mlp 24 --heads 2",
    "attention_unet": f"{SMALL_VOLUME} --widths 4 8",
    "transunet": f"{SMALL_VOLUME} --widths 4 8 --hidden 16 --layers 1 --heads 2 --mlp 32",
    "plain_conv_unet": f"{SMALL_VOLUME} --widths 4 8 --convolutions 1",
    "residual_encoder_unet": f"{SMALL_VOLUME} --widths 4 8 --blocks 1 1",
    "dynunet": f"{SMALL_VOLUME} --widths 4 8 8",
    "resnet50": "--size 64 --classes 3 --model resnet18",
    "vit": "--size 32 --tile 16 --layers 1 --heads 2 --hidden 32 --mlp 32 --classes 3",
    "yolo": "--size 64",
    "bert": f"{SMALL_LANGUAGE} --mlp 64",
    "gpt2": SMALL_LANGUAGE,
    "llama": f"{SMALL_LANGUAGE} --groups 1 --mlp 64",
    "whisper_encoder": "--layers 1 --heads 2 --hidden 16 --mlp 32",
    "esm": "--length 16 --layers 1 --heads 2 --hidden 32",
    "ani_potential": "--widths 16 8",
    "chgnet_potential": "--crystals NaCl Si",
    "antiberty": "--no-open",
}
OPEN = ("chgnet_potential",)  # whose sizes are those of each sample
Run = Callable[..., int]


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    for folder in ("tools", "tools/export"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    yield importlib.import_module
    for name in ("common", "crystals", "forces", "md_stability", *SMALL):  # names that a library may have too
        sys.modules.pop(name, None)


@pytest.fixture
def run(tools: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a script as the command line does; skip where a library is not there."""

    def started(name: str, *words: str) -> int:
        script = ROOT / "tools" / "export" / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(script), *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
        if ended.value.code == 3:
            pytest.skip(capsys.readouterr().err.strip())
        return int(ended.value.code or 0)

    return started


torch_too = pytest.mark.torch


def test_every_script_has_small_sizes(tools: Callable[[str], ModuleType]) -> None:
    assert sorted(SMALL) == tools("bench_export").names()


@torch_too
@pytest.mark.parametrize("name", [name for name in SMALL if name not in OPEN])
def test_a_script_writes_its_network_and_samples_of_it(
    name: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch", reason="torch is not installed: pip install 'qdq[torch]'")
    path, samples = tmp_path / "x.onnx", tmp_path / "samples"
    assert run(name, str(path), "--samples", str(samples), "--count", "2", *SMALL[name].split()) == 0
    said = capsys.readouterr().out
    assert "dB, ONNX Runtime against PyTorch on" in said and "2 samples in samples: no real data" in said
    model = onnx.load(path)
    sizes = {i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for i in model.graph.input}
    files = sorted(samples.iterdir())
    assert [file.name for file in files] == ["000.npz", "001.npz"]
    with np.load(files[0]) as first, np.load(files[1]) as second:
        assert {n: first[n].shape for n in first} == sizes and any((first[n] != second[n]).any() for n in first)
    # fresh weights are like trained ones: no product is with a matrix of zeros
    sums = {node.input[0] for node in model.graph.node if node.op_type == "ScatterND"}  # which begin with zeros
    stored = [t for t in model.graph.initializer if len(t.dims) > 1 and t.name not in sums]
    weights = [onnx.numpy_helper.to_array(t) for t in stored]
    assert all(np.abs(w).max() > 1e-5 for w in weights if w.dtype.kind == "f" and w.size > 64)


@torch_too
def test_forces_are_the_gradient_of_the_energy(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed: pip install 'qdq[torch]'")
    path, samples = tmp_path / "x.onnx", tmp_path / "samples"
    assert run("ani_potential", str(path), "--samples", str(samples), "--count", "1", "--widths", "16", "8") == 0
    session = onnxruntime.InferenceSession(path)
    positions = dict(np.load(samples / "000.npz"))["positions"].astype(np.float64)

    def energy(at: np.ndarray) -> float:
        return float(session.run(["energy"], {"positions": at.astype(np.float32)})[0][0])

    forces = session.run(["forces"], {"positions": positions.astype(np.float32)})[0]
    step = np.zeros_like(positions)
    step[2] = forces[2] / np.linalg.norm(forces[2]) * 1e-2  # A
    along = (energy(positions - step) - energy(positions + step)) / 2e-2
    assert along == pytest.approx(float(np.linalg.norm(forces[2])), rel=0.02)


@torch_too
def test_chgnet_is_that_of_its_package(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("torch", "chgnet", "pymatgen"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    given = ["--samples", str(tmp_path / "s"), "--count", "2", *SMALL["chgnet_potential"].split()]
    assert run("chgnet_potential", str(tmp_path / "x.onnx"), *given) == 0
    assert "the package's energy within" in capsys.readouterr().out


@torch_too
def test_open_sizes_take_proteins_of_any_length_behind_a_mask(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed: pip install 'qdq[torch]'")
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")
    path, folder = tmp_path / "x.onnx", tmp_path / "s"
    said = [str(path), "--samples", str(folder), "--count", "3", "--open", "--batch", "3"]
    assert run("esm", *said, *SMALL["esm"].split()) == 0  # compared with PyTorch on two of them
    samples = [dict(np.load(file)) for file in sorted(folder.iterdir())]
    assert any((s["attention_mask"] == 0).any() for s in samples)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for sample in samples:
        (together,) = session.run(None, sample)
        for row in range(3):  # what is behind the end of a protein, and what is beside it, changes nothing
            length = int(sample["attention_mask"][row].sum())
            (alone,) = session.run(None, {name: each[row : row + 1, :length] for name, each in sample.items()})
            assert np.abs(together[row, :length] - alone[0]).max() < 1e-4


@torch_too
def test_a_checkpoint_gives_its_weights_however_it_is_nested(
    run: Run, tools: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'qdq[torch]'")
    sizes = SMALL["transunet"].split()
    build = tools("transunet").build
    network = build(1, 3, (32, 32, 32), (4, 8), 16, 1, 2, 32).eval()
    wrapped = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"epoch": 3, "log": [np.float64(0.5)], "network_weights": wrapped}, tmp_path / "x.pth")
    said = [str(tmp_path / "x.onnx"), "--samples", str(tmp_path / "s"), "--checkpoint", str(tmp_path / "x.pth")]
    assert run("transunet", *said, *sizes) == 0
    kept = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "x.onnx").graph.initializer}
    assert np.array_equal(kept["head.weight"], network.head.weight.detach().numpy())


@torch_too
def test_a_part_of_a_checkpoint_is_found_under_its_prefix(
    tools: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'qdq[torch]'")
    common = tools("common")

    class Tied(torch.nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4, bias=False)
            self.head.weight = self.inner.weight

    whole, part = Tied(), torch.nn.Linear(4, 4)
    torch.save({f"model.{name}": value for name, value in whole.state_dict().items()}, tmp_path / "whole.pt")
    torch.save(part.state_dict(), tmp_path / "part.pt")
    common.load(part, tmp_path / "whole.pt")
    assert torch.equal(part.weight, whole.inner.weight) and "1 weights in it belong" in capsys.readouterr().out
    before = torch.load(tmp_path / "part.pt")
    common.load(other := Tied(), tmp_path / "part.pt")  # the head is the same matrix
    assert torch.equal(other.head.weight, before["weight"])


@torch_too
@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            "other",
            r"1 missing: head.bias; 1 of another shape: head.weight is \(5, 4, 1, 1, 1\), needs \(3, 4, 1, 1, 1\)",
        ),
        ("code", "weights_only=True"),
        ("none", "no weights in it"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    made: str,
    said: str,
    run: Run,
    tools: Callable[[str], ModuleType],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'qdq[torch]'")
    weights = tools("transunet").build(1, 3, (32, 32, 32), (4, 8), 16, 1, 2, 32).state_dict()
    if made == "other":
        weights["head.weight"] = torch.zeros(5, 4, 1, 1, 1)
        del weights["head.bias"]
    torch.save(
        {"other": weights, "code": {"state_dict": weights, "f": Path("x")}, "none": {"a": 1}}[made], tmp_path / "x.pt"
    )
    path = tmp_path / "x.onnx"
    assert run("transunet", str(path), "--checkpoint", str(tmp_path / "x.pt"), *SMALL["transunet"].split()) == 2
    assert re.search(said, capsys.readouterr().err) and not path.exists()


def test_samples_are_crops_of_a_volume_in_hounsfield_units(tools: Callable[[str], ModuleType], tmp_path: Path) -> None:
    pytest.importorskip("nibabel", reason="nibabel is not installed: pip install 'qdq[medical]'")
    common = tools("common")
    volume = np.random.default_rng(0).normal(0, 300, (40, 20, 30)).astype(np.float32)
    write_nifti(tmp_path / "ct.nii.gz", volume)
    options = ["x.onnx", "--volume", str(tmp_path / "ct.nii.gz"), "--patch", "32", "32", "16", "--batch", "2"]
    parser = common._parser(lambda: None, common.VOLUME)
    made, said = common.samples(common.VOLUME, parser.parse_args([*options, "--hounsfield", "-175", "250"]))
    assert said == "of ct.nii.gz" and [m["image"].shape for m in made] == [(2, 1, 32, 32, 16)] * 4
    assert all(m["image"].min() == 0 and m["image"].max() == 1 for m in made)
    made, _ = common.samples(common.VOLUME, parser.parse_args(options))
    assert 0.9 < np.std(made[0]["image"]) < 1.1


def test_samples_are_pictures_of_a_folder(tools: Callable[[str], ModuleType], tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed: pip install 'qdq[image]'")
    common = tools("common")
    for i in range(3):
        image.new("RGB", (50 + i, 40), (255, 0, 0)).save(tmp_path / f"{i}.png")
    given = common._parser(lambda: None, common.IMAGE).parse_args(
        ["x.onnx", "--pictures", str(tmp_path), "--size", "32", "--batch", "2"]
    )
    made, _ = common.samples(common.IMAGE, given)
    assert [m["image"].shape for m in made] == [(2, 3, 32, 32)] * 2
    assert np.allclose(made[0]["image"][0, :, 5, 5], [(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225])


def test_a_sound_of_another_rate_is_refused(tools: Callable[[str], ModuleType], tmp_path: Path) -> None:
    common = tools("common")
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(8000)
        file.writeframes(bytes(100))
    given = common._parser(lambda: None, common.MEL).parse_args(["x.onnx", "--sound", str(tmp_path / "a.wav")])
    with pytest.raises(common.BadInput, match="16 kHz"):
        common.samples(common.MEL, given)


def test_a_random_field_has_the_spectrum_that_is_said(tools: Callable[[str], ModuleType]) -> None:
    made = tools("common").field(np.random.default_rng(0), (64, 64))
    power = np.abs(np.fft.fft2(made)) ** 2
    low, high = power[1:4, 1:4].mean(), power[16:24, 16:24].mean()
    assert abs(made.std() - 1) < 1e-5 and 30 < low / high < 300  # (20 / 2)^2, with the spread of few terms


def test_what_failed_and_what_was_found_are_shown(
    tools: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = tools("bench_export")
    good = {"fp32_bytes": 23e6, "int8_bytes": 6e6, "fp32_us": 400.0, "fp16_us": 150.0, "int8_us": 100.0, "share": 0.93}
    more = {"ended_by": "compiles", "options": ["--batch", "8"], "seconds": 1.0}
    (tmp_path / "unet.rtx.figures.json").write_text(json.dumps({**good, **more}))
    (tmp_path / "unet.tensorrt.figures.json").write_text(json.dumps({**good, **more, "share": None, "fp32_us": None}))
    (tmp_path / "vit.rtx.figures.json").write_text(json.dumps({"failed": "deploy ended with 2: Error: no"}))
    bench.table(tmp_path)
    said = capsys.readouterr().out
    published = "23.11 to 6.61, 2.62 to 1.05, 2.50"
    assert f"| unet --batch 8 | 23.0 | 6.0 | rtx | 400 | 150 | 100 | 4.00 | 1.50 | 0.930 | {published} |" in said
    assert f"| tensorrt | no kernel | 150 | 100 |  | 1.50 | not built | {published} |" in said
    assert "vit for rtx: deploy ended with 2: Error: no" in said and "INT8 may be faster: unet." in said
