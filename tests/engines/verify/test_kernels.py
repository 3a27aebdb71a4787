"""Which kernel multiplies for a node and in which type, on layers as the compiler lists them; else unknown."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from engines.backends.layers import KernelTensor, Layer
from engines.verify.kernels import consumed_dtype, multiplying


def layer(
    name: str,
    inputs: Sequence[tuple[str, tuple[int, ...]]],
    constants: Sequence[tuple[str, tuple[int, ...]]] = (),
    output: tuple[str, tuple[int, ...]] = ("float16", (8, 8)),
    *,
    kind: str = "kgen",
    nodes: tuple[str, ...] = ("n",),
) -> Layer:
    def tensors(of: Sequence[tuple[str, tuple[int, ...]]]) -> tuple[KernelTensor, ...]:
        return tuple(KernelTensor(name="t", dtype=dtype, shape=shape) for dtype, shape in of)

    made = {"inputs": tensors(inputs), "constants": tensors(constants), "outputs": tensors([output])}
    return Layer(name=name, kind=kind, tactic="", onnx_nodes=nodes, **made)


HEAD, MASK = (12, 24, 32), (2, 1, 24, 24)


@pytest.mark.parametrize("mask", ["bool", "float16", "float32"])
@pytest.mark.parametrize("first", [True, False])
def test_a_mask_is_no_factor_of_fused_attention(mask: str, first: bool) -> None:
    for dtype in ("float16", "fp8"):
        factors = [(dtype, HEAD)] * 3
        inputs = [(mask, MASK), *factors] if first else [*factors, (mask, MASK)]
        assert consumed_dtype(layer("_gemm_mha_v2_myl0_1", inputs, output=("float16", HEAD))) == dtype


def test_what_a_fusion_rounds_before_the_product_is_multiplied_as_codes() -> None:
    kernel = layer(
        "__myl_MulCastAddAddSiluCastAddMulMinMaxRounCastCorrMulCastAdd_myl0_18",
        [("float32", (1, 4, 1, 1))],
        [("float16", (1, 96, 1, 1)), ("int8", (96, 4, 1, 1)), ("float32", (1, 96, 1, 1))],
    )
    assert consumed_dtype(kernel, "float16") == "int8"


@pytest.mark.parametrize("stated", ["float16", "float32"])
def test_what_a_fusion_casts_before_the_product_is_multiplied_as_the_graph_states(stated: str) -> None:
    kernel = layer("__myl_CastMulFc_myl0_2", [("int8", (48, 192)), ("float16", (192, 576))], [("float32", (1,))])
    assert consumed_dtype(kernel, stated) == stated
    assert consumed_dtype(kernel) == "unknown"  # both are floating types that it reads


def test_codes_are_not_multiplied_by_a_float() -> None:
    kernel = layer("__myl_FcAdd_1", [("float16", (8, 64))], [("int4", (64, 8))], kind="runtime_fusion")
    assert consumed_dtype(kernel) == "float16"


def test_a_kernel_that_reads_indices_alone_multiplies_nothing_known() -> None:
    assert consumed_dtype(layer("__myl_Gath_1", [("int64", (8,)), ("bool", (8,))])) == "unknown"


def test_kernels_around_a_product_are_not_taken_for_it() -> None:
    pad = layer("__myl_ConcRepl_1", [("int8", (1, 4, 8, 8))])
    scale = layer("__myl_MulAdd_2", [("float32", (1, 4, 8, 8))])
    requantize = layer("__myl_MulRounCast_3", [("float32", (1, 4, 8, 8))])
    product = layer("n_myl0_4", [("int8", (1, 4, 8, 8))], [("int8", (4, 4, 3, 3))], kind="correlation")
    assert multiplying([pad, scale, product, requantize], "n") == (product,)
    assert multiplying([pad, scale, requantize], "n") == ()  # either may be it
    assert multiplying([pad, scale], "n") == (scale,)  # a product of few values, written as multiplications
    assert multiplying([pad], "n") == multiplying([], "n") == ()


def test_every_kernel_that_multiplies_for_a_node_counts() -> None:
    halves = [
        layer(f"n_{k}", [(dtype, (8, 64))], [(dtype, (64, 8))], kind="gemm") for k, dtype in ((0, "int8"), (1, "fp8"))
    ]
    assert len(multiplying(halves, "n")) == 2
