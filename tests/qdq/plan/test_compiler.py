"""What follows the compiler that a plan is for: the form of the Q/DQ model, block lengths, rewrites, reasons."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import graphs
import numpy as np
import pytest
import transformer_graphs
from graphs import build, node, normal, quantized
from tensorrt_networks import network, pricer

from engines.backends.profile import profile_named, profiles
from engines.core.documents import replace
from qdq.build.recipe import Recipe
from qdq.core.errors import InputError
from qdq.deploy.explain import explain
from qdq.model.model import Model
from qdq.model.storage import save
from qdq.passes import rewrites
from qdq.passes.rewrites import FLOAT_REWRITES, QUANTIZED_REWRITES, why_not_for
from qdq.plan import placement
from qdq.plan.settings import WORTH, Settings
from qdq.tune.variant_builder import VariantBuilder

TENSORRT = "tensorrt"


def ops(model: Model) -> Counter[str]:
    """How many nodes of each operator."""
    return Counter(n.op_type for n in model.graph.node)


def skips(model: Model, compiler: str) -> dict[str, str]:
    """Node -> why it stays in float."""
    return {s.node: s.reason for s in placement.plan(model, Settings(compiler=compiler)).skips}


class TestTheForm:
    """NVIDIA's documented one for TensorRT: nothing but Q and DQ stands in front of an operand."""

    @pytest.mark.parametrize("weight", [(8, 3, 3, 3), (8, 8, 3, 3)], ids=["three channels", "eight channels"])
    def test_a_padded_convolution_of_asymmetric_data(self, weight: tuple[int, ...]) -> None:
        model = graphs.conv(weight, pads=[1, 1, 1, 1])
        data = graphs.samples(model, low=-0.1)
        rtx, tensorrt = (quantized(model, data, compiler=compiler).model for compiler in ("rtx", TENSORRT))
        assert ops(rtx)["Sub"] == ops(rtx)["Pad"] == 1
        assert ops(tensorrt) == {"QuantizeLinear": 1, "DequantizeLinear": 2, "Conv": 1, "Relu": 1}
        (conv,) = (n for n in tensorrt.graph.node if n.op_type == "Conv")
        assert next(list(a.ints) for a in conv.attribute if a.name == "pads") == [1, 1, 1, 1]
        expected = graphs.run(model, data)
        found = graphs.run(tensorrt, data)
        error = np.mean([np.mean((a["y"] - b["y"]) ** 2) for a, b in zip(expected, found, strict=True)])
        assert error < np.mean([np.mean(a["y"] ** 2) for a in expected]) / 300

    def test_a_shift_that_is_asked_for_is_made_and_doubted(self) -> None:
        model = graphs.conv()
        data = graphs.samples(model, low=-0.1)
        asked = Settings(compiler=TENSORRT, shift=True)
        assert ops(quantized(model, data, compiler=TENSORRT, shift=True).model)["Sub"] == 1
        assert any("whether Q behind a Sub still fuses" in said for said in asked.doubts)
        assert Settings(shift=True).doubts == () == Settings(compiler=TENSORRT).doubts

    def test_shift_is_not_judged_where_it_is_not_made(self) -> None:
        assert "shift" in Settings().open and "shift" not in Settings(compiler=TENSORRT).open
        assert Settings(compiler=TENSORRT).settled.compiler == "tensorrt:11"

    def test_products_through_four_bits_are_doubted(self) -> None:
        (said,) = Settings(compiler=TENSORRT, scheme="w4a8").doubts
        assert said.startswith("scheme w4a8: whether TensorRT keeps weights of 4 bits")
        assert len(Settings(compiler=TENSORRT, scheme="fptq").doubts) == 2 and not Settings(scheme="fptq").doubts


class TestBlocks:
    """TensorRT documents two lengths of INT4."""

    def blocks(self, inputs: int, **settings: object) -> list[int | None]:
        model = build([node("MatMul", "x w", "y")], {"x": (4, inputs)}, {"w": normal(inputs, 32)})
        made = placement.plan(model, Settings(scheme="int4", **settings))  # type: ignore[arg-type]
        return [p.spec.block for p in made.weights]

    def test_the_longest_that_divides_is_taken(self) -> None:
        assert self.blocks(256, compiler=TENSORRT, block=128) == [128]
        assert self.blocks(192, compiler=TENSORRT, block=128) == self.blocks(192, compiler=TENSORRT) == [64]

    def test_what_no_documented_length_divides_has_none(self) -> None:
        assert self.blocks(96, compiler=TENSORRT) == [None] and self.blocks(96) != [None]
        assert self.blocks(250, compiler=TENSORRT) == [None]  # zeros would be a kernel of their own
        assert self.blocks(250, block=128) == [128]

    def test_other_lengths_are_refused(self) -> None:
        with pytest.raises(InputError, match="block is 32: TensorRT 11 documents 128, 64 for int4"):
            Settings(compiler=TENSORRT, scheme="int4", block=32)
        assert Settings(scheme="int4", block=32).block == 32
        assert Settings(compiler=TENSORRT, scheme="int4").options("block") == (WORTH, 64)
        assert any("block 32 has no effect" in said for said in Settings(compiler=TENSORRT, block=32).idle)

    def test_a_format_that_the_version_lacks_is_refused(self) -> None:
        with pytest.raises(InputError, match=r"10\.3 has no nvfp4"):
            Settings(compiler="tensorrt:10.3", scheme="nvfp4")


