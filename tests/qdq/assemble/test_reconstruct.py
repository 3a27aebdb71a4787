"""Codes are learned block by block: cut at few tensors, computed as in ONNX Runtime, kept where others gain."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from graphs import attention, branches, build, node, normal, quantized, residual, run, samples
from models import save_samples

from engines.core.errors import MissingRuntimeError
from qdq.assemble.insert import insert
from qdq.assemble.quantize import quantize
from qdq.assemble.reconstruct import blockwise, learning
from qdq.assemble.reconstruct.cuts import cut
from qdq.assemble.reconstruct.operators import tensor
from qdq.cli.main import main
from qdq.core.disk.cache import caching
from qdq.measure.inference.samples import Sample
from qdq.model.model import Model
from qdq.plan.settings import Settings

torch = pytest.mark.torch


@pytest.fixture
def has_torch() -> None:
    pytest.importorskip("torch", reason="torch is not installed: pip install 'qdq[torch]'")


def layers(widths: Sequence[int] = (16, 24, 24, 4)) -> Model:
    """Products with Relus between them."""
    weights = {f"w{i}": normal(a, b, seed=i) / a**0.5 for i, (a, b) in enumerate(pairwise(widths))}
    nodes, tensor = [], "x"
    for i in range(len(weights)):
        last = i == len(weights) - 1
        nodes.append(node("MatMul", f"{tensor} w{i}", "y" if last else f"p{i}", name=f"product_{i}"))
        tensor = f"h{i}"
        if not last:
            nodes.append(node("Relu", f"p{i}", tensor, name=f"relu_{i}"))
    return build(nodes, {"x": (32, widths[0])}, weights)


def correlated(count: int, seed: int) -> list[Sample]:
    """Rows of 16 values that come from 6."""
    rng, mix = np.random.default_rng(seed), normal(6, 16, seed=11)
    return [{"x": (rng.normal(size=(32, 6)) @ mix).astype(np.float32)} for _ in range(count)]


def settings(**changed: object) -> Settings:
    fixed = {"rounding": "reconstruct", "equalize": "none", "calibrator": "max", "bias_correction": "off"}
    return Settings.from_mapping({**fixed, **changed})


def test_layers_in_a_row_are_blocks_of_their_own_with_their_activation() -> None:
    model = layers()
    assert cut(model, {f"product_{i}" for i in range(3)}, (), ["y"]) == [["h0"], ["h1"], ["y"]]
    assert cut(model, {"product_0", "product_2"}, {"h0"}, ["y"]) == [["h1"], ["y"]]
    assert cut(model, set(), (), ["y"]) == [["y"]]


def test_a_shortcut_is_in_its_block() -> None:
    nodes, tensor = [], "x"
    for i in range(3):
        nodes += [
            node("Conv", f"{tensor} a{i}", f"u{i}", name=f"first_{i}"),
            node("Conv", f"u{i} b{i}", f"v{i}", name=f"second_{i}"),
            node("Add", f"v{i} {tensor}", f"s{i}"),
            node("Relu", f"s{i}", "y" if i == 2 else f"t{i}"),
        ]
        tensor = f"t{i}"
    constants = {f"{k}{i}": normal(4, 4, 1, 1, seed=i) for i in range(3) for k in "ab"}
    model = build(nodes, {"x": (1, 4, 5, 5)}, constants)
    names = {f"{k}_{i}" for i in range(3) for k in ("first", "second")}
    assert cut(model, names, (), ["y"]) == [["t0"], ["t1"], ["y"]]


def test_skip_connections_may_cross() -> None:
    nodes = [
        node("Conv", "x a", "down", name="down"),
        node("Conv", "down b", "deep", name="deep"),
        node("Conv", "deep c", "up", name="up"),
        node("Concat", "down up", "both", axis=1),
        node("Conv", "both d", "y", name="last"),
    ]
    constants = {n: normal(4, 8 if n == "d" else 4, 1, 1) for n in "abcd"}
    found = cut(build(nodes, {"x": (1, 4, 5, 5)}, constants), {"down", "deep", "up", "last"}, (), ["y"])
    assert found == [["down"], ["both"], ["y"]]


@torch
@pytest.mark.usefixtures("has_torch")
def test_learned_codes_err_less_on_other_samples_than_those_of_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "STEPS", 100)
    model, other = layers((16, 48, 48, 4)), correlated(6, 5)
    expected = [sample["y"] for sample in run(model, other)]
    noise = {}
    for rounding in ("nearest", "descent", "reconstruct"):
        made = quantize(model, correlated(16, 1), settings=settings(scheme="int4", rounding=rounding, block=16))
        pairs = zip(expected, run(made.model, other), strict=True)
        noise[rounding] = sum(float(((y - found["y"]) ** 2).sum()) for y, found in pairs)
    assert noise["reconstruct"] < noise["descent"] < noise["nearest"], noise
    assert any("reconstruct took learned codes" in note for note in made.solution.notes)


@torch
@pytest.mark.usefixtures("has_torch")
def test_a_killed_run_goes_on_and_the_bytes_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "STEPS", 10)
    model, data = layers(), correlated(8, 1)
    whole = quantize(model, data, settings=settings(scheme="int4", block=16)).model.proto.SerializeToString()
    learn, calls = blockwise.learn, [0]

    def killed(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return learn(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(blockwise, "learn", killed)
    with caching(tmp_path):
        with pytest.raises(KeyboardInterrupt):
            quantize(model, data, settings=settings(scheme="int4", block=16))
        again = quantize(model, data, settings=settings(scheme="int4", block=16)).model.proto.SerializeToString()
    assert calls[0] == 4  # two blocks were kept, the third was begun twice
    assert again == whole


def weighted() -> list[Model]:
    grouped = build(
        [node("Conv", "x w", "y", name="c", group=2, pads=[1, 1, 1, 1])],
        {"x": (1, 6, 5, 5)},
        {"w": normal(4, 3, 1, 1)},
    )
    return [residual(), branches(), attention(), layers(), grouped]


@torch
@pytest.mark.usefixtures("has_torch")
@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("scheme", ["int8", "w4a8", "fptq", "int4"])
def test_every_block_is_computed_as_onnx_runtime_does(
    number: int, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with shifted data, whose correction follows the codes, and padded channels."""
    model = weighted()[number]
    seen = []

    def changed(block: learning.Block, fit: Sequence[learning.Example], held: object) -> dict[object, np.ndarray]:
        """Every code one less, where it has one below: as wrong as learned ones may be."""
        codes = {k: np.where(w.exact == 0, w.codes, np.maximum(w.codes - 1, w.low)) for k, w in block.weights.items()}
        made = learning._Seen(block, fit[0]).outputs({k: tensor(v) for k, v in codes.items()})
        seen.append({name: value.numpy() for name, value in made.items()})
        return codes

    monkeypatch.setattr(blockwise, "learn", changed)
    data = samples(model, 8, low=-1.0)
    made = quantized(model, data, scheme=scheme, rounding="nearest", equalize="none")
    monkeypatch.setattr(blockwise, "MOST_FIT", 4)
    work = blockwise._Blockwise(
        model=made.float_model,
        plan=made.plan,
        solution=made.solution,
        held=blockwise.Split(samples=data, fit=(3, 4, 5), held=frozenset((0,))),
    )
    weights = blockwise._weights(made.float_model, made.model, made.solution)
    if not weights:
        pytest.skip("the scheme quantizes nothing of this model")
    learned, notes = work.learned(weights, None)
    assert seen, notes
    # The last block's outputs, of the graph that `insert` makes of the changed codes.
    (found,) = run(insert(made.float_model, made.plan, learned), data[3:4])
    assert found.keys() & seen[-1].keys()
    for name in found.keys() & seen[-1].keys():
        np.testing.assert_allclose(seen[-1][name], found[name], rtol=1e-3, atol=1e-3 * np.abs(found[name]).max())


