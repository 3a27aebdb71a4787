"""What kernels have to do, from tensors as TensorRT-RTX's dumps give them."""

from __future__ import annotations

import pytest

from engines.backends.layers import KernelTensor, Layer
from engines.cost.family import (
    CONVOLUTIONS,
    DEPTHWISE_NETWORKS,
    GROUPED_NETWORKS,
    OTHER,
    TRANSFORMERS,
    VOLUMES,
    family_of,
)
from engines.cost.work import Work, work_of

Shape = tuple[int, ...]


def tensor(shape: Shape, dtype: str = "float16", name: str = "") -> KernelTensor:
    return KernelTensor(name=name, dtype=dtype, shape=shape)


def layer(
    kind: str, name: str, inputs: list[Shape], constants: list[Shape], output: Shape, dtype: str = "float16"
) -> Layer:
    ins, stored = (
        tuple(tensor(s, dtype, f"{what}{i}") for i, s in enumerate(ss))
        for what, ss in (("i", inputs), ("c", constants))
    )
    return Layer(
        name=name, kind=kind, inputs=ins, constants=stored, outputs=(tensor(output, dtype),), tactic="", onnx_nodes=()
    )


def test_a_convolution() -> None:
    conv = layer(
        "correlation", "/conv_myl0_1", [(8, 64, 56, 56)], [(128, 64, 3, 3), (1,), (1, 128, 1, 1)], (8, 128, 28, 28)
    )
    work = work_of(conv)
    assert (work.form, work.m, work.n, work.k, work.groups, work.spatial) == ("product", 8 * 28 * 28, 128, 576, 1, 2)
    assert work.macs == 8 * 28 * 28 * 128 * 576
    assert (work.read, work.written) == (2 * 8 * 64 * 56 * 56, 2 * 8 * 128 * 28 * 28)
    assert work.weights == 2 * (128 * 64 * 9 + 1 + 128)


def test_a_shortcut_is_no_weight() -> None:
    conv = layer("correlation", "/c_myl0_1", [(1, 64, 56, 56), (1, 256, 56, 56)], [(256, 64, 1, 1)], (1, 256, 56, 56))
    assert (work_of(conv).k, work_of(conv).groups) == (64, 1)
    given = layer("correlation", "/c", [(1, 64, 9, 9), (64, 64, 3, 3), (1, 64, 9, 9)], [], (1, 64, 9, 9))
    assert (work_of(given).form, work_of(given).k) == ("product", 576)  # sm75 dequantizes weights in a kernel before


@pytest.mark.parametrize(
    ("weight", "dtype", "form", "groups", "k"),
    [
        ((96, 1, 3, 3), "float16", "depthwise", 96, 9),
        ((96, 4, 3, 3), "int8", "depthwise", 24, 36),  # as 8-bit weights are padded
        ((96, 4, 3, 3), "float16", "grouped", 24, 36),
        ((96, 96, 3, 3), "float16", "product", 1, 864),
    ],
)
def test_groups(weight: Shape, dtype: str, form: str, groups: int, k: int) -> None:
    work = work_of(layer("correlation", "/c", [(1, 96, 14, 14)], [weight], (1, 96, 14, 14), dtype))
    assert (work.form, work.groups, work.k) == (form, groups, k)


def test_convolutions_of_one_and_three_axes_and_transposed_ones() -> None:
    assert work_of(layer("correlation", "/c", [(2, 8, 100)], [(16, 8, 5)], (2, 16, 96))).macs == 2 * 16 * 96 * 40
    volume = work_of(layer("correlation", "/c", [(1, 8, 9, 9, 9)], [(16, 8, 3, 3, 3)], (1, 16, 9, 9, 9)))
    assert volume.spatial == 3 and volume.k == 8 * 27
    up = work_of(layer("deconv", "/d", [(1, 64, 24, 24)], [(64, 16, 3, 3)], (1, 16, 48, 48)))
    assert up.macs == pytest.approx(64 * 24 * 24 * 16 * 9) and (up.form, up.n) == ("product", 16)


def test_products() -> None:
    gemm = work_of(layer("gemm", "/m/MatMul_myl0_7", [(1, 128, 768)], [(1, 768, 3072), (1,)], (1, 128, 3072)))
    assert (gemm.m, gemm.n, gemm.k, gemm.spatial) == (128, 3072, 768, 0)
    # a 1x1 convolution as GEMM, the weights on the left, in a fusion whose nodes the metadata may not tell
    left = work_of(
        layer(
            "runtime_fusion", "__myl_FcAddSilu_myl0_1", [(1, 256, 6400)], [(1, 256, 1), (1, 256, 256)], (1, 256, 6400)
        )
    )
    assert (left.m, left.n, left.k) == (6400, 256, 256)
    scores = work_of(layer("gemm", "/s", [(12, 197, 64), (12, 64, 197)], [], (12, 197, 197)))
    assert (scores.m, scores.n, scores.k, scores.batch) == (12 * 197, 197, 64, 12)
    bias = layer("gemm", "/m", [(128, 768), (128, 512)], [(768, 512)], (128, 512))
    assert work_of(bias).k == 768


