"""`export_torch`: what a file is called, holds and computes, and what cannot be a file."""

from __future__ import annotations

import copy
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install 'qdq[torch]'")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'qdq[torch]'")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")
pytestmark = pytest.mark.torch

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch_networks import REFUSED, Classifier, Of, Recurrent, as_dataclass, by_condition, by_value  # noqa: E402

from engines.core.onnx_runtime import session  # noqa: E402
from qdq import Exported, InputError, export_torch  # noqa: E402
from qdq.frontend.pytorch import job  # noqa: E402
from qdq.frontend.pytorch.libraries import held_back  # noqa: E402

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


def run(made: Exported, **inputs: np.ndarray) -> list[np.ndarray]:
    """The outputs of the file."""
    found: list[np.ndarray] = session(made.path).run(None, inputs)
    return found


def state(module: nn.Module) -> list[Any]:
    """All that an export must leave."""
    parts = [(name, part.training) for name, part in module.named_modules()]
    return [parts, {name: value.clone() for name, value in module.state_dict().items()}, torch.get_rng_state()]


def same(a: Any, b: Any) -> bool:
    return bool(a[0] == b[0] and all(torch.equal(a[1][n], b[1][n]) for n in a[1]) and torch.equal(a[2], b[2]))


def test_names_batch_and_state_of_a_module_in_training(tmp_path: Path) -> None:
    module = Classifier()
    module.layer1[0].eval()  # a mode of its own, which stays
    before = state(module)
    example = {"image": torch.randn(1, 3, 8, 8), "scale": torch.ones(1, 8), "double": True}
    before[2] = torch.get_rng_state()
    made = export_torch(module, example, tmp_path / "net.onnx")
    assert same(before, state(module))
    assert made.inputs == ("image", "scale") and made.outputs == ("logits", "features")
    assert made.dynamic == {"image": {0: "batch"}, "scale": {0: "batch"}}
    assert all(e.relative < 1e-5 for e in made.errors) and made.samples >= 3
    assert any("training mode" in note for note in made.notes) and any("double=True" in note for note in made.notes)
    image, scale = np.random.default_rng(0).normal(size=(5, 3, 8, 8)).astype("f4"), np.ones((5, 8), "f4")
    with torch.no_grad():
        wanted = copy.deepcopy(module).eval()(torch.from_numpy(image), torch.from_numpy(scale), double=True)
    for name, found in zip(made.outputs, run(made, image=image, scale=scale), strict=True):
        np.testing.assert_allclose(found, wanted[name], atol=1e-5)


def test_the_file_has_names_of_modules_and_tells_nothing_of_the_machine(tmp_path: Path) -> None:
    made = export_torch(Classifier(), (torch.randn(2, 3, 8, 8),), tmp_path / "net.onnx", input_names=["x"])
    assert made.inputs == ("x",) and any("scale" in note for note in made.notes)
    proto = onnx.load(made.path)
    names = {node.name for node in proto.graph.node}
    assert "/layer1/0/Conv" in names or "/layer1/1/Conv" in names  # BatchNorm is folded into it
    assert "/head/Gemm" in names and "head.weight" in {t.name for t in proto.graph.initializer}
    assert __file__.encode() not in made.path.read_bytes() and b"torch_networks" not in made.path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    again = export_torch(Classifier(), (torch.randn(2, 3, 8, 8),), tmp_path / "again.onnx", input_names=["x"])
    assert again.path.read_bytes() == made.path.read_bytes()  # so that plans, tables and the cache stay good


