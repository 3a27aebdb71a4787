"""Every scheme from settings to the compiled engine: placement, numerics of the written graph, kernels, refusals."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import graphs
import numpy as np
import onnx
import pytest
from graphs import Made, build, node, normal, quantized
from places import SHARED

from engines import ShapeRange
from engines.backends import rtx
from engines.backends.compiler import Engine
from engines.core.documents import replace
from engines.core.errors import UnsupportedTargetError
from engines.verify.audit import audit
from qdq.assemble import quantize
from qdq.assemble.insert import insert
from qdq.assemble.precision.convert import convert
from qdq.core.errors import InputError
from qdq.core.formats import FORMATS
from qdq.lint.lint import lint
from qdq.lint.repair.repair import repair
from qdq.measure import collect, second_moments
from qdq.model.model import Model
from qdq.plan import placement
from qdq.plan.plan import Plan
from qdq.plan.scheme import SCHEMES
from qdq.plan.settings import Settings
from qdq.plan.spec import Spec
from qdq.plan.weighted_node import weighted_nodes
from qdq.solve import solve
from qdq.solve.equalize.weight_only import balanced
from qdq.solve.rounding import gptq
from qdq.solve.weights import quantize_weight

STORIES = SHARED / "models" / "stories260k"


def mlp(inner: int = 43, *, batch: tuple[int | str, ...] = (2, 5)) -> Model:
    """x (..., 64) -> MatMul 64 x 4 inner -> Relu -> Gemm-like MatMul 4 inner x 32 -> y; 172 inputs by default."""
    nodes = [node("MatMul", "x a", "h", name="up"), node("Relu", "h", "r"), node("MatMul", "r b", "y", name="down")]
    return build(nodes, {"x": (*batch, 64)}, {"a": normal(64, 4 * inner) / 8, "b": normal(4 * inner, 32, seed=1) / 13})


def gemm(transposed: int = 1) -> Model:
    shape = (32, 64) if transposed else (64, 32)
    return graphs.product("Gemm", shape, (6, 64), bias=(32,), transB=transposed)


def mixed() -> Model:
    """Conv -> Relu -> GlobalAveragePool -> Flatten -> Gemm."""
    nodes = [
        node("Conv", "x w", "c"),
        node("Relu", "c", "r"),
        node("GlobalAveragePool", "r", "p"),
        node("Flatten", "p", "f"),
        node("Gemm", "f g b", "y", transB=1),
    ]
    tensors = {"w": normal(64, 4, 3, 3) / 6, "g": normal(8, 64), "b": normal(8)}
    return build(nodes, {"x": (2, 4, 8, 8)}, tensors)


MODELS: dict[str, Callable[[], Model]] = {
    "MatMul padded": mlp,
    "MatMul": lambda: mlp(32),
    "dynamic": lambda: mlp(batch=("n", "t")),
    "Gemm": lambda: gemm(0),
    "Gemm transB": gemm,
    "Conv and Gemm": mixed,
    "batched": lambda: graphs.product(weight=(3, 64, 16), data=(3, 5, 64)),
}


def case(name: str, **settings: Any) -> Made:
    model = MODELS[name]()
    return quantized(model, graphs.samples(model, 6), **settings)


def points(made: Made | Plan) -> dict[str, Spec]:
    plan = made if isinstance(made, Plan) else made.plan
    return {p.tensor: p.spec for p in plan.points}


# -- placement ---------------------------------------------------------------------------------------------------------


def test_weight_only_schemes_leave_data_and_convolutions_in_float() -> None:
    for scheme, expected in (
        ("int4", Spec(format="int4", axis=1, block=16, weight_only=True)),
        ("nvfp4-weight", Spec(format="nvfp4", axis=1, block=16, weight_only=True)),
        ("int8-weight", Spec(format="int8", axis=0, weight_only=True)),
    ):
        made = placement.plan(mixed(), Settings(scheme=scheme))
        assert points(made) == {"g": expected}
        assert {s.node: s.rule for s in made.skips}["conv"] == "weight_only"


def test_two_level_schemes_keep_convolutions_in_int8() -> None:
    made = placement.plan(mixed(), Settings(scheme="w4a8"))
    assert points(made) == {
        "x": Spec(format="int8", shift=True),
        "w": Spec(format="int8", axis=0),
        "f": Spec(format="int8", shift=True),
        "g": Spec(format="int4", axis=1, block=16, compute_format="int8"),
    }
    assert points(placement.plan(mixed(), Settings(scheme="fptq")))["f"].token == "fptq"


def test_an_axis_that_no_block_divides_is_padded_and_the_plan_says_so() -> None:
    made = placement.plan(mlp(), Settings(scheme="int4", block=128))
    found = {p.tensor: (p.spec.block, p.reason) for p in made.points}
    assert found == {
        "a": (64, "blocks of 128 do not divide its 64 inputs"),
        "b": (64, "blocks of 128 do not divide its 172 inputs; padded with 20 zeros"),
    }
    assert "padded with 20 zeros" in "\n".join(made.explain("down"))
    assert Plan.from_mapping(json.loads(made.to_json())) == made


@pytest.mark.parametrize("schemes", [("w4a8", "int4"), ("int4", "w4a8")])
def test_readers_of_one_padded_tensor_get_codes_or_floats_as_each_scheme_says(schemes: tuple[str, str]) -> None:
    nodes = [node("MatMul", "x a", "y", name="one"), node("MatMul", "x b", "z", name="two")]
    model = build(nodes, {"x": (5, 120)}, {"a": normal(120, 8), "b": normal(120, 8, seed=1)}, outputs=("y", "z"))
    overrides = dict(zip(("one", "two"), schemes, strict=True))
    written = quantized(model, graphs.samples(model, 4), block=128, scheme="w4a8", overrides=overrides).model
    for name, scheme in overrides.items():
        made_by = written.producer(written.node(name).input[0])
        assert made_by is not None and made_by.op_type == {"w4a8": "DequantizeLinear", "int4": "Pad"}[scheme]


def test_the_block_of_each_weight_follows_its_values() -> None:
    """Normal values gain by short blocks; one outlier in each block of 16 leaves nothing to gain."""
    uneven = normal(128, 8) / 10
    uneven[::16] = 1
    model = build(
        [node("MatMul", "x a", "y", name="one"), node("MatMul", "x b", "z", name="two")],
        {"x": (5, 128)},
        {"a": normal(128, 8), "b": uneven},
        outputs=("y", "z"),
    )
    for scheme in ("int4", "w4a8"):
        plan = placement.plan(model, Settings(scheme=scheme))
        assert {p.tensor: p.spec.block for p in plan.weights} == {"a": 16, "b": 128}
    assert "least error per bit" in "\n".join(plan.explain("two"))


def test_nvfp4_wants_blocks_of_16_on_both_operands_and_leaves_the_rest_in_float() -> None:
    made = placement.plan(mlp(), Settings(scheme="nvfp4"))
    found = points(made)
    assert "activation 'x': nvfp4 in blocks of 16, scaled as the engine runs" in "\n".join(made.explain("up"))
    assert found == {
        "x": Spec(format="nvfp4"),
        "a": Spec(format="nvfp4", axis=0, block=16),
        "r": Spec(format="nvfp4"),
        "b": Spec(format="nvfp4", axis=0, block=16),
    }
    cases: list[tuple[Model, str]] = [
        (graphs.product(), "6 inputs do not fill blocks of 16"),
        (MODELS["batched"](), "times one matrix"),
        (graphs.product(weight=(64, 16), data=(2, 3, 5, 64)), "matrices and batches"),
        (graphs.product("Gemm", (64, 32), (64, 6), transA=1), "does not run over the last axis"),
        (graphs.conv(), "no convolution of nvfp4"),
    ]
    for model, reason in cases:
        plan = placement.plan(model, Settings(scheme="nvfp4"))
        assert not plan.points
        assert any(reason in s.reason for s in plan.skips)


@pytest.mark.parametrize("scheme", ["int4", "w4a8"])
def test_an_axis_shorter_than_a_block_falls_back_to_int8_with_a_reason(scheme: str) -> None:
    made = placement.plan(graphs.product(), Settings(scheme=scheme))
    (weight,) = made.weights
    assert weight.spec == Spec(format="int8", axis=1, weight_only=scheme == "int4")
    assert "its 6 inputs do not fill blocks of 16" in weight.reason


def test_overrides_mix_schemes_by_node_and_a_pattern_that_matches_nothing_is_an_error() -> None:
    settings = Settings.from_mapping({"scheme": "int8", "overrides": {"do*": "int4"}})
    assert Settings.from_mapping(settings.to_mapping()) == settings
    found = points(placement.plan(mlp(), settings))
    assert found["a"] == Spec(format="int8", axis=1)
    assert found["b"].format == "int4"
    assert "r" not in found
    with pytest.raises(InputError, match=r"override pattern '\*/mlp/\*' matches none"):
        placement.plan(mlp(), Settings(overrides={"*/mlp/*": "int4"}))
    model = build(
        [node("MatMul", "x a", "y", name="one"), node("MatMul", "x b", "z", name="two")],
        {"x": (5, 64)},
        {"a": normal(64, 8), "b": normal(64, 8)},
        outputs=("y", "z"),
    )
    with pytest.raises(InputError, match="'two' would read 'x' in another form than 'one'"):
        placement.plan(model, Settings(overrides={"two": "fp8"}))
    both = quantized(model, graphs.samples(model), overrides={"two": "int4"}, rounding="nearest")
    readers = {n.name: n.input[0] for n in both.model.graph.node if n.op_type == "MatMul"}
    assert readers["two"] == "x" != readers["one"]


def test_a_tensor_read_by_a_convolution_has_one_scale_whatever_the_scheme() -> None:
    nodes = [node("Conv", "x w", "c"), node("MatMul", "x m", "y")]
    model = build(nodes, {"x": (1, 4, 16, 16)}, {"w": normal(8, 4, 1, 1), "m": normal(16, 8)}, outputs=("c", "y"))
    assert points(placement.plan(model, Settings(scheme="fptq")))["x"].token is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block": 48}, "block is 48: it must be one of 128, 64"),
        ({"block": True}, "block is True"),
        ({"scheme": "w4a8", "block": "tensor"}, "weight-only scheme int4"),
        ({"scheme": "nvfp4", "block": "channel"}, "weight-only scheme int4"),
        ({"damping": 0}, "damping is 0: it must be a number of at least 0.0001"),
        ({"act_order": 1}, "act_order is 1"),
        ({"moment_inputs": 2.5}, "moment_inputs is 2.5"),
        ({"v0": -1}, "v0 is -1"),
        ({"v0": 20, "v1": 10}, "v1 is 10: it must be a number of at least v0"),
        ({"block_loss_db": 4.0}, "Unknown setting 'block_loss_db'"),
        ({"equalize": "cle"}, "Unknown equalize 'cle'"),
        ({"overrides": ["int4"]}, "overrides is .*: it must be a mapping"),
        ({"overrides": {"*": "int44"}}, "Did you mean 'int4'"),
        ({"scheme": "int8_weight"}, "Did you mean 'int8-weight'"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Settings.from_mapping(values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"block": 16}, "block 16"),
        ({"scheme": "nvfp4", "block": 64}, "block 64"),
        ({"rounding": "clip"}, "rounding clip"),
        ({"scheme": "fp8", "rounding": "gptq"}, "rounding gptq"),
        ({"equalize": "awq"}, "equalize awq"),
        ({"scheme": "nvfp4", "equalize": "smooth"}, "equalize smooth"),
        ({"scheme": "nvfp4", "equalize": "sinq"}, "equalize sinq"),
        ({"scheme": "int4", "equalize": "lae"}, "equalize lae"),
        ({"percentile": 99.9}, "percentile 99.9"),
        ({"scheme": "int4", "calibrator": "percentile"}, "calibrator percentile"),
        ({"scheme": "fp8", "shift": False}, "shift False"),
        ({"rounding": "nearest", "damping": 0.5}, "damping 0.5"),
        ({"rounding": "nearest", "act_order": False}, "act_order False"),
        ({"scheme": "int4", "rounding": "clip", "equalize": "sinq", "moment_inputs": 64}, "moment_inputs 64"),
        ({"v0": 3}, "v0 3"),
        ({"scheme": "w4a8", "v1": "auto"}, "v1 auto"),
    ],
)
def test_a_setting_without_effect_is_named(values: dict[str, object], said: str) -> None:
    (sentence,) = Settings.from_mapping(values).idle
    assert sentence.startswith(said) and "no effect" in sentence
    model = build([node("MatMul", "x w", "y")], {"x": (4, 64)}, {"w": normal(64, 8)})
    made = quantize.quantize(model, graphs.samples(model, 3), settings=Settings.from_mapping(values))
    assert sentence in made.solution.notes


def test_defaults_and_what_they_replace_have_an_effect() -> None:
    for name in SCHEMES:
        assert Settings(scheme=name).idle == ()
    assert Settings(block=32, overrides={"*": "int4"}).idle == ()
    for scheme in ("int4", "w4a8", "fptq", "nvfp4"):
        assert Settings(scheme=scheme, rounding="clip").idle == ()
    for calibrator in ("percentile", "auto"):
        assert Settings(calibrator=calibrator, percentile=99.9).idle == ()
    assert Settings(damping=0.5, act_order=False, moment_inputs=64, shift=False).idle == ()
    assert Settings(scheme="int4", rounding="clip", moment_inputs=64).idle == ()  # AWQ balances channels by them
    assert Settings(overrides={"*": "fptq"}, v0=3, v1="auto").idle == ()


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_an_empty_weight_stays_float(scheme: str) -> None:
    model = build([node("MatMul", "x w", "y")], {"x": (4, 0)}, {"w": np.zeros((0, 8), np.float32)})
    assert not placement.plan(model, Settings(scheme=scheme)).points


def test_defaults_follow_the_scheme_unless_given() -> None:
    assert (Settings().rounding, Settings().equalize, Settings().shift) == ("auto", "auto", "auto")
    settled = Settings(scheme="int4").settled
    assert (settled.rounding, settled.equalize, settled.shift, settled.open) == ("descent", "awq", True, ())
    assert Settings(scheme="int4", rounding="clip").rounding == "clip"
    assert (Settings(scheme="fp8").rounding, Settings(scheme="int8-smooth").equalize) == ("nearest", "smooth")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "int4", "axis": 0, "block": 64}, "wrong. Set compute_format to int8"),  # one-level W4A8
        ({"format": "int8", "axis": 0, "block": 64}, "int8 has no blocks at all"),
        ({"format": "int4", "axis": 0, "block": 48, "weight_only": True}, "int4 has 128, 64, 32, 16"),
        ({"format": "int4", "axis": None, "block": 64, "weight_only": True}, "along an axis"),
        ({"format": "int4", "axis": 0, "compute_format": "int8"}, "needs a block"),
        ({"format": "int4", "axis": 0, "block": 64, "compute_format": "int4"}, "more bits than int4"),
        ({"format": "nvfp4", "axis": 0, "block": 16, "compute_format": "int8"}, "blocks of integers"),
        ({"format": "int8", "token": "sometimes"}, "Unknown token"),
    ],
)
def test_specs_that_no_kernel_computes_rightly_cannot_be_written(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Spec(**values)


def test_a_plan_edited_to_quantize_the_data_of_weight_only_blocks_is_refused() -> None:
    model = gemm()
    made, plain = (placement.plan(model, Settings(scheme=s)) for s in ("int4", "int8"))
    with pytest.raises(InputError, match="whose weight is weight_only"):
        replace(made, points=(*plain.activations, *made.weights)).check(model)
    with pytest.raises(InputError, match="needs both"):
        replace(plain, points=plain.weights).check(model)


def test_targets_without_the_format_are_refused_by_name() -> None:
    Settings().profile.require_formats(Settings(scheme="int4").formats, ["sm80", "sm120"])
    Settings().profile.require_formats(Settings().formats, ["sm75"])
    for scheme, target in (("int4", "sm75"), ("w4a8", "7.5"), ("fp8", "sm86"), ("nvfp4", "sm89")):
        with pytest.raises(UnsupportedTargetError, match=f"{target} cannot compile"):
            Settings().profile.require_formats(Settings(scheme=scheme).formats, [target, "sm89"])
    assert Settings(overrides={"*": "fp8"}).formats == {"int8", "fp8"}


# -- numerics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "nvfp4"])  # whose data no standard operator quantizes
@pytest.mark.parametrize("name", MODELS)
def test_the_written_graph_computes_what_real_numbers_and_zero_points_would(name: str, scheme: str) -> None:
    """Each quantized operand read through ONNX's own zero points, each weight as the floats of its codes."""
    made = case(name, scheme=scheme)
    assert made.plan.quantized_nodes
    data = [graphs.off_ties(made, s) for s in graphs.samples(made.float_model, 3, seed=11)]
    found, expected = graphs.run(made.model, data), graphs.run(graphs.intended(made), data)
    plain = graphs.run(made.float_model, data)
    for got, wanted, full in zip(found, expected, plain, strict=True):
        error = np.abs(got["y"] - wanted["y"])
        # an inner tensor may round the other way at a tie, which changes few outputs by one step of it
        assert np.mean(error > 1e-5 * np.abs(wanted["y"]).max()) < 0.05
        bits = min(4, *(FORMATS[p.spec.format].bits for p in made.plan.points))
        noise = 0.08 * 4 ** (4 - bits)  # 11 dB at 4 bits with few samples, 6 dB less for each bit less
        assert np.sum((got["y"] - full["y"]) ** 2) < noise * np.sum(full["y"] ** 2)


