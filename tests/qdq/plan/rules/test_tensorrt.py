"""Every rule for compilers whose kernels write INT8 on a model it speaks for and one it is silent on; whole plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import graphs
import numpy as np
import pytest
from graphs import build, node, normal, quantized
from onnx import NodeProto

from engines.core.nodes import all_nodes
from qdq.assemble.leave_out import without
from qdq.model.model import Model
from qdq.plan.placement import plan
from qdq.plan.plan import Plan
from qdq.plan.rules.common import Tie, Veto, Want
from qdq.plan.rules.tensorrt import RULES, backbone, quantized_data
from qdq.plan.settings import Settings

Builder = Callable[[], Model]
SAME = {"pads": [1, 1, 1, 1]}
TENSORRT = Settings(compiler="tensorrt")


def conv(data: str, made: str, weight: str = "w", **attributes: object) -> NodeProto:
    """A padded 3x3 convolution named after what it makes."""
    return node("Conv", f"{data} {weight}", made, name=made, **(attributes or SAME))


def chain(nodes: Sequence[NodeProto], outputs: Sequence[str] = ("y",), channels: int = 32) -> Model:
    """An image of `channels` channels through nodes that read 3x3 weights "w" and 1x1 weights "v"."""
    tensors = {"w": normal(channels, channels, 3, 3), "v": normal(channels, channels, 1, 1, seed=1)}
    return build(nodes, {"x": (2, channels, 8, 8)}, tensors, outputs=outputs)


def block(*, behind: bool = True, down: bool = False, activation: bool = False) -> Model:
    """conv, conv + Relu, conv, Add with a shortcut (itself a convolution if `down`), Relu, then a conv if `behind`."""
    nodes = [
        conv("x", "a"),
        node("Relu", "a", "t"),
        conv("t", "b"),
        node("Relu", "b", "u", name="relu_b"),
        conv("u", "c"),
    ]
    main, other = ("c", "d") if down else ("c", "t")
    if down:
        nodes.append(conv("t", "d", "v", pads=[0, 0, 0, 0]))
    if activation:
        nodes.append(node("Relu", "c", "e", name="relu_c"))
        main = "e"
    nodes += [node("Add", f"{other} {main}", "s"), node("Relu", "s", "r", name="relu_s")]
    nodes.append(conv("r", "y") if behind else node("Neg", "r", "y"))
    return chain(nodes)


def pool() -> Model:
    return chain([conv("x", "a"), node("Relu", "a", "t"), node("GlobalAveragePool", "t", "y")])


def float_pool() -> Model:
    return chain([node("Relu", "x", "t"), node("GlobalAveragePool", "t", "y")])


def gated() -> Model:
    """Squeeze-and-excitation: the pool and the product read the same tensor."""
    nodes = [
        conv("x", "a"),
        node("Relu", "a", "t"),
        node("GlobalAveragePool", "t", "p"),
        conv("p", "g", "v", pads=[0] * 4),
    ]
    nodes += [node("Sigmoid", "g", "h"), node("Mul", "t h", "m"), conv("m", "y")]
    return chain(nodes)


def silu() -> Model:
    return chain([conv("x", "a"), node("Sigmoid", "a", "h"), node("Mul", "a h", "m"), conv("m", "y")])


def layer_norm(producer: str = "Conv") -> Model:
    """A LayerNormalization over channels, behind a patch embedding or a Relu."""
    first = conv("x", "a") if producer == "Conv" else node("Relu", "x", "a")
    nodes = [first, node("Transpose", "a", "t", perm=[0, 2, 3, 1]), node("LayerNormalization", "t g", "y")]
    tensors = {"w": normal(32, 32, 3, 3), "g": normal(32)}
    return build(nodes, {"x": (2, 32, 8, 8)}, tensors)


def maxima() -> Model:
    return chain([conv("x", "a"), node("MaxPool", "a", "b", kernel_shape=[2, 2]), conv("b", "y")])


def product(inputs: int, outputs: int, rows: int | str = 4) -> Model:
    return build([node("Gemm", "x w", "y")], {"x": (rows, inputs)}, {"w": normal(inputs, outputs)})


def up(rank: int = 2, behind: str = "Relu", reader: str = "Conv", group: int = 1) -> Model:
    """ConvTranspose, an operator behind it, and a reader of that."""
    ones = [1] * rank
    nodes = [node("ConvTranspose", "x u", "a", strides=[2] * rank, group=group)]
    nodes.append(node(behind, "a g g" if behind == "InstanceNormalization" else "a", "b", name="behind"))
    nodes.append(node(reader, "b v" if reader == "Conv" else "b", "y", name="reader"))
    tensors = {"u": normal(32, 32 // group, *[2] * rank), "v": normal(32, 32, *ones), "g": normal(32)}
    return build(nodes, {"x": (1, 32, *[4] * rank)}, tensors)


def narrow(outputs: int, inputs: int, kernel: Sequence[int] = (3, 3), *, group: int = 1, first: bool = False) -> Model:
    """One convolution behind a Relu, or first."""
    nodes = [] if first else [node("Relu", "x", "t")]
    nodes.append(node("Conv", "x w" if first else "t w", "y", group=group))
    return build(nodes, {"x": (1, inputs * group, 9, 9)}, {"w": normal(outputs, inputs, *kernel)})


CASES: dict[str, tuple[type, Builder, Builder]] = {
    "shortcut": (Want, block, lambda: block(behind=False)),
    "pooled": (Want, pool, float_pool),
    "normalized": (Want, layer_norm, lambda: layer_norm("Relu")),
    "shared": (Want, gated, silu),
    "crossed": (Tie, maxima, pool),
    "narrow": (Veto, lambda: narrow(8, 8), lambda: narrow(16, 16)),
    "upsampled": (Veto, lambda: up(3, reader="Neg"), lambda: up(3)),
    "grouped": (Veto, lambda: narrow(40, 5, group=8), lambda: narrow(64, 8, group=8)),
    "eighths": (Veto, lambda: narrow(32, 32, (7, 7)), lambda: narrow(32, 32, (3, 3))),
    "small": (Veto, lambda: product(8, 32), lambda: product(32, 32)),
}


def settings_of(rule: str) -> Settings:
    return Settings(compiler="tensorrt", scheme="fp8" if rule == "eighths" else "int8")


def test_every_rule_has_a_case() -> None:
    assert [rule.__name__ for rule in RULES] == list(CASES)


@pytest.mark.parametrize("rule", RULES, ids=[r.__name__ for r in RULES])
def test_a_rule_speaks_on_one_model_and_is_silent_on_another(rule: Callable[..., list[object]]) -> None:
    kind, positive, negative = CASES[rule.__name__]
    settings = settings_of(rule.__name__)
    said, unsaid = ([d for n in all_nodes(m.graph) for d in rule(m, n, settings)] for m in (positive(), negative()))
    assert said and unsaid == []
    assert all(isinstance(d, kind) and d.rule == rule.__name__ for d in said)  # type: ignore[attr-defined]


@pytest.mark.parametrize("rule", RULES, ids=[r.__name__ for r in RULES])
def test_no_rule_speaks_for_tensorrt_rtx(rule: Callable[..., list[object]]) -> None:
    model = CASES[rule.__name__][1]()
    assert not [
        d for n in all_nodes(model.graph) for d in rule(model, n, Settings(scheme=settings_of(rule.__name__).scheme))
    ]


def reads(made: Plan) -> dict[str, set[str]]:
    """Quantized activation -> who reads it quantized."""
    return {p.tensor: set(p.consumers) for p in made.activations}


class TestResidualBlocks:
    """Which side of an Add is quantized."""

    def test_the_shortcut_and_not_the_main_path(self) -> None:
        found = reads(plan(block(), TENSORRT))
        assert found == {"x": {"a:0"}, "t": {"b:0", "add:0"}, "u": {"c:0"}, "r": {"y:0"}}

    def test_a_convolution_on_the_shortcut_writes_codes_too(self) -> None:
        found = reads(plan(block(down=True), TENSORRT))
        assert found["d"] == {"add:0"} and "c" not in found and found["t"] == {"b:0", "d:0"}

    def test_a_path_that_ends_in_an_activation_is_not_the_main_one(self) -> None:
        found = reads(plan(block(down=True, activation=True), TENSORRT))
        assert found["e"] == {"add:1"} and "d" not in found

    def test_without_a_quantized_reader_of_the_sum_only_what_is_quantized_anyway(self) -> None:
        assert "d" not in reads(plan(block(down=True, behind=False), TENSORRT))

    def test_without_the_main_convolution_there_is_no_pair(self) -> None:
        made = plan(block(down=True), Settings(compiler="tensorrt", exclude=("c",)))
        assert "add:0" not in reads(made).get("d", set())
        whole = plan(block(down=True), TENSORRT)
        less = without(whole, block(down=True), ["c"], "tuned", "for a test")
        assert reads(less) == {k: v for k, v in reads(made).items() if k in reads(less)}
        assert "d" not in reads(less) and "d" in reads(without(whole, block(down=True), ["a"], "tuned", "for a test"))

    def test_rtx_reads_what_another_convolution_reads(self) -> None:
        assert reads(plan(block(), Settings()))["t"] == {"b:0", "add:0"}
        assert "d" not in reads(plan(block(down=True), Settings()))


class TestPools:
    """Mean pools between quantizers, MaxPools crossed by them."""

    def test_both_sides(self) -> None:
        nodes = [conv("x", "a"), node("Relu", "a", "t"), node("GlobalAveragePool", "t", "p"), node("Flatten", "p", "f")]
        model = build(
            [*nodes, node("Gemm", "f m", "y")], {"x": (4, 32, 8, 8)}, {"w": normal(32, 32, 3, 3), "m": normal(32, 16)}
        )
        made = plan(model, TENSORRT)
        assert reads(made) == {"x": {"a:0"}, "t": {"globalaveragepool:0"}, "f": {"gemm:0"}}
        (skip,) = (s for s in made.skips if s.op_type == "GlobalAveragePool")
        assert skip.rule == "pooled" and "INT8" in skip.reason
        assert made.explain("globalaveragepool")

    def test_what_the_pool_reads_the_gated_product_reads(self) -> None:
        found = reads(plan(gated(), TENSORRT))
        assert found["t"] == {"globalaveragepool:0", "mul:0"} and "h" not in found

    def test_an_activation_reads_floats(self) -> None:
        nodes = [conv("x", "a"), node("Sigmoid", "a", "h"), node("Mul", "a h", "m"), conv("m", "y"), conv("a", "z")]
        assert reads(plan(chain(nodes, ("y", "z")), TENSORRT))["a"] == {"z:0"}

    def test_one_scale_on_both_sides_of_a_maximum(self) -> None:
        nodes = [conv("x", "a"), node("MaxPool", "a", "b", kernel_shape=[2, 2]), conv("b", "y"), conv("a", "z")]
        made = plan(chain(nodes, ("y", "z")), TENSORRT)
        assert {p.tensor: p.tie for p in made.activations} == {"x": None, "a": "a", "b": "a"}


@pytest.mark.parametrize(
    ("model", "runs"),
    [
        (lambda: narrow(64, 3, (7, 7), first=True), True),
        (lambda: narrow(64, 3, (7, 5), first=True), False),
        (lambda: narrow(64, 3, (7, 7)), True),
        (lambda: narrow(8, 8, first=True), True),
        (lambda: narrow(12, 12, first=True), False),
        (lambda: narrow(16, 1, group=16), True),
        (lambda: narrow(16, 1, (1, 3), group=16), False),
        (lambda: narrow(12, 1, group=12), False),
    ],
)
def test_convolutions_of_few_channels(model: Builder, runs: bool) -> None:
    made = plan(model(), TENSORRT)
    assert bool(made.quantized_nodes) is runs
    assert runs or any(s.rule == "narrow" and "channels" in s.reason for s in made.skips)


@pytest.mark.parametrize(
    ("fact", "model"),
    [("first_layer", lambda: narrow(8, 8, first=True)), ("depthwise", lambda: narrow(16, 1, group=16))],
)
def test_a_compiler_without_a_fact(fact: str, model: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    known = TENSORRT.profile
    assert plan(model(), TENSORRT).quantized_nodes
    unknown = replace(known, **{fact: replace(known.facts[fact], holds=None)})
    monkeypatch.setattr(Settings, "profile", property(lambda settings: unknown))
    assert not plan(model(), TENSORRT).quantized_nodes


@pytest.mark.parametrize(
    ("model", "scheme", "runs"),
    [
        (lambda: product(32, 32, 1), "int8", False),
        (lambda: product(32, 32, "n"), "int8", True),
        (lambda: product(32, 8), "int8", False),
        (lambda: product(64, 64, 1), "int8-weight", True),
    ],
)
def test_products(model: Builder, scheme: str, runs: bool) -> None:
    assert bool(plan(model(), Settings(compiler="tensorrt", scheme=scheme)).quantized_nodes) is runs


class TestTransposedConvolutions:
    """In the pattern that NVIDIA says fuses."""

    @pytest.mark.parametrize(
        ("model", "runs"),
        [
            (up, True),
            (lambda: up(behind="Neg"), True),
            (lambda: up(behind="InstanceNormalization"), False),
            (lambda: up(group=2), False),
            (lambda: up(3), True),
            (lambda: up(3, behind="Neg"), False),
            (lambda: up(3, reader="Neg"), False),
        ],
    )
    def test_where(self, model: Builder, runs: bool) -> None:
        made = plan(model(), TENSORRT)
        assert ("convtranspose" in made.quantized_nodes) is runs
        assert "convtranspose" not in plan(model(), Settings()).quantized_nodes

    @pytest.mark.parametrize("rank", [1, 2, 3])
    @pytest.mark.parametrize("rounding", ["gptq", "nearest"])
    def test_its_codes_are_as_good_as_those_of_a_convolution(self, rank: int, rounding: str) -> None:
        model = up(rank)
        data = graphs.samples(model, 8)
        made = quantized(model, data, compiler="tensorrt", rounding=rounding)
        (weight,) = (p for p in made.plan.weights if p.consumers == ("convtranspose:1",))
        assert weight.spec.axis == 1
        expected, found = graphs.run(model, data), graphs.run(made.model, data)
        noise, power = (
            np.mean([np.mean(f(a["y"], b["y"]) ** 2) for a, b in zip(expected, found, strict=True)])
            for f in (np.subtract, lambda a, b: a)
        )
        assert power / noise > 1000


def test_the_convolution_that_makes_a_tensor() -> None:
    model = gated()
    assert backbone(model, "t") is model.node("a") and backbone(model, "h") is model.node("g")
    assert backbone(model, "m") is None and backbone(silu(), "m") is not None
    assert quantized_data(model, model.node("a"), TENSORRT) is not None
    assert quantized_data(model, model.node("a"), Settings(compiler="tensorrt", exclude=("a",))) is None
