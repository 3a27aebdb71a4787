"""Forces that stay the gradient of the quantized energy: weights that are read both ways have one set of codes."""

from __future__ import annotations

import models
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from qdq import Settings, quantize
from qdq.core.errors import InputError

RNG = np.random.default_rng(3)
W, V = RNG.normal(size=(24, 16)).astype(np.float32), RNG.normal(size=(16,)).astype(np.float32)


def potential(*, again: int = 1, folded: bool = False) -> onnx.ModelProto:
    """energy = sum of v tanh(x W) over rows, forces = -its gradient by x; `again` products read that gradient.

    With `folded` their weight is a constant of its own, transposed.
    """
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "forward"),
        helper.make_node("Tanh", ["a"], ["b"], "tanh"),
        helper.make_node("Mul", ["b", "v"], ["c"], "weigh"),
        helper.make_node("ReduceSum", ["c"], ["energy"], "sum", keepdims=0),
        helper.make_node("Mul", ["b", "b"], ["d"], "square"),
        helper.make_node("Sub", ["one", "d"], ["e"], "slope"),
        helper.make_node("Mul", ["e", "v"], ["g"], "chain"),
        *(helper.make_node("Gemm", ["g", "w"], [f"f{i}"], f"gradient{i}", transB=1, alpha=1.0) for i in range(again)),
        helper.make_node("Sum", [f"f{i}" for i in range(again)], ["total"], "total"),
        helper.make_node("Neg", ["total"], ["forces"], "minus"),
    ]
    if folded:
        nodes[7:8] = [helper.make_node("MatMul", ["g", "turned"], ["f0"], "gradient0")]
    values = {"w": W, "v": V, "one": np.ones(1, np.float32), "turned": np.ascontiguousarray(W.T)}
    constants = [models.constant(name, array) for name, array in values.items()]
    return models.assemble(nodes, {"x": (8, 24)}, {"energy": (), "forces": (8, 24)}, constants)


def samples(count: int = 4) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    return [{"x": (rng.normal(size=(8, 24)) * np.linspace(0.1, 1, 24)).astype(np.float32)} for _ in range(count)]


def real(made: object, node: str) -> np.ndarray:
    """(inputs, outputs) the weight that a product multiplies its undivided data by."""
    solution = made.solution  # type: ignore[attr-defined]
    reader = solution.nodes[node]
    quantized = solution.weights[reader.key]
    shape = [1, 1]
    shape[quantized.params.axis] = -1
    values = quantized.codes.astype(np.float64) * quantized.params.scale.reshape(shape)
    values = values.T if reader.output_axis == 0 else values
    divisor = solution.divisors.get(reader.data)
    return values if divisor is None else values / np.asarray(divisor, np.float64)[:, None]


@pytest.mark.parametrize("scheme", ["int8", "w8a16"])
@pytest.mark.parametrize(("rounding", "folded"), [("nearest", False), ("gptq", False), ("nearest", True)])
def test_tied_gradients_multiply_by_the_same_numbers(scheme: str, rounding: str, folded: bool) -> None:
    plain = {"scheme": scheme, "rounding": rounding, "equalize": "none", "bias_correction": "off"}
    tied = quantize(potential(folded=folded), samples(), settings=Settings(**plain, gradients="tied"))
    np.testing.assert_allclose(real(tied, "forward"), real(tied, "gradient0").T, rtol=1e-6)
    assert "1 of 1 weights that a gradient reads again" in " ".join(tied.solution.notes)
    free = quantize(potential(), samples(), settings=Settings(**plain))
    assert np.abs(real(free, "forward") - real(free, "gradient0").T).max() > 1e-3


def test_tied_forces_are_the_gradient_of_the_energy_with_these_weights() -> None:
    settings = Settings(scheme="w8a16", rounding="nearest", bias_correction="off", gradients="tied")
    made = quantize(potential(), samples(), settings=settings)
    given = samples()[1]
    session = onnxruntime.InferenceSession(made.model.proto.SerializeToString())
    (found,) = session.run(["forces"], given)
    weight = real(made, "forward")
    slope = 1 - np.tanh(given["x"] @ weight) ** 2
    np.testing.assert_allclose(found, -(slope * V) @ weight.T, atol=2e-3 * np.abs(found).max())


def test_data_that_two_products_read_stay_free() -> None:
    settings = Settings(scheme="int8", rounding="nearest", bias_correction="off", gradients="tied")
    made = quantize(potential(again=2), samples(), settings=settings)
    assert "0 of " in next(note for note in made.solution.notes if "a gradient reads again" in note)


def test_another_word_is_refused() -> None:
    with pytest.raises(InputError, match="tied"):
        Settings(gradients="both")