def fp4_oracle(x: np.ndarray, second: float) -> np.ndarray:
    """float64: rows of x in blocks of 16 of the last axis as NVFP4 stores them, by the values of its two grids."""
    e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    blocks = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % 16)]).reshape(*x.shape[:-1], -1, 16)
    scale = np.float32(np.abs(blocks).max(axis=-1, keepdims=True)) / np.float32(6) / np.float32(second)
    scale = np.minimum(scale, 448).astype(FORMATS["fp8"].dtype).astype(np.float64) * second
    steps = np.abs(blocks) / np.where(scale == 0, 1, scale)
    nearest = e2m1[np.abs(steps[..., None] - e2m1).argmin(axis=-1)]
    return np.asarray((np.sign(blocks) * nearest * scale).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]])


@pytest.mark.parametrize("name", ["MatMul", "MatMul padded", "Gemm", "Gemm transB", "dynamic"])
def test_nvfp4_products_are_those_of_the_definition(name: str) -> None:
    model = MODELS[name]()
    data = graphs.samples(model, 4)
    for sample in data:
        sample["x"].reshape(-1, 64)[0] *= 100
        sample["x"].reshape(-1, 64)[-1, :32] = 0  # blocks without a scale
    made = quantized(model, data, scheme="nvfp4", rounding="nearest")
    first = next(n for n in model.graph.node if n.op_type in ("MatMul", "Gemm"))
    weight = next(p for p in made.plan.weights if p.tensor == first.input[1])
    float_weight = model.array(first.input[1]).astype(np.float64)
    values = graphs.read_values(made, weight).astype(np.float64)
    if weight.spec.axis == 0:
        float_weight, values = float_weight.T, values.T
    second = made.solution.weights[weight.tensor, weight.spec.axis].params.second
    assert second is not None
    assert np.mean(values != fp4_oracle(float_weight, second)) < 0.01  # ties, and last bits of float32
    bias = model.array(first.input[2]) if len(first.input) > 2 else 0
    proto = onnx.ModelProto()
    proto.CopyFrom(made.model.proto)
    proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(first.output[0]))
    for sample, found in zip(data, graphs.run(proto, data), strict=True):
        read = fp4_oracle(sample["x"].astype(np.float64), float(made.solution.activations["x"].scale))
        expected = read @ values.T + bias
        row = np.abs(expected).max(axis=-1, keepdims=True) + 1e-6
        assert np.mean(np.abs(found[first.output[0]] - expected) > 1e-4 * row) < 0.02


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_written_graph_holds_codes_of_the_scheme_only(scheme: str) -> None:
    made = case("MatMul padded", scheme=scheme, block=32)
    stored = {t.name: t for t in made.model.graph.initializer}
    producers = {o: n for n in made.model.graph.node for o in n.output}
    row = SCHEMES[scheme]
    for name in made.plan.quantized_nodes:
        kernel = made.model.node(name)
        weight = producers[kernel.input[1]]
        read = (stored[weight.input[2]] if row.compute_format else stored[weight.input[0]]).data_type
        assert read == FORMATS[row.compute_format or row.weight].onnx_type
        blocked = [
            n
            for n in made.model.graph.node
            if n.op_type == "DequantizeLinear" and any(a.name == "block_size" for a in n.attribute)
        ]
        if scheme == "nvfp4":
            assert len(blocked) == 4  # both operands of two products
            continue
        for n in blocked:  # never straight into a product with quantized data
            readers = made.model.consumers(n.output[0])
            assert [u.node.op_type for u in readers] == (["QuantizeLinear"] if row.compute_format else ["MatMul"])
            assert (
                row.compute_format or producers[readers[0].node.input[0]].op_type in ("Mul", "Pad", "Relu")
                if row.data
                else True
            )
        assert len(blocked) == (2 if FORMATS[row.weight].blocks else 0)
    for n in made.model.graph.node:
        if n.op_type in ("QuantizeLinear", "DequantizeLinear"):
            if scheme.startswith("nvfp4") and n.input[1] not in stored:
                assert producers[n.input[1]].op_type == "DequantizeLinear"  # block scales are codes themselves
                continue
            assert (onnx.numpy_helper.to_array(stored[n.input[1]]) > 0).all()
    packed = {f.onnx_type: 8 // f.bits for f in FORMATS.values()}  # codes in a byte
    assert all(np.prod(t.dims) % packed.get(t.data_type, 1) == 0 for t in stored.values())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_written_graph_passes_lint_and_needs_no_repair(scheme: str) -> None:
    model = case("Conv and Gemm", scheme=scheme, **({"v0": 0, "v1": 0} if scheme == "fptq" else {})).model
    assert not lint(model)
    assert not repair(model).changes


def per_token_oracle(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """float64: each row of x quantized with its own scale max|x| / 127."""
    scale = np.maximum(np.abs(x).max(axis=-1, keepdims=True) / 127, 2.0**-14)
    return np.asarray(scale * (np.clip(np.rint(x / scale), -128, 127) @ weight))


@pytest.mark.parametrize("name", ["MatMul", "Gemm", "Gemm transB", "dynamic"])
def test_per_token_data_are_exact_per_token_quantization(name: str) -> None:
    model = MODELS[name]()
    data = graphs.samples(model, 4)
    for sample in data:
        sample["x"][0] *= 1000  # rows of very different size
        sample["x"].reshape(-1, 64)[-1] = 0
    made = quantized(model, data, scheme="fptq", v0=0, v1=0)
    assert "x" in made.solution.tokens
    first = next(n for n in made.float_model.graph.node if n.op_type in ("MatMul", "Gemm"))
    weight = next(p for p in made.plan.weights if p.tensor == first.input[1])
    values = graphs.read_values(made, weight).astype(np.float64)
    values = values.T if weight.spec.axis == 1 else values
    bias = model.array(first.input[2]) if len(first.input) > 2 else 0
    proto = onnx.ModelProto()
    proto.CopyFrom(made.model.proto)
    proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(first.output[0]))
    for sample, found in zip(data, graphs.run(proto, data), strict=True):
        expected = per_token_oracle(sample["x"].astype(np.float64), values) + bias
        row = np.abs(expected).max(axis=-1, keepdims=True) + 1e-6
        assert np.mean(np.abs(found[first.output[0]] - expected) > 1e-4 * row) < 0.01  # but for ties in float32


def test_fptq_chooses_by_range() -> None:
    """v0 < range <= v1 is equalized, beyond v1 one scale per token, below v0 neither."""
    powers = np.exp(np.linspace(0, 4, 64)).astype(np.float32)  # channels of 1 to 55 times the smallest
    model = build([node("MatMul", "x w", "y")], {"x": (20, 64)}, {"w": normal(64, 16) / powers[:, None]})
    data = [{"x": s["x"] * powers} for s in graphs.samples(model, 4)]
    top = float(max(np.abs(s["x"]).max() for s in data))
    for v0, v1, tokens, divided in ((2 * top, 3 * top, 0, 0), (top / 2, 2 * top, 0, 1), (top / 4, top / 2, 1, 0)):
        solution = quantized(model, data, scheme="fptq", v0=v0, v1=v1).solution
        assert (len(solution.tokens), len(solution.divisors)) == (tokens, divided)


def test_data_that_cannot_have_a_scale_per_token_keep_one_and_a_note_says_so() -> None:
    model = graphs.product("Gemm", (64, 32), (64, 6), transA=1)
    made = quantized(model, graphs.samples(model), scheme="fptq", v0=0, v1=0)
    assert not made.solution.tokens
    assert any("1 tensors keep one scale" in n for n in made.solution.notes)


@pytest.mark.parametrize("equalize", ["smoothquant", "smooth", "lae"])
@pytest.mark.parametrize("scheme", ["int8", "w4a8"])
def test_every_formula_leaves_the_float_outputs_equal(scheme: str, equalize: str) -> None:
    powers = np.ones(64, np.float32)
    powers[0] = 100
    model = build([node("MatMul", "x w", "y")], {"x": (20, 64)}, {"w": normal(64, 16) / powers[:, None]})
    data = [{"x": s["x"] * powers} for s in graphs.samples(model, 4)]
    made = quantized(model, data, scheme=scheme, equalize=equalize)
    plain = quantized(model, data, scheme=scheme, equalize="none")
    assert "x" in made.solution.divisors
    errors = []
    for candidate in (made, plain):
        pairs = zip(graphs.run(candidate.model, data), graphs.run(model, data), strict=True)
        errors.append(sum(np.sum((a["y"] - b["y"]) ** 2) for a, b in pairs))
    assert errors[0] < 0.5 * errors[1]


def test_awq_balances_channels_for_weight_only_blocks() -> None:
    powers = np.exp(np.random.default_rng(0).normal(size=64)).astype(np.float32) ** 2
    model = graphs.product(weight=(64, 16), data=(20, 64))
    data = [{"x": s["x"] * powers} for s in graphs.samples(model, 4)]
    errors = {}
    for equalize in ("awq", "none"):
        made = quantized(model, data, scheme="int4", rounding="nearest", equalize=equalize)
        assert ("x" in made.solution.divisors) == (equalize == "awq")
        pairs = zip(graphs.run(made.model, data), graphs.run(model, data), strict=True)
        errors[equalize] = sum(np.sum((a["y"] - b["y"]) ** 2) for a, b in pairs)
    assert errors["awq"] < errors["none"]


def test_sinq_balances_channels_for_weight_only_blocks_without_data() -> None:
    columns = np.exp(np.random.default_rng(0).normal(size=64)).astype(np.float32)
    model = build([node("MatMul", "x w", "y")], {"x": (20, 64)}, {"w": normal(64, 16) * columns[:, None]})
    data, errors = graphs.samples(model, 4), {}
    for equalize in ("sinq", "none"):
        plan = placement.plan(model, Settings(scheme="int4", rounding="nearest", equalize=equalize))
        solution = solve.solve(model, plan, collect.collect(model, plan, data))
        assert ("x" in solution.divisors) == (equalize == "sinq")
        pairs = zip(graphs.run(insert(model, plan, solution), data), graphs.run(model, data), strict=True)
        errors[equalize] = sum(np.sum((a["y"] - b["y"]) ** 2) for a, b in pairs)
    assert errors["sinq"] < 0.8 * errors["none"]


@pytest.mark.parametrize("scheme", ["int4", "w4a8", "fptq"])
def test_the_order_of_the_samples_changes_nothing(scheme: str) -> None:
    model = mlp(16)
    data = graphs.samples(model, 6)
    first, other = (quantized(model, d, scheme=scheme, rounding="gptq") for d in (data, data[::-1]))
    assert first.model.proto.SerializeToString(deterministic=True) == other.model.proto.SerializeToString(
        deterministic=True
    )


@pytest.mark.parametrize("scheme", ["int4", "w4a8", "int8-weight"])
def test_without_samples_weights_are_rounded_without_data(scheme: str) -> None:
    model = mlp(16)
    plan = placement.plan(model, Settings(scheme=scheme))
    table = collect.collect(model, plan, graphs.samples(model))
    solution = solve.solve(model, plan, table)
    assert any("only a table was given" in n for n in solution.notes)
    onnx.checker.check_model(insert(model, plan, solution).proto, full_check=True)


# -- kernels -----------------------------------------------------------------------------------------------------------


def compiled(model: Model, made: Made) -> tuple[Engine, Any]:
    pytest.importorskip("tensorrt_rtx")
    engine = rtx.build(model.proto, targets=["sm89"])
    return engine, audit(model.proto, engine.table)


def four_bits(engine: Engine, dtype: str = "int4") -> int:
    """Elements of the 4-bit constants in the engine."""
    tensors = (t for layer in engine.table.layers for t in (*layer.inputs, *layer.constants))
    return sum(int(np.prod(t.shape)) for t in tensors if t.dtype == dtype)


@pytest.mark.parametrize("unquantized_type", ["fp32", "fp16"])
@pytest.mark.parametrize("scheme", ["int4", "w4a8", "fptq"])
@pytest.mark.parametrize("name", ["MatMul padded", "Gemm transB"])
def test_the_engine_holds_4_bit_weights_and_runs_int8_products_where_planned(
    name: str, scheme: str, unquantized_type: str
) -> None:
    made = case(name, scheme=scheme, **({"v0": 0, "v1": 0} if scheme == "fptq" else {}))
    model = convert(made.model, unquantized_type=unquantized_type, table=made.table).model
    engine, found = compiled(model, made)
    sizes = [np.prod(made.solution.weights[p.tensor, p.spec.axis].codes.shape) for p in made.plan.weights]
    assert four_bits(engine) == sum(sizes)
    wanted = "int8" if SCHEMES[scheme].data else "weight-only int4"
    assert {n.requested for n in found.nodes} == {wanted}
    assert not found.missed
    assert not found.suspect
    assert found.int8_share == (1.0 if SCHEMES[scheme].data else 0.0)


@pytest.mark.parametrize("scheme", ["nvfp4", "nvfp4-weight"])
def test_small_nvfp4_weights_need_no_float32(scheme: str) -> None:
    model = build([node("MatMul", "x w", "y")], {"x": (20, 64)}, {"w": normal(64, 16) / 10000})
    data = [{"x": s["x"] * 100} for s in graphs.samples(model, 4)]
    made = quantized(model, data, scheme=scheme, rounding="nearest", equalize="none")
    half = convert(made.model, unquantized_type="fp16", table=made.table)
    assert not half.kept
    for a, b, c in zip(*(graphs.run(m, data) for m in (half.model, made.model, model)), strict=True):
        lost, before = (np.sum((found["y"] - c["y"]) ** 2) for found in (a, b))
        assert lost < 1.1 * before


def test_fp8_channels_whose_scales_float16_cannot_hold_keep_their_codes_floating() -> None:
    """Codes follow a raised scale; rounded to whole numbers as integer codes are, this channel would lose 14 dB."""
    values = normal(8, 4, 3, 3)
    values[0] *= 1e-4
    model = build([node("Conv", "x w", "y")], {"x": (1, 4, 6, 6)}, {"w": values})
    data = graphs.samples(model, 4)
    made = quantized(model, data, scheme="fp8")
    half = convert(made.model, unquantized_type="fp16", table=made.table).model
    for a, b in zip(graphs.run(half, data), graphs.run(made.model, data), strict=True):
        assert np.sum((a["y"][:, 0] - b["y"][:, 0]) ** 2) < 0.003 * np.sum(b["y"][:, 0] ** 2)


def test_fp8_products_run_in_fp8() -> None:
    _, found = compiled((made := case("Conv and Gemm", scheme="fp8")).model, made)
    assert {n.consumed for n in found.nodes} == {"fp8"}


@pytest.mark.parametrize("unquantized_type", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["MatMul padded", "Gemm transB"])
def test_nvfp4_products_run_in_fp4_and_weights_alone_are_dequantized(name: str, unquantized_type: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    for scheme, wanted in (
        ("nvfp4", "fp4"),
        ("nvfp4-weight", {"fp32": "float32", "fp16": "float16"}[unquantized_type]),
    ):
        made = case(name, scheme=scheme)
        converted = convert(made.model, unquantized_type=unquantized_type, table=made.table)
        assert not converted.kept
        engine = rtx.build(converted.model.proto, targets=["sm120"])
        found = audit(converted.model.proto, engine.table)
        assert {n.consumed for n in found.nodes} == {wanted}
        assert {n.requested for n in found.nodes} == {"fp4" if scheme == "nvfp4" else "weight-only fp4"}
        assert all(n.macs for n in found.nodes)
        assert not found.missed
        assert not found.suspect
        codes = sum(made.solution.weights[p.tensor, p.spec.axis].codes.size for p in made.plan.weights)
        assert four_bits(engine, "fp4") >= codes


def test_a_target_without_the_format_is_refused_before_the_compiler_is_asked() -> None:
    pytest.importorskip("tensorrt_rtx")
    from engines.core.errors import UnsupportedTargetError

    with pytest.raises(UnsupportedTargetError, match="int4 needs sm80"):
        rtx.build(case("MatMul", scheme="int4").model.proto, targets=["sm75"])


# -- a real language model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories() -> tuple[Model, list[graphs.Sample], np.ndarray]:
    if not STORIES.is_dir():
        pytest.skip("the shared models are not here")
    from qdq.passes.prepare import load_float

    tokens = np.load(STORIES / "sampled_tokens.npz")
    samples = [{"tokens": t[None].astype(np.int64)} for t in tokens["calibration"][:4]]
    return load_float(STORIES / "stories260K.onnx"), samples, tokens["evaluation"][:6].astype(np.int64)


def perplexity(model: Model, tokens: np.ndarray) -> float:
    (outputs,) = graphs.run(model, [{"tokens": tokens}])
    logits = outputs["logits"][:, :-1].astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0] - np.log(np.exp(logits).sum(axis=-1))
    return float(np.exp(-chosen.mean()))


def test_finer_weights_keep_a_language_models_perplexity(
    stories: tuple[Model, list[graphs.Sample], np.ndarray],
) -> None:
    """Per tensor collapses, per channel lies between, blocks are best; data and descent improve on nearest."""
    model, samples, tokens = stories
    found = {"float": perplexity(model, tokens)}
    for block in ("tensor", "channel", 32, 16):
        made = quantized(model, samples, scheme="int4", block=block, rounding="nearest", equalize="none")
        found[str(block)] = perplexity(made.model, tokens)
    made = quantized(model, samples, scheme="int4", block=16)
    found["descent"] = perplexity(made.model, tokens)
    assert found["tensor"] > 3 * found["channel"]
    assert found["float"] < found["descent"] < found["16"] < found["32"] < found["channel"]
    assert found["descent"] < 1.08 * found["float"]


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_on_every_layer_gptq_trades_weight_error_for_output_error(
    stories: tuple[Model, list[graphs.Sample], np.ndarray], fmt: str
) -> None:
    """With the same scales, one per channel; AWQ likewise never loses to nearest on the sum over its blocks."""
    model, samples, _ = stories
    plan = placement.plan(model, Settings(scheme="int4", block="channel"))
    grams = second_moments.collect(model, weighted_nodes(model, plan).values(), {}, samples[:2])
    assert len(grams) == len(plan.weights) == 36
    for point in plan.weights:
        assert point.spec.axis is not None
        key, spec = (point.tensor, point.spec.axis), Spec(format=fmt, axis=point.spec.axis, weight_only=True)
        W, errors = model.array(point.tensor), {}
        for rounding in ("nearest", "gptq", "descent"):
            made = quantize_weight(W, spec, outputs=point.spec.axis, rounding=rounding, moments=grams[key])
            E = np.moveaxis(made.values().astype(np.float64) - W, point.spec.axis, 0)
            errors[rounding] = (np.sum(E**2), np.sum(gptq.loss(E, grams[key][0])))
        for rounding in ("gptq", "descent"):
            assert errors[rounding][0] > errors["nearest"][0]
            assert errors[rounding][1] < errors["nearest"][1]
        assert errors["descent"][1] <= errors["gptq"][1]


def test_on_every_layer_awq_never_loses_to_nearest(stories: tuple[Model, list[graphs.Sample], np.ndarray]) -> None:
    """Its objective: the sum over blocks of each block's squared output error; channel scales first, then clipping."""
    model, samples, _ = stories
    plan = placement.plan(model, Settings(scheme="int4", block=16, rounding="awq"))
    grams = second_moments.collect(model, weighted_nodes(model, plan).values(), {}, samples[:2])
    for point in plan.weights:
        axis = point.spec.axis
        assert axis is not None
        H, W = grams[point.tensor, axis][0], model.array(point.tensor)
        rows = np.moveaxis(W, axis, -1)
        divisor = balanced([rows], [16], H, fmt="int4")
        shape = [-1 if i == axis else 1 for i in range(2)]
        ones = np.ones(rows.shape[1], np.float32)
        losses = []
        for rounding, s in (("nearest", ones), ("awq", ones if divisor is None else divisor)):
            scaled, moments = W * s.reshape(shape), (H / np.outer(s, s))[None]
            found = quantize_weight(scaled, point.spec, outputs=1 - axis, rounding=rounding, moments=moments)
            E = np.moveaxis(found.values() / s.reshape(shape) - W, axis, -1).astype(np.float64)
            parts = [slice(b, b + 16) for b in range(0, E.shape[1], 16)]
            losses.append(sum(float(np.sum(gptq.loss(E[:, p], H[p, p]))) for p in parts))
        assert losses[1] < losses[0]


@pytest.mark.parametrize("scheme", ["int4", "w4a8"])
def test_a_language_model_compiles_with_4_bit_weights_everywhere(
    stories: tuple[Model, list[graphs.Sample], np.ndarray], scheme: str
) -> None:
    pytest.importorskip("tensorrt_rtx")
    model, samples, _ = stories
    made = quantized(model, samples[:2], scheme=scheme, rounding="clip", equalize="none")
    proto = convert(made.model, unquantized_type="fp16", table=made.table).model.proto
    shapes = {"tokens": ShapeRange.fixed((1, 64))}
    engine = rtx.build(proto, targets=["sm89"], shapes=shapes)
    nodes = Counter((n.requested, n.consumed) for n in audit(proto, engine.table, shapes=shapes).nodes)
    wanted = ("int8", "int8") if scheme == "w4a8" else ("weight-only int4", "float16")
    assert nodes[wanted] == len(made.plan.quantized_nodes) == 36
    sizes = sum(made.solution.weights[p.tensor, p.spec.axis].codes.size for p in made.plan.weights)
    assert engine.table.weight_bytes < sizes * 0.5 + 4 * 512 * 64 + 65536  # codes, float embedding, scales and tables