class TestRewrites:
    """What pays on one compiler alone is not made for another."""

    def test_each_reason_is_of_a_compiler_that_there_is(self) -> None:
        names = {profile.name for profile in profiles().values()}
        for name, reasons in rewrites._NOT_FOR.items():
            assert set(reasons) <= names and all(reasons.values()), name
        left = {n for n in (*FLOAT_REWRITES, *QUANTIZED_REWRITES) if why_not_for(n, profile_named("tensorrt"))}
        assert {"hoist", "norm_scale", "concat_codes", "packed_projection", "conv_transpose"} <= left
        assert {"layer_norm", "gelu", "norm_bias"} <= {*FLOAT_REWRITES} - left
        assert not any(why_not_for(n, profile_named("rtx")) for n in (*FLOAT_REWRITES, *QUANTIZED_REWRITES))

    def test_a_packed_projection_stays_whole(self) -> None:
        model = transformer_graphs.packed()
        assert placement.plan(model, Settings()).rewrites
        assert placement.plan(model, Settings(compiler=TENSORRT)).rewrites == ()

    def test_none_of_them_fits_a_variant(self) -> None:
        model = build(
            [node("ConvTranspose", "x w", "y", strides=[2, 2])], {"x": (1, 4, 5, 5)}, {"w": normal(4, 4, 2, 2)}
        )
        found = {}
        for compiler in ("rtx", TENSORRT):
            builder = VariantBuilder(model, Settings(compiler=compiler), ("fp16",))
            found[compiler] = builder.fits("conv_transpose", builder.usual)
        assert found == {"rtx": ("convtranspose",), TENSORRT: ()}

    def test_explain_says_so(self, tmp_path: Path) -> None:
        save(transformer_graphs.packed(), tmp_path / "m.onnx")
        name = next(n.name for n in transformer_graphs.packed().graph.node if n.op_type == "MatMul")
        lines = explain(tmp_path / "m.onnx", name, Recipe.from_mapping({"compiler": TENSORRT}))
        assert any("packed_projection: fits; TensorRT is not known to part" in line for line in lines)


@pytest.mark.parametrize("compiler", ["rtx", TENSORRT])
def test_reasons_are_those_of_the_compiler(compiler: str) -> None:
    profile = profile_named(compiler)
    nodes = [
        node("ConvTranspose", "x w", "a", group=2),
        node("GlobalAveragePool", "a", "b"),
        node("MatMul", "a a", "c"),
        node("Einsum", "a a", "d", equation="bcij,bckj->bcik"),
    ]
    model = build(nodes, {"x": (1, 4, 5, 5)}, {"w": normal(4, 2, 1, 1)}, outputs=("b", "c", "d"))
    said = skips(model, compiler)
    assert said["convtranspose"].endswith(profile.conv_transpose.says)
    assert said["globalaveragepool"] == profile.mean_pool.says
    assert said["matmul"] == said["einsum"] == profile.attention.says
    assert all(("TensorRT-RTX" in said[name]) is (compiler == "rtx") for name in ("convtranspose", "globalaveragepool"))


def test_what_nodes_without_weights_read_is_what_the_rules_say_of_a_model_without_the_other_nodes() -> None:
    model = network()
    settings = pricer(model).recipe.settings
    made = placement.placed(model, settings)
    nodes = made.quantized_nodes
    assert len(nodes) == 7 and placement.remaining(model, made, nodes)
    for some in itertools.chain.from_iterable(itertools.combinations(nodes, n) for n in range(len(nodes) + 1)):
        without = replace(settings, exclude=tuple(sorted({*nodes} - {*some})))
        read = {use for point in placement.placed(model, without).activations for use in point.consumers}
        assert placement.remaining(model, made, some) == {use for use in read if use.rpartition(":")[0] not in nodes}
