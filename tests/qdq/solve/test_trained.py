"""Scales and codes that a model came with are kept, and what it left in float is calibrated beside them."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import run
from onnx import helper, numpy_helper
from qat_models import FORMS, Form, four_bits, images, qat

from engines.backends import rtx
from engines.core.documents import replace
from engines.verify.audit import audit
from qdq.assemble.finish import finish
from qdq.assemble.quantize import Quantized, quantize
from qdq.core.errors import InputError
from qdq.lint.lint import lint
from qdq.plan.plan import Plan
from qdq.plan.settings import Settings

ALL = pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))


def made(form: Form, compiler: str = "rtx", **settings: object) -> Quantized:
    return quantize(qat(form), images(half=form.half), settings=Settings(compiler=compiler, **settings))  # type: ignore[arg-type]


def outputs(model: object, form: Form) -> np.ndarray:
    data = images(20, half=form.half, seed=9)
    return np.concatenate([out["y"].astype(np.float64) for out in run(model, data)])  # type: ignore[arg-type]


def db(wanted: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10((wanted**2).sum() / max(((wanted - found) ** 2).sum(), 1e-30)))


@ALL
@pytest.mark.parametrize("compiler", ["rtx", "tensorrt"])
def test_every_quantizer_of_a_product_is_kept(form: Form, compiler: str) -> None:
    result = made(form, compiler)
    plan, data, weights = result.plan, result.solution.activations, result.solution.weights
    own = {p.tensor for p in plan.points if p.trained}
    assert len(own) == (4 if form.skip else 6)
    assert {p.tensor for p in plan.points} - own == ({"flat", "w3"} if form.skip and compiler == "rtx" else set())
    exact = not (form.unsigned and compiler == "tensorrt")
    x = "x_Clip" if form.clipped else "x"
    assert float(data[x].scale) == pytest.approx(0.03, rel=1e-6 if not form.half else 1e-3) or not exact
    zero = 61 if form.clipped else 121
    assert data[x].zero_point == (zero - 128 if form.unsigned and exact else 0)
    codes = next(w for (tensor, _), w in weights.items() if tensor.startswith("w1"))
    values = (np.random.default_rng(0).normal(size=(8, 3, 3, 3)) * 0.2).astype(np.float16 if form.half else np.float32)
    if not form.eight:
        wide = codes.params.scale.reshape(-1, 1, 1, 1)
        np.testing.assert_array_equal(codes.codes, np.clip(np.rint(values / wide), -128, 127))
    assert codes.params.scale.size == (1 if form.per_tensor else 8)
    assert not lint(result.model)
    assert Plan.from_json(plan.to_json()) == plan
    least = 30 if form.eight or not exact else 40
    assert db(outputs(qat(form), form), outputs(result.model, form)) > least


@pytest.mark.parametrize("name", ["model optimizer", "duplicated"])
def test_where_all_is_kept_the_model_computes_the_same(name: str) -> None:
    form = FORMS[name]
    assert db(outputs(qat(form), form), outputs(made(form).model, form)) > 120


def test_a_zero_point_that_the_compiler_lacks_becomes_a_scale_that_covers_it() -> None:
    result = made(FORMS["torch.ao"], "tensorrt")
    assert any("had a zero point, which cannot be here" in note for note in result.solution.notes)
    scale = float(result.solution.activations["x"].scale)
    assert scale == pytest.approx(0.03 * (127 + 7) / 127, rel=1e-5)


def test_notes_say_what_is_kept_and_what_is_calibrated() -> None:
    notes = made(FORMS["part of it"]).solution.notes
    assert "the scales of 2 and the codes of 2 are kept" in notes[0]
    assert notes[1].startswith("2 operands that had none, or none of this form, are calibrated: flat, w3")
    left = made(FORMS["pytorch-quantization"], exclude=("/c2/Conv",)).solution.notes
    assert any("stay float, for no kernel of TensorRT-RTX reads their codes: r1" in note for note in left)


def test_a_normalization_behind_keeps_the_codes_and_scales_their_scales() -> None:
    """BatchNormalization that training did not fold: its factors become factors of the scales, negative ones too."""
    proto = qat("pytorch-quantization")
    factors = np.float32([1, -2, 0.5, 3, 1, -1, 0.25, 2])
    conv = next(n for n in proto.graph.node if n.name == "/c1/Conv")
    rest = {
        "n.s": factors,
        "n.b": np.zeros(8, np.float32),
        "n.m": np.zeros(8, np.float32),
        "n.v": np.ones(8, np.float32),
    }
    proto.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in rest.items())
    conv.output[0] = "before"
    index = list(proto.graph.node).index(conv) + 1
    norm = helper.make_node("BatchNormalization", ["before", *rest], ["c1"], "norm", epsilon=0.0)
    proto.graph.node.insert(index, norm)
    result = quantize(proto, images(), settings=Settings())
    (codes,) = [w for (tensor, _), w in result.solution.weights.items() if tensor.startswith("w1")]
    plain = next(w for (tensor, _), w in made(Form()).solution.weights.items() if tensor.startswith("w1"))
    np.testing.assert_allclose(codes.params.scale, plain.params.scale * np.abs(factors), rtol=1e-5)
    np.testing.assert_array_equal(codes.codes, plain.codes * np.sign(factors).astype(np.int8).reshape(-1, 1, 1, 1))


@pytest.mark.parametrize("name", ["pytorch-quantization", "torch.ao", "half", "fp8"])
def test_the_engine_runs_what_was_trained(name: str) -> None:
    result = made(FORMS[name])
    shipped = finish(result.model, result.plan, unquantized_type="fp16", table=result.table).model
    found = audit(shipped.proto, rtx.build(shipped.proto, targets=("sm89",)).table)
    assert not found.missed
    assert found.share("fp8" if name == "fp8" else "int8") > 0.9


def test_an_edited_plan_cannot_keep_what_is_not_there() -> None:
    plan = made(FORMS["part of it"]).plan
    points = tuple(replace(p, trained=True) if p.tensor == "flat" else p for p in plan.points)
    with pytest.raises(InputError, match="keeps the scale that 'flat' came with"):
        quantize(qat("part of it"), images(), plan=replace(plan, points=points))


@pytest.mark.parametrize("compiler", ["rtx", "tensorrt"])
def test_blocks_of_four_bits_are_kept_where_the_compiler_has_their_length(compiler: str) -> None:
    proto, weight = four_bits(traced=False, inputs=128, block=64)
    data = [{"x": np.random.default_rng(i).normal(size=(4, 128)).astype(np.float32)} for i in range(3)]
    result = quantize(proto, data, settings=Settings(compiler=compiler))
    [point], [codes] = result.plan.points, result.solution.weights.values()
    assert point.trained and (point.spec.format, point.spec.block) == ("int4", 64)
    wide = np.repeat(codes.params.scale, 64, axis=codes.params.axis)
    made = codes.codes.astype(np.float32) * wide
    np.testing.assert_allclose(made if made.shape == weight.shape else made.T, weight, rtol=1e-6)
    assert "the codes of 1 are kept" in " ".join(result.solution.notes)
    short = quantize(four_bits(traced=False, inputs=128, block=16)[0], data, settings=Settings(compiler="tensorrt"))
    assert not any(p.trained for p in short.plan.points) and "calibrated" in " ".join(short.solution.notes)
