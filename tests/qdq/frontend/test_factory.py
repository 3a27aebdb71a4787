"""`torch:package.module:factory` and `x.pt2` on the command line: one command, or one paragraph that says why not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

pytest.importorskip("torch", reason="torch is not installed: pip install 'qdq[torch]'")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'qdq[torch]'")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")
pytestmark = pytest.mark.torch

import torch  # noqa: E402

from qdq.cli.main import main  # noqa: E402
from qdq.deploy.report.schemas import schema  # noqa: E402

NETS = """
import sys
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
    def forward(self, image, labels=None):
        x = self.conv(image).relu().mean((2, 3))
        return {"logits": self.head(x), "loss": None if labels is None else x.sum()}

def net():
    print("a word of the user's own")
    return Net()

def with_example():
    return Net(), torch.zeros(1, 3, 8, 8)

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, 8)
    def forward(self, ids):
        return self.words(ids).mean(1)

INSTANCE = Net()
NUMBER = 3
def needs(size): return Net()
def number(): return 3
def stops(): sys.exit(4)
def broken(): raise ValueError("no checkpoint here")

class Items(Dataset):
    def __len__(self): return 5
    def __getitem__(self, i): return torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)), i % 4

def loader(): return DataLoader(Items(), batch_size=2)
def names(): return [{"image": np.ones((1, 3, 8, 8), "f4"), "labels": np.zeros(1, "i8")}] * 2
def others(): return [{"pixels": np.ones((1, 3, 8, 8), "f4")}]
def small(): return [{"image": np.ones((1, 2, 8, 8), "f4")}]
def ids(): return [[1, 2, 3], [4, 5, 6]]
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"nets_{tmp_path.name.replace('-', '_')}"
    Path(f"{name}.py").write_text(NETS, encoding="utf-8")
    Path("needs_more.py").write_text("import package_that_nobody_has\n", encoding="utf-8")
    sys.modules.pop("needs_more", None)
    return name


def qdq(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        ("net", ("--data", "{nets}:loader")),
        ("net", ("--data", "{nets}:Items")),
        ("net", ("--data", "{nets}:names")),
        ("net", ("--data", "volumes")),
        ("net", ("--data", "stacked.npz")),
        ("INSTANCE", ("--shape", "image:1x3x8x8")),
        ("with_example", ()),
        ("Net", ("--data", "stacked.npy", "--dynamic", "image:0=batch,2=height")),
    ],
)
def test_example_inputs_come_from_data_shapes_or_the_factory(
    factory: str, options: tuple[str, ...], nets: str, tmp_path: Path
) -> None:
    Path("volumes").mkdir()
    images = np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)
    np.savez("volumes/0.npz", image=images[:1])
    np.savez("stacked.npz", image=images)
    np.save("stacked.npy", images)
    given = [option.format(nets=nets) for option in options]
    done = qdq("export", f"torch:{nets}:{factory}", "-o", "net.onnx", "--json", *given)
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["schema"] == "qdq.exported/1" and set(answer) <= set(schema("exported")["properties"])
    assert answer["inputs"] == ["image"] and answer["outputs"] == ["logits"]
    assert answer["dynamic"]["image"]["0"] == "batch" and answer["errors"]["logits"]["relative"] < 1e-5
    assert len(answer["dynamic"]["image"]) == 1 + ("--dynamic" in options)


def test_token_ids_are_whole_numbers(nets: str) -> None:
    for options in (("--data", f"{nets}:ids"), ("--shape", "ids:1x3")):
        done = qdq("export", f"torch:{nets}:Tokens", "-o", "net.onnx", *options)
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("torch:{nets}:needs", "missing 1 required positional argument & without arguments"),
        ("torch:{nets}:number", "returned a int & (module, example_inputs)"),
        ("torch:{nets}:NUMBER", "is a int & a function that returns a module"),
        ("torch:{nets}:stops", "SystemExit & line"),
        ("torch:{nets}:broken", "no checkpoint here & .py line"),
        ("torch:{nets}:nothing", "No 'nothing' & net, with_example"),
        ("torch:absent_module:net", "No module 'absent_module' & current folder"),
        ("torch:needs_more:net", "package_that_nobody_has & pip install & needs_more.py line 1"),
        ("torch:{nets}", "torch:package.module:factory"),
        ("torch:../nets.py:net", "torch:package.module:factory"),
        ("torch:{nets}:INSTANCE", "no example inputs & --data & --shape image:"),
        ("absent.pt2", "No such file"),
        ("broken.pt2", "no ExportedProgram & torch.export.save"),
        ("net.onnx", "an ONNX file already"),
    ],
)
def test_a_wrong_model_is_said_in_one_paragraph(model: str, words: str, nets: str) -> None:
    Path("broken.pt2").write_bytes(b"PK broken")
    done = qdq("export", model.format(nets=nets), "-o", "out.onnx")
    assert done.exit_code == 2 and done.stderr.count("\n") == 1, done.output
    assert all(word in done.stderr for word in words.split(" & ")), done.stderr
    assert not Path("out.onnx").exists() and not list(Path.cwd().glob(".qdq*"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("others", "'pixels' & forward takes 'image', 'labels'"),
        ("small", "does not run on the first sample & (1, 2, 8, 8)"),
    ],
)
def test_data_that_do_not_fit_the_module(data: str, words: str, nets: str) -> None:
    done = qdq("export", f"torch:{nets}:net", "--data", f"{nets}:{data}", "-o", "out.onnx")
    assert done.exit_code == 2 and all(word in done.stderr for word in words.split(" & ")), done.output


