"""The error of each quantized tensor is that of its own rounding, as computed apart."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from models import assemble, constant, images, segmenter

from qdq.assemble.finish import finish
from qdq.assemble.quantize import Quantized, quantize
from qdq.core.formats import FORMATS
from qdq.deploy.costs import errors
from qdq.deploy.costs.errors import tensor_errors
from qdq.deploy.steps.shipped import told_of
from qdq.model.model import Model
from qdq.plan.settings import Settings

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")


def made(**settings: object) -> tuple[Quantized, Model]:
    done = quantize(segmenter(), images(4), settings=Settings(**settings))  # type: ignore[arg-type]
    return done, finish(done.model, done.plan, unquantized_type="fp32", table=done.table).model


@pytest.mark.parametrize("shift", [True, False])
def test_the_error_of_an_input_is_that_of_its_codes(shift: bool) -> None:
    done, finished = made(shift=shift, equalize="none")
    samples = images(3, seed=9)
    found = tensor_errors(told_of(done), finished, samples)
    assert found.samples == 3 and not found.why
    assert set(found.sqnr_db) == {(p.role, p.tensor) for p in done.plan.points}
    params = done.solution.activations["image"]
    fmt, scale = FORMATS[params.format], float(params.scale)
    x = np.stack([s["image"] for s in samples]).astype(np.float64)
    codes = np.clip(np.rint(x / scale) + params.zero_point, fmt.low, fmt.high)
    noise = x - (codes - params.zero_point) * scale
    expected = 10 * np.log10((x**2).sum() / (noise**2).sum())
    assert found.sqnr_db["activation", "image"] == pytest.approx(expected, abs=0.05)
    assert all(15 < db < 80 for db in found.sqnr_db.values())


def test_as_many_samples_are_run_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    done, finished = made()
    assert tensor_errors(told_of(done), finished, images(40)).samples == errors.SAMPLES
    monkeypatch.setattr(errors, "VALUES", images(1)[0]["image"].size + 1)
    assert tensor_errors(told_of(done), finished, images(40)).samples == 2


def test_nothing_quantized_and_large_models(monkeypatch: pytest.MonkeyPatch) -> None:
    done, finished = made()
    nothing, plain = made(exclude=("*",))
    assert tensor_errors(told_of(nothing), plain, images(1)).sqnr_db == {}
    monkeypatch.setattr(errors, "is_large", lambda _: True)
    assert tensor_errors(told_of(done), finished, images(1)).why == errors.LARGE


def test_a_model_that_does_not_run_gives_the_reason() -> None:
    done, finished = made()
    broken = onnx.ModelProto()
    broken.CopyFrom(finished.proto)
    broken.graph.node[0].op_type = "NoSuchOperator"
    found = tensor_errors(told_of(done), finished.replace(broken), images(1))
    assert found.sqnr_db == {} and "not measured" in found.why


def mlp() -> onnx.ModelProto:
    """x (rows, 64) -> two products with a Relu between them."""
    rng = np.random.default_rng(0)
    weights = {"first": rng.normal(0, 0.2, (64, 64)), "second": rng.normal(0, 0.2, (64, 64))}
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "first"], ["h"], name="/first"),
        onnx.helper.make_node("Relu", ["h"], ["r"], name="/relu"),
        onnx.helper.make_node("MatMul", ["r", "second"], ["y"], name="/second"),
    ]
    tensors = [constant(name, array.astype(np.float32)) for name, array in weights.items()]
    return assemble(nodes, {"x": (128, 64)}, {"y": (128, 64)}, tensors)


@pytest.mark.parametrize(
    "settings", [{}, {"scheme": "int4", "block": 32}, {"scheme": "w4a8"}, {"equalize": "smooth"}], ids=str
)
def test_every_weight_has_an_error_that_fits_its_bits(settings: dict[str, object]) -> None:
    rng = np.random.default_rng(1)
    samples = [{"x": rng.normal(size=(128, 64)).astype(np.float32)} for _ in range(3)]
    done = quantize(mlp(), samples, settings=Settings(**settings))  # type: ignore[arg-type]
    finished = finish(done.model, done.plan, unquantized_type="fp16", table=done.table).model
    found = tensor_errors(told_of(done), finished, samples)
    bits = {p.tensor: FORMATS[p.spec.format].bits for p in done.plan.weights}
    assert not found.why and {tensor for role, tensor in found.sqnr_db if role == "weight"} == set(bits) != set()
    for tensor, count in bits.items():  # 6 dB a bit, less the peaks of normal values
        assert 6 * count - 15 < found.sqnr_db["weight", tensor] < 6 * count + 2, (tensor, count)