def test_fused_attention() -> None:
    name, inputs = "_gemm_mha_v2_myl0_6", [(96, 128, 64), (96, 64, 200), (96, 200, 64)]
    work = work_of(layer("kgen", name, inputs, [], (96, 128, 64)))
    assert (work.form, work.m, work.n, work.k, work.batch) == ("attention", 96 * 128, 64, 400, 96)
    assert work.macs == 2 * 96 * 128 * 200 * 64


def test_the_audit_is_asked_where_tensors_do_not_tell() -> None:
    odd = layer("kgen", "__myl_MulSum_myl0_1", [(1, 10, 7)], [(3,)], (10, 5))
    assert work_of(odd).form == "pointwise" and work_of(odd).macs == 0
    told = work_of(odd, 10 * 5 * 7)
    assert (told.form, told.m, told.n, told.k) == ("product", 10, 5, 7)
    lost = layer("gemm", "/m", [(1, 128, 768)], [(768, 768)], (1, 128, 768))
    assert work_of(lost, 98304).macs == 128 * 768 * 768  # the audit took an unknown size for 1


def test_a_pointwise_kernel_whose_name_is_that_of_a_node() -> None:
    assert work_of(layer("kgen", "/head/Fc_myl0_1", [(8, 64)], [(64, 64)], (8, 64))).form == "pointwise"


def test_a_table_that_is_gathered_from_is_not_read_whole() -> None:
    words = layer("kgen", "__myl_CastGathAdd_myl0_0", [(1, 128)], [(30522, 768), (1, 768)], (1, 128, 768))
    assert work_of(words).weights == 2 * (128 * 768 + 768)


def test_a_tensor_that_stands_twice_is_read_once() -> None:
    twice = Layer(
        name="k",
        kind="kgen",
        inputs=(tensor((64,), name="x"), tensor((64,), name="x"), tensor((64,), name="y")),
        constants=(),
        outputs=(tensor((64,)),),
        tactic="",
        onnx_nodes=(),
    )
    assert work_of(twice).read == 2 * 2 * 64
    assert work_of(layer("kgen", "k", [], [], (4,))).read == 0


def test_another_batch() -> None:
    work = work_of(layer("gemm", "/m", [(128, 768)], [(768, 512)], (128, 512))).scaled(3)
    assert (work.m, work.n, work.k, work.macs) == (384, 512, 768, 384 * 512 * 768)
    assert (work.read, work.weights) == (3 * 2 * 128 * 768, 2 * 768 * 512)
    heads = Work(form="attention", read=1, written=1, weights=0, m=128, n=64, k=64, batch=2).scaled(4)
    assert (heads.batch, heads.m) == (8, 512)


def product(macs: float, **values: object) -> Work:
    return Work(**{"form": "product", "read": 1, "written": 1, "weights": macs, "m": macs, "n": 1, "k": 1, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("works", "family"),
    [
        ([product(9, spatial=2)] * 5, CONVOLUTIONS),
        ([product(9, spatial=1)] * 5, CONVOLUTIONS),
        ([product(9, spatial=3)] * 5, VOLUMES),
        ([product(9, spatial=2)] * 9 + [product(1, spatial=2, form="depthwise")], CONVOLUTIONS),
        ([product(9, spatial=2)] * 8 + [product(1, spatial=2, form="depthwise")], DEPTHWISE_NETWORKS),
        ([product(9, spatial=2)] * 4 + [product(1, spatial=2, form="grouped")], GROUPED_NETWORKS),
        ([product(9)] * 5 + [product(1, form="attention", batch=4)] * 2, TRANSFORMERS),
        ([product(9)] * 5 + [product(1, batch=4)] * 2, TRANSFORMERS),  # attention that is not fused
        ([product(9, spatial=2)] * 9 + [product(1, form="attention", batch=4)] * 2, CONVOLUTIONS),
        ([product(9, spatial=2)] + [product(9)] * 2, CONVOLUTIONS),  # some 1x1 convolutions as GEMM
        ([product(9)] * 3, OTHER),
        ([Work(form="pointwise", read=1, written=1, weights=0)], OTHER),
        ([], OTHER),
    ],
)
def test_families(works: list[Work], family: str) -> None:
    assert family_of(works) == family