def test_deploy_in_one_command_and_what_it_records(nets: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
    command = ["deploy", f"torch:{nets}:net", "--data", f"{nets}:loader", "--out", "build", "--target", "sm89"]
    done = subprocess.run(
        [sys.executable, "-m", "qdq", *command, "--tune", "off", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # what the factory prints is not in it
    assert report["model_file"] == "net.int8.onnx" and any("torch.export" in note for note in report["notes"])
    assert "Not used of each sample: value 2" in done.stderr
    traced = json.loads(Path("build/provenance.json").read_text())
    assert traced["exported"]["source"] == f"torch:{nets}:net" and traced["model"]["name"] == "net.onnx"
    assert {"net.onnx", "net.int8.onnx", "net.engine"} <= {file["name"] for file in traced["files"]}
    assert "net.onnx" in Path("build/SHA256SUMS").read_text()
    assert not list(Path.cwd().glob(".qdq*"))
    again = qdq("export", "build/net.onnx", "-o", "net.onnx")
    assert again.exit_code == 2
    planned = qdq("plan", "build/net.onnx", "--exclude", "/head/*", "--json")
    assert planned.exit_code == 0 and "/head/Gemm" not in json.dumps(json.loads(planned.stdout).get("weights"))


def test_a_saved_program(nets: str) -> None:
    program = torch.export.export(torch.nn.Linear(8, 4), (torch.ones(3, 8),))
    torch.export.save(program, "linear.pt2")
    done = qdq("export", "linear.pt2", "-o", "linear.onnx", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["source"] == "linear.pt2"


def test_a_saved_program_of_quantized_operators(nets: str) -> None:
    """Only a library that a new process has not imported registers them."""
    write = """
import torch, torch.ao.quantization.fx._decomposed
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(8, 4)
    def forward(self, x):
        given = (0.02, 0, -128, 127, torch.int8)
        codes = torch.ops.quantized_decomposed.quantize_per_tensor(x, *given)
        return self.head(torch.ops.quantized_decomposed.dequantize_per_tensor(codes, *given))
torch.export.save(torch.export.export(Net(), (torch.ones(3, 8),)), "quantized.pt2")
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", write], check=True)
    read = ["-m", "qdq", "export", "quantized.pt2", "-o", "quantized.onnx"]
    done = subprocess.run([sys.executable, *read], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kinds = [node.op_type for node in onnx.load("quantized.onnx").graph.node]
    assert kinds.count("QuantizeLinear") == kinds.count("DequantizeLinear") == 1


def test_a_saved_program_of_operators_that_nobody_has(nets: str) -> None:
    library = torch.library.Library("nobodys", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    library.impl("twice", lambda x: x * 2, "Meta")

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.nobodys.twice(x) + 1

    torch.export.save(torch.export.export(Net(), (torch.ones(3, 8),)), "custom.pt2")
    del Net
    library._destroy()
    done = qdq("export", "custom.pt2", "-o", "custom.onnx")
    assert done.exit_code == 2 and "it calls nobodys::twice, which nothing here registers" in done.output


def test_what_is_no_array_of_numbers_in_a_sample_is_no_input(nets: str) -> None:
    """Names of files, and boxes of several sizes, lie beside the image in many a data set."""
    Path("seen.py").write_text(
        "import numpy as np\n"
        "boxes = [np.zeros((2, 4)), np.zeros((3, 4))]\n"
        "def items():\n"
        "    image = np.ones((1, 3, 8, 8), 'f4')\n"
        "    return [{'file': 'case', 'boxes': boxes, 'image': image, 'meta': {}}] * 2\n"
    )
    done = qdq("export", f"torch:{nets}:net", "--data", "seen:items", "-o", "net.onnx", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["inputs"] == ["image"]


def test_a_package_that_forward_needs_is_named_with_how_to_get_it(nets: str) -> None:
    Path("lazy.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, image):\n"
        "        import package_that_nobody_has\n"
        "def net(): return Net()\n"
    )
    done = qdq("export", "torch:lazy:net", "--data", f"{nets}:names", "-o", "net.onnx")
    assert done.exit_code == 2 and done.output.rstrip().endswith("pip install package_that_nobody_has.")