@pytest.mark.parametrize(
    ("compute", "names"),
    [
        (lambda s, x: s.lin(x), ("output",)),
        (lambda s, x: (s.lin(x),), ("output",)),
        (lambda s, x: [s.lin(x), {"q": x.mean(1), "n": 3}], ("output_0", "output_1_q")),
        (lambda s, x: {"x": s.lin(x), "same": x}, ("x_out", "same")),
        (as_dataclass, ("mean", "levels_0", "levels_1")),
    ],
)
def test_outputs_are_named_by_what_forward_returns(compute: Any, names: tuple[str, ...], tmp_path: Path) -> None:
    made = export_torch(Of(compute), X, tmp_path / "net.onnx")
    assert made.outputs == names and made.dynamic == {"x": {0: "batch"}}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_is_named_and_nothing_is_left(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make, words = REFUSED[name]
    module = make()
    before = state(module) if name != "meta" else None
    with pytest.raises(InputError) as caught:
        export_torch(module, X, tmp_path / "net.onnx", source="the net")
    message = str(caught.value)
    assert all(word in message for word in ("the net", *words.split(" & "))), message
    assert "\n" not in message and list(tmp_path.iterdir()) == [] and capfd.readouterr().out == ""
    assert before is None or same(before, state(module))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_condition_of_torch_and_a_scripted_branch_follow_the_values(tmp_path: Path) -> None:
    class Scripted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 0:
                return x * 2
            return x - 1

    for module in (Of(by_condition), torch.jit.script(Scripted())):
        made = export_torch(module, X, tmp_path / "net.onnx")
        for values in (X.abs(), -X.abs()):
            (found,) = run(made, x=values.numpy())
            made_of = module.lin(values) if isinstance(module, Of) else values
            wanted = made_of * 2 if values.sum() > 0 else made_of - 1
            np.testing.assert_allclose(found, wanted.detach(), atol=1e-5)


def test_a_batch_that_the_code_fixes_stays_fixed_and_one_asked_for_is_refused(tmp_path: Path) -> None:
    module = Of(lambda s, x: s.lin(x).reshape(2, 8))
    made = export_torch(module, X, tmp_path / "net.onnx")
    assert made.dynamic == {} and any("batch is fixed at 2" in note for note in made.notes)
    with pytest.raises(InputError, match="no other"):
        export_torch(module, X, tmp_path / "other.onnx", dynamic={"x": {0: "batch"}})
    with pytest.raises(InputError, match=r"'y'; .* has 'x'"):
        export_torch(module, X, tmp_path / "other.onnx", dynamic={"y": {0: "batch"}})


def test_sizes_are_open_as_asked(tmp_path: Path) -> None:
    ids = torch.arange(12).reshape(1, 12)
    made = export_torch(Recurrent(), ids, tmp_path / "net.onnx", dynamic={"ids": {0: "n", 1: "time"}})
    assert made.dynamic == {"ids": {0: "n", 1: "time"}}
    assert run(made, ids=np.ones((3, 5), np.int64))[0].shape == (3, 3)
    assert export_torch(Recurrent(), ids, tmp_path / "fixed.onnx", dynamic=False).dynamic == {}


def test_other_float_types(tmp_path: Path) -> None:
    low = Of(lambda s, x: s.lin(x)).bfloat16()
    made = export_torch(low, X, tmp_path / "low.onnx")
    assert any("BF16" in note for note in made.notes) and low.lin.weight.dtype == torch.bfloat16
    assert run(made, x=X.numpy())[0].dtype == np.float32
    half = export_torch(Of(lambda s, x: s.lin(x)).half(), X, tmp_path / "half.onnx")
    assert run(half, x=X.half().numpy())[0].dtype == np.float16


def test_samples_are_compared_and_a_wrong_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Of(lambda s, x: s.lin(x))
    few = export_torch(module, X, tmp_path / "net.onnx")
    more = export_torch(module, X, tmp_path / "net.onnx", samples=torch.utils.data.TensorDataset(torch.randn(9, 8)))
    assert more.samples == few.samples + 4
    with pytest.raises(InputError, match=r"differs from PyTorch's by up to .* tolerance"):
        export_torch(Of(by_sum), X, tmp_path / "wrong.onnx", tolerance=0.0)
    with pytest.raises(InputError, match=r"does not run on sample 0 \(x \(1, 7\)\)"):
        export_torch(Of(lambda s, x: x @ s.lin.weight), X, tmp_path / "wrong.onnx", samples=sevens)
    assert not (tmp_path / "wrong.onnx").exists()


def sevens(model: Any) -> Any:
    """Samples that the file might take and the module does not."""
    return [{"x": np.ones((1, 7), np.float32)}]


def by_sum(self: Of, x: torch.Tensor) -> Any:
    return torch.softmax(self.lin(x) @ x.T, -1).cumsum(-1)


def test_large_weights_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "LARGE", 100)
    module = nn.Linear(64, 64)
    made = export_torch(module, torch.randn(2, 64), tmp_path / "net.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    assert made.path.stat().st_size < 64 * 64 * 4
    monkeypatch.undo()
    export_torch(module, torch.randn(2, 64), tmp_path / "net.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]  # what belongs to the file that is replaced is gone


def test_an_exported_program_keeps_its_names_and_open_sizes(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"sum": left + right, "product": left * right}

    batch = torch.export.Dim("rows")
    program = torch.export.export(Two(), (X, X), dynamic_shapes=({0: batch}, {0: batch}))
    made = export_torch(program, None, tmp_path / "net.onnx")
    assert made.inputs == ("left", "right") and made.outputs == ("sum", "product")
    assert made.dynamic == {"left": {0: "batch"}, "right": {0: "batch"}}
    np.testing.assert_array_equal(run(made, left=np.ones((5, 8), "f4"), right=np.ones((5, 8), "f4"))[0], 2)
    with pytest.raises(InputError, match="decided by"):
        export_torch(program, None, tmp_path / "net.onnx", dynamic={"left": {1: "n"}})


def test_wrappers_are_looked_into_and_other_objects_refused(tmp_path: Path) -> None:
    assert export_torch(nn.DataParallel(nn.Linear(8, 8)), X, tmp_path / "net.onnx").source == "DataParallel"
    for other in (nn.Linear(8, 8).state_dict(), "net.pt"):
        with pytest.raises(InputError, match=r"torch.nn.Module .* is needed"):
            export_torch(other, X, tmp_path / "other.onnx")
    with pytest.raises(InputError, match=r"do not fit .* forward takes \(x\)"):
        export_torch(Of(by_value), {"y": X}, tmp_path / "other.onnx")


class Named(nn.Module):
    """Takes its second input by name alone."""

    def forward(self, x: torch.Tensor, y: torch.Tensor, *, weight: torch.Tensor) -> torch.Tensor:
        return x * weight - y


@pytest.mark.parametrize("args", [(X,), (X, X + 1), ()])
def test_a_program_that_was_captured_with_inputs_by_name(tmp_path: Path, args: tuple[torch.Tensor, ...]) -> None:
    given = {"x": X, "y": X + 1, "weight": X + 2}
    kwargs = {name: value for name, value in given.items() if name not in ("x", "y")[: len(args)]}
    program = torch.export.export(Named(), args, kwargs)
    for example in (None, given):
        made = export_torch(program, example, tmp_path / "named.onnx")
        assert made.inputs == ("x", "y", "weight")
        (found,) = run(made, **{name: value.numpy() for name, value in given.items()})
        np.testing.assert_allclose(found, Named()(**given).numpy(), rtol=1e-5)


def test_an_axis_that_has_the_size_of_a_batch_that_is_tried_is_no_batch(tmp_path: Path) -> None:
    made = export_torch(nn.Conv2d(3, 4, 3), torch.randn(3, 8, 8), tmp_path / "conv.onnx")
    assert made.dynamic == {} and any("fixed at 3" in note for note in made.notes)
    assert export_torch(nn.Conv2d(2, 4, 3), torch.randn(3, 2, 8, 8), tmp_path / "conv.onnx").dynamic


class Counting(nn.Module):
    """Puts another tensor in the place of a buffer at each run."""

    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> Any:
        self.count = self.count + 1
        return self.lin(x)


def test_a_buffer_that_forward_replaces_is_as_it_was(tmp_path: Path) -> None:
    module = Counting()
    held = module.count
    export_torch(module, X, tmp_path / "net.onnx")
    assert module.count is held and module.count.item() == 0


def test_lazy_layers_without_weights_are_refused(tmp_path: Path) -> None:
    module = nn.LazyLinear(3)
    with pytest.raises(InputError, match="lazy layers"):
        export_torch(module, X, tmp_path / "net.onnx")
    assert isinstance(module, nn.LazyLinear)


@pytest.mark.parametrize("tolerance", [float("nan"), -1.0, float("inf")])
def test_a_tolerance_that_compares_nothing_is_refused(tmp_path: Path, tolerance: float) -> None:
    with pytest.raises(InputError, match="tolerance is"):
        export_torch(nn.Linear(8, 4), X, tmp_path / "net.onnx", tolerance=tolerance)


def test_sizes_in_which_samples_differ_stay_open(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    data = [{"input": np.random.default_rng(i).normal(size=(1, 3, 8 + i % 3, 10)).astype(np.float32)} for i in range(9)]
    made = export_torch(net, torch.zeros(1, 3, 8, 10), tmp_path / "m.onnx", samples=data)
    assert made.dynamic == {"input": {0: "batch", 2: "height"}}
    assert "Open, for the samples differ there: input axis 2 (8 to 10), as height." in made.notes
    assert run(made, input=data[2]["input"])[0].shape == (1, 4, 10, 10)
    fixed = export_torch(net, torch.zeros(1, 3, 8, 10), tmp_path / "f.onnx", samples=data[::3])
    assert fixed.dynamic == {"input": {0: "batch"}}


def test_where_no_size_can_be_open_the_option_is_shown(tmp_path: Path) -> None:
    net = Of(lambda s, x: s.lin(x[:, :8]) if x.shape[1] == 9 else s.lin(x[:, 1:9]))
    data = [torch.randn(2, 9 + i) for i in range(3)]
    with pytest.raises(InputError, match=r"x axis 1 \(9 to 11\).*--dynamic x:0=batch,1=length"):
        export_torch(net, data[0], tmp_path / "m.onnx", samples=data)
    program = torch.export.export(nn.ReLU(), (torch.zeros(2, 9),))
    with pytest.raises(InputError, match=r"one size.*dynamic_shapes=\{'input': \{1: torch.export.Dim.DYNAMIC\}\}"):
        export_torch(program, None, tmp_path / "p.onnx", samples=data)


def test_a_program_may_return_numbers_weights_and_inputs(tmp_path: Path) -> None:
    net = Of(lambda s, x: {"y": s.lin(x), "same": x, "weight": s.lin.weight, "ones": torch.ones(3), "count": 3})
    program = torch.export.export(net, (X,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    made = export_torch(program, None, tmp_path / "m.onnx")
    assert made.outputs == ("y", "same", "weight", "ones") and [*made.dynamic["x"]] == [0]
    assert "Not outputs of the file, for they are no tensors: count." in made.notes
    found = run(made, x=np.zeros((5, 8), np.float32))
    assert found[0].shape == (5, 8) and np.array_equal(found[2], net.lin.weight.detach().numpy())


def test_what_an_exporter_prints_is_kept_for_those_who_ask(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="why") as raised, held_back():
        print("a graph of Python")
        os.write(1, b"a graph of C++")
        other = threading.Thread(target=lambda: print("a bar", file=sys.stderr))
        other.start()
        other.join()
        raise ValueError("why")
    assert raised.value.__notes__ == ["a graph of Python\na graph of C++"]
    assert capfd.readouterr() == ("", "a bar\n")
