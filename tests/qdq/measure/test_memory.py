"""Memory is what a run shows: lengths left open, pair tensors, samples of several sizes, a budget that is too small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import build, node, normal

from qdq.core.errors import InputError
from qdq.core.resources import default_bytes, within
from qdq.measure.collect import collect
from qdq.measure.inference import memory
from qdq.measure.inference.memory import at_once, groups_of, held_bytes, passes, require_room, tensor_bytes
from qdq.measure.inference.session import Session
from qdq.model.model import Model
from qdq.plan import placement
from qdq.plan.settings import Settings

CHANNELS, BLOCKS = 32, 4
ROOT = Path(__file__).parents[3]


def folding() -> Model:
    """Of L residues a tensor (1, L, C), of pairs (1, L, L, C), and products over triangles: L is open everywhere."""
    tensors: dict[str, np.ndarray] = {"one": np.array([1]), "two": np.array([2])}
    nodes = [node("Unsqueeze", "x two", "a", "rows"), node("Unsqueeze", "x one", "b", "columns")]
    nodes.append(node("Mul", "a b", "p0", "outer"))
    for k in range(BLOCKS):
        tensors |= {f"{w}{k}": normal(CHANNELS, CHANNELS, seed=k) / 6 for w in ("left", "right", "out")}
        nodes += [
            node("MatMul", f"p{k} left{k}", f"l{k}", f"left_{k}"),
            node("MatMul", f"p{k} right{k}", f"r{k}", f"right_{k}"),
            node("Einsum", f"l{k} r{k}", f"t{k}", f"triangle_{k}", equation="bikc,bjkc->bijc"),
            node("Tanh", f"t{k}", f"s{k}", f"tanh_{k}"),
            node("MatMul", f"s{k} out{k}", f"o{k}", f"out_{k}"),
            node("Add", f"p{k} o{k}", f"p{k + 1}", f"add_{k}"),
        ]
    nodes.append(node("ReduceMean", f"p{BLOCKS} two", "y", keepdims=0))
    return build(nodes, {"x": (1, "L", CHANNELS)}, tensors)


def sample(length: int) -> dict[str, np.ndarray]:
    return {"x": normal(1, length, CHANNELS, seed=length)}


def test_open_lengths_take_one_pass() -> None:
    model = folding()
    names = [p.tensor for p in placement.plan(model, Settings()).activations]
    assert len(names) == 2 * BLOCKS
    layout = passes(model, names, sample(150))
    assert layout.groups == (tuple(names),)
    pair = 150 * 150 * CHANNELS * 4
    assert tensor_bytes(model, sample(150))["p1"] == pair
    assert layout.bytes_each < 20 * pair  # with 150 for every size left open, a pair had 150 * 150 * 150 * C


def test_one_run_shows_the_sizes_of_all_smaller_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs = folding(), list[int]()
    seen = memory._seen

    def counted(model: Model, tensors: Any, sample: Any) -> Any:
        runs.append(sample["x"].shape[1])
        return seen(model, tensors, sample)

    monkeypatch.setattr(memory, "_seen", counted)
    data = [sample(length) for length in (12, 9, 20, 15, 12)]
    table = collect(model, placement.plan(model, Settings()), data)
    assert table.count == 5 and runs == [12, 20]
    assert tensor_bytes(model, sample(9)) == tensor_bytes(model, sample(12))


def test_sizes_that_all_shapes_give_need_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build([node("MatMul", "x w", "m"), node("Relu", "m", "y")], {"x": (4, 8)}, {"w": normal(8, 8)})
    model = model.replace(onnx.shape_inference.infer_shapes(model.proto))
    monkeypatch.setattr(memory, "Session", None)
    assert tensor_bytes(model, {"x": normal(4, 8)}) == {"m": 4 * 4 * 8, "y": 4 * 4 * 8}


def test_a_budget_holds_for_every_stage() -> None:
    model, data = folding(), [sample(20), sample(10)]
    names = [f"s{k}" for k in range(BLOCKS)]
    assert groups_of(model, names, data) == (tuple(names),)
    pair = 20 * 20 * CHANNELS * 4
    with within(held_bytes(model) + 6 * pair):
        assert default_bytes() == held_bytes(model) + 6 * pair
        assert len(groups_of(model, names, data)) > 1
        assert at_once(model, data) == 1
    assert groups_of(model, names, []) == groups_of(model, [], data) == ()


def test_a_budget_that_cannot_be_met_is_said() -> None:
    model = folding()
    require_room(model, sample(50))
    with within(1_000_000), pytest.raises(InputError, match=r"--memory gives 1 MB, but one sample needs [\d.]+ MB"):
        require_room(model, sample(50))
    with within(100_000_000):
        require_room(model, sample(50))


def test_a_plan_without_tensors_has_one_pass_whatever_the_budget() -> None:
    """It sees the magnitudes of all tensors."""
    assert passes(folding(), [], sample(4), memory=1).groups == ((),)


def test_a_pass_runs_only_what_its_tensors_need() -> None:
    """The Reshape fails on every sample; ONNX Runtime runs all nodes of a graph, whatever its outputs are."""
    nodes = [node("Relu", "x", "a"), node("Reshape", "a size", "b"), node("Relu", "b", "y")]
    model = build(nodes, {"x": ("n", 4)}, {"size": np.array([5, 7])})
    assert Session(model, ["a"])({"x": normal(3, 4)})["a"].shape == (3, 4)
    with pytest.raises(InputError, match="cannot run"):
        Session(model, ["y"])({"x": normal(3, 4)})


def test_a_second_run_of_a_shape_takes_no_more_memory_than_the_first() -> None:
    """The large tensors are gone before the outputs are made, in every run."""
    script = """
import resource, sys
sys.path.insert(0, "tests")
import numpy as np
from graphs import build, node
from qdq.measure.inference.session import Session
outputs = [f"y{k}" for k in range(8)]
nodes = [node("Concat", "x x x x x x x x", "a", axis=0), node("ReduceMax", "a", "r", keepdims=0)]
nodes += [node("Add", "x r", name, name) for name in outputs]
session = Session(build(nodes, {"x": (1, 1 << 21)}, outputs=outputs), outputs, threads=1, in_order=True)
sample = {"x": np.ones((1, 1 << 21), np.float32)}
for _ in range(3):
    session(sample)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT)
    first, *later = map(int, done.stdout.split())
    assert max(later) - first < 20e6  # a block kept beside the outputs is 64 MB


def test_the_least_budget_that_is_taken_is_kept() -> None:
    """Beyond what a process needs for a model of one node; pages that are mapped from files count too."""
    script = """
import re, sys
sys.path[:0] = ["tests", "tests/qdq/measure"]
from graphs import build, node, normal
from test_memory import folding, sample
from qdq.assemble.quantize import quantize
from qdq.core.resources import within
from qdq.measure.inference.memory import needed_bytes
small = build([node("MatMul", "x w", "y")], {"x": (1, "L", 32)}, {"w": normal(32, 32)})
model = small if sys.argv[1] == "small" else folding()
data = [sample(length) for length in (90, 80, 70, 60)]
_, needs = needed_bytes(model, data[0])
with within(needs):
    quantize(model, data)
most = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]  # ru_maxrss begins with the parent's
print(needs, int(most) * 1024)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("Linux tells the most memory of a process alone")
    found = []
    for which in ("small", "large"):
        command = [sys.executable, "-c", script, which]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        found.append([int(word) for word in done.stdout.split()])
    (_, least), (needs, most) = found
    assert 0 < most - least < needs