@torch
@pytest.mark.usefixtures("has_torch")
def test_an_operator_that_is_not_known_leaves_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(
        [
            node("MatMul", "x w", "p", name="product"),
            node("TopK", "p k", "v i", axis=-1),
            node("MatMul", "v u", "y", name="last"),
        ],
        {"x": (4, 16)},
        {"w": normal(16, 16), "u": normal(8, 4), "k": np.array([8], dtype=np.int64)},
    )
    monkeypatch.setattr(learning, "STEPS", 4)
    made = quantize(model, samples(model, 4), settings=settings(scheme="int8"))
    onnx.checker.check_model(made.model.proto)
    (said,) = (note for note in made.solution.notes if note.startswith("codes of"))
    assert "of 2 blocks" in said or "PyTorch has no TopK" in said


def test_without_pytorch_it_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    model = layers()
    with pytest.raises(MissingRuntimeError, match=r"pip install 'qdq\[torch\]'"):
        quantize(model, correlated(4, 0), settings=settings(scheme="int4"))
    path = tmp_path / "model.onnx"
    onnx.save(model.proto, path)
    data = save_samples(tmp_path / "data", [dict(s) for s in correlated(3, 0)])
    command = ["quantize", str(path), "--data", str(data), "--rounding", "reconstruct", "-o", str(tmp_path / "q.onnx")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 3
    assert "pip install 'qdq[torch]'" in done.output
