"""What `prepare` always writes in another form: the same results, and a weight where a quantizer finds it."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import node, normal
from onnx import NodeProto, TensorProto, helper
from raw_models import Shape, operators, prepared_alike, raw

from qdq.model.model import Model
from qdq.model.nodes import controlled_nodes
from qdq.passes.rewrites import PREPARED_REWRITES
from qdq.plan import placement

EINSUMS: dict[str, tuple[Shape, Shape]] = {  # equation: the shapes of the data "x" and of the constant "w"
    "bij,jk->bik": (("n", 5, 6), (6, 7)),
    "bij,kj->bik": (("n", "t", 6), (7, 6)),
    "ij,jk": ((5, 6), (6, 7)),
    "bchw,oc->bohw": (("n", 6, "h", "w"), (7, 6)),
    "bcdhw,oc->bodhw": ((2, 6, 3, 4, 5), (7, 6)),
    "bhwc,oc->bhwo": (("n", "h", "w", 6), (7, 6)),
    "bchw,oc->bhwo": (("n", 6, "h", "w"), (7, 6)),
    "bcl,oc->bol": (("n", 6, "l"), (7, 6)),
    "nld,hdk->nhlk": (("n", "l", 6), (3, 6, 7)),
    "nld,dhk->nlhk": (("n", "l", 6), (6, 3, 7)),
    "nlhk,hkd->nld": (("n", "l", 3, 6), (3, 6, 7)),
    "nhlk,hkd->nld": (("n", 3, "l", 6), (3, 6, 7)),
    "bhi,hij->bhj": (("n", 3, 6), (3, 6, 7)),
    "bhti,hij->bhtj": (("n", 3, "t", 6), (3, 6, 7)),
    "bthi,hij->bthj": (("n", "t", 3, 6), (3, 6, 7)),
    "gi,gio->go": ((3, 6), (3, 6, 7)),
    "...i,ij->...j": (("n", "t", 6), (6, 7)),
    "...ij,jk->...ik": ((2, 3, 5, 6), (6, 7)),
    "b...i,ji": (("n", 4, 6), (7, 6)),
    "bsij,jk->bk": (("n", 4, 5, 6), (6, 7)),
    "i,ij->j": ((6,), (6, 7)),
    "bij,jkm->bik": (("n", 5, 6), (6, 7, 3)),
}


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("equation", EINSUMS)
def test_einsum_with_a_constant_is_a_product(equation: str, left: bool) -> None:
    data, weight = EINSUMS[equation]
    if left:
        terms, arrow, result = equation.partition("->")
        equation = ",".join(terms.split(",")[::-1]) + arrow + result
    if left and not arrow:
        pytest.skip("the result would be in another order: the same equation in other words")
    nodes = [node("Einsum", "w x" if left else "x w", "y", "sum", equation=equation)]
    model = raw(nodes, {"x": data}, {"w": normal(*map(int, weight))})
    done = prepared_alike(model, {"n": 2, "t": 3, "l": 4, "h": 3, "w": 5}, {"n": 1, "t": 5, "l": 2, "h": 4, "w": 4})
    assert "Einsum" not in operators(done)
    assert placement.plan(done).quantized_nodes == ("sum",)
    if equation in ("bij,jk->bik", "bchw,oc->bohw", "...i,ij->...j", "bhti,hij->bhtj"):
        assert len(done.graph.node) == 1


@pytest.mark.parametrize(
    ("equation", "inputs", "tensors", "reason"),
    [
        ("bij,bjk->bik", {"x": (2, 5, 6), "z": (2, 6, 7)}, {}, "2 of its 2"),
        ("bi,i->bi", {"x": (2, 6)}, {"w": normal(6)}, "sums over no axis"),
        ("bi,i->b", {"x": (2, 6)}, {"w": normal(6)}, "no columns"),
        ("bii,ij->bj", {"x": (2, 6, 6)}, {"w": normal(6, 7)}, "diagonal"),
        ("ij->ji", {"x": (5, 6)}, {}, "1 of its 1"),
        ("bi,oi->bo", {"x": (2, 1)}, {"w": normal(7, 6)}, "one element in its data"),
    ],
)
def test_einsum_stays(equation: str, inputs: dict[str, Shape], tensors: dict[str, np.ndarray], reason: str) -> None:
    model = raw([node("Einsum", " ".join((*inputs, *tensors)), "y", equation=equation)], inputs, tensors)
    done = model if reason.startswith("one element") else prepared_alike(model)
    assert operators(done) == ["Einsum"]
    assert reason in PREPARED_REWRITES["einsum"](done).unfit["einsum"]


def test_several_constants_of_an_einsum_are_multiplied_first() -> None:
    tensors = {"a": normal(6, 4), "b": normal(4, 7), "c": normal(1, 1)}
    model = raw([node("Einsum", "a x b c", "y", "sum", equation="ir,bti,ro,tz->bto")], {"x": (2, 5, 6)}, tensors)
    done = prepared_alike(model)
    assert operators(done) == ["MatMul"] and len(done.initializers) == 1


@pytest.mark.parametrize(
    ("weight", "data"),
    [
        ((7, 6), (6, 5)),
        ((7, 6), ("n", 6, "t")),
        ((7, 6), ("n", 3, 6, "t")),
        ((7, 6), (6,)),
        ((3, 7, 6), (6, 5)),
        ((3, 7, 6), ("n", 1, 6, 5)),
        ((3, 7, 6), (6,)),
    ],
)
def test_a_left_weight_goes_to_the_right(weight: tuple[int, ...], data: Shape) -> None:
    model = raw([node("MatMul", "w x", "y", "product")], {"x": data}, {"w": normal(*weight)})
    done = prepared_alike(model, {"n": 2, "t": 3}, {"n": 1, "t": 5})
    assert placement.plan(done).quantized_nodes == ("product",)


@pytest.mark.parametrize("summand", ["none", "scalar", "row", "column", "matrix", "computed"])
@pytest.mark.parametrize("turned", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
def test_a_left_weight_of_gemm_goes_to_the_right(turned: tuple[int, int], summand: str) -> None:
    weight, data = (6, 7) if turned[0] else (7, 6), (5, 6) if turned[1] else (6, 5)
    shapes = {"scalar": (), "row": (5,), "column": (7, 1), "matrix": (7, 5)}
    tensors = {"w": normal(*weight)} | ({"c": normal(*shapes[summand], seed=1)} if summand in shapes else {})
    inputs: dict[str, Shape] = {"x": data} | ({"c": (7, 5)} if summand == "computed" else {})
    names = "w x" if summand == "none" else "w x c"
    factors = {"transA": turned[0], "transB": turned[1], "alpha": 0.5, "beta": 2.0}
    done = prepared_alike(raw([node("Gemm", names, "y", "product", **factors)], inputs, tensors))
    assert placement.plan(done).quantized_nodes == ("product",)
    assert (operators(done).count("Add") == 1) is (summand in ("row", "matrix", "computed"))


def test_transposes_between_left_products_vanish() -> None:
    nodes = [node("Gemm", "w x", "a", transB=1), node("MatMul", "v a", "y")]
    done = prepared_alike(raw(nodes, {"x": (4, 16)}, {"w": normal(24, 16), "v": normal(8, 24)}))
    assert operators(done) == ["Gemm", "MatMul", "Transpose"]
    assert placement.plan(done).quantized_nodes == ("gemm", "matmul")


def test_scores_of_learned_queries_stay() -> None:
    nodes = [
        node("MatMul", "q kt", "s", "scores"),
        node("Mul", "s scale", "t"),
        node("Softmax", "t", "p", axis=-1),
        node("MatMul", "p v", "y", "mix"),
    ]
    model = raw(nodes, {"kt": (2, 8, 5), "v": (2, 5, 8)}, {"q": normal(3, 8), "scale": np.float32(0.3)})
    done = prepared_alike(model)
    assert operators(done) == ["MatMul", "Mul", "Softmax", "MatMul"]
    assert "scores of attention" in PREPARED_REWRITES["left_weight"](done).unfit["scores"]


@pytest.mark.parametrize("axis", [-1, 1, -2])
@pytest.mark.parametrize("outputs", ["y m i", "y m -", "y - i", "y m i unused"])
def test_statistics_of_a_norm_are_computed_beside_it(axis: int, outputs: str) -> None:
    made = [o for o in ("m", "i") if o in outputs.split()]
    norm = node("LayerNormalization", "x s b", "n m i", "norm", axis=axis, epsilon=1e-3)
    norm.output[:] = ["n", *("" if o == "-" else o for o in outputs.split()[1:3])]
    nodes = [norm, node("Relu", "n", "y")]
    shape = (6,) if axis != -2 and axis != 1 else (5, 6)
    read = [] if "unused" in outputs else made
    model = raw(nodes, {"x": ("n", 5, 6)}, {"s": normal(*shape), "b": normal(*shape)}, outputs=("y", *read))
    done = prepared_alike(model, {"n": 3})
    assert list(next(n for n in done.graph.node if n.op_type == "LayerNormalization").output) == ["n"]
    assert operators(done).count("ReduceMean") == (0 if not read else 2 if "i" in read else 1)


def scattered(
    op: str,
    data: Shape,
    indices: Shape,
    updates: Shape,
    zero: bool,
    values: int,
    dtype: str = "int64",
    **attributes: object,
) -> Model:
    """x -> updates, i -> indices; the data are z, or zeros."""
    inputs: dict[str, object] = {"x": updates, "i": (indices, dtype)}
    tensors = {}
    if zero:
        tensors["z"] = np.zeros(list(map(int, data)), np.float32)
    else:
        inputs["z"] = data
    return raw([node(op, "z i x", "y", "sum", reduction="add", **attributes)], inputs, tensors)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["int64"])
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize(
    ("data", "indices", "updates"),
    [
        ((4, 6), (9, 1), (9, 6)),
        ((4, 6), ("e", 1), ("e", 6)),
        ((4,), (9, 1), (9,)),
        ((4, 4, 3), (5, 2, 2), (5, 2, 3)),
        ((4, 5), (7, 2), (7,)),
        (("a", 6), ("e", 1), ("e", 6)),
        (("a", "f"), (9, 1), (9, "f")),
        (("a", 4, 3), ("e", 2), ("e", 3)),
    ],
)
def test_scattered_blocks_are_summed(data: Shape, indices: Shape, updates: Shape, zero: bool, dtype: str) -> None:
    if zero and not all(isinstance(n, int) for n in data):
        return
    model = scattered("ScatterND", data, indices, updates, zero, 4, dtype)
    rng = np.random.default_rng(2)
    for sizes in ({"a": 4, "e": 9, "f": 5}, {"a": 6, "e": 3, "f": 2}):
        shape = [n if isinstance(n, int) else sizes[n] for n in indices]
        done = prepared_alike(model, sizes, given={"i": rng.integers(-4, 4, shape)})
        assert "ScatterND" not in operators(done)
        if dtype == "int64" and all(isinstance(n, int) for n in (*data, *indices)):
            break


@pytest.mark.parametrize("dtype", ["int64", "int32"])
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_scattered_elements_are_summed(axis: int, zero: bool, dtype: str) -> None:
    shape = [4, 4, 4]
    longer = list(shape)
    longer[axis] = 7
    model = scattered("ScatterElements", shape, longer, longer, zero, 4, dtype, axis=axis)
    indices = np.random.default_rng(3).integers(-4, 4, longer).astype(dtype)
    assert "ScatterElements" not in operators(prepared_alike(model, given={"i": indices}))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("constant", [True, False])
def test_indices_that_all_columns_share_need_one_matrix(axis: int, constant: bool) -> None:
    shape = [5, 6, 3]
    lone, whole = [1, 1, 1], list(shape)
    lone[axis] = whole[axis] = 8
    values = np.random.default_rng(4).integers(0, shape[axis], lone)
    nodes: list[NodeProto] = [
        node("Expand", "i size", "j"),
        node("ScatterElements", "z j x", "y", "sum", axis=axis, reduction="add"),
    ]
    inputs: dict[str, object] = {"x": whole, "z": shape} | ({} if constant else {"i": (lone, "int64")})
    tensors = {"size": np.int64(whole)} | ({"i": values} if constant else {})
    done = prepared_alike(raw(nodes, inputs, tensors), given={} if constant else {"i": values})  # type: ignore[arg-type]
    assert "ScatterElements" not in operators(done) and "Unsqueeze" not in operators(done)


def test_dynamic_neighbours_are_summed_over_atoms() -> None:
    """Sums over the edges of a graph, whose numbers of atoms and edges vary: torch.index_add on zeros."""
    nodes = [
        node("Shape", "atoms", "n", start=0, end=1),
        node("Concat", "n width", "size", "sizes", axis=0),
        node("Expand", "nought size", "z"),
        node("Unsqueeze", "i last", "j"),
        node("Shape", "x", "all", "whole"),
        node("Expand", "j all", "k", "spread"),
        node("ScatterElements", "z k x", "y", "sum", axis=0, reduction="add"),
    ]
    tensors = {"width": np.int64([6]), "nought": np.float32([[0]]), "last": np.int64([1])}
    inputs: dict[str, object] = {"x": ("e", 6), "i": (("e",), "int64"), "atoms": ("a", 3)}
    model = raw(nodes, inputs, tensors)  # type: ignore[arg-type]
    for atoms, edges in ((4, 9), (7, 3)):
        indices = np.random.default_rng(edges).integers(0, atoms, edges)
        done = prepared_alike(model, {"a": atoms, "e": edges}, given={"i": indices})
        assert "ScatterElements" not in operators(done)


def test_a_one_hot_matrix_has_a_limit() -> None:
    model = scattered("ScatterND", (5000, 2), (5000, 1), (5000, 2), False, 4)
    assert "ScatterND" in operators(prepared_alike(model))
    assert "5000 x 5000" in PREPARED_REWRITES["scatter_sum"](prepared_alike(model)).unfit["sum"]


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(("strides", "dilations"), [([2, 2], [2, 2]), ([2, 1], [1, 3]), ([3, 2], [2, 1])], ids=str)
def test_dilation_goes_into_the_weight(strides: list[int], dilations: list[int], group: int) -> None:
    pads = {"pads": [1, 0, 1, 1], "output_padding": [1 if s > 1 else 0 for s in strides]}
    conv = node("ConvTranspose", "x w b", "y", "up", strides=strides, dilations=dilations, group=group, **pads)
    model = raw([conv], {"x": ("n", 4, 5, 6)}, {"w": normal(4, 3, 3, 2), "b": normal(3 * group)})
    done = prepared_alike(model)
    assert not any(a.name == "dilations" for a in done.graph.node[0].attribute)


def test_transposed_convolutions_that_the_compiler_takes_stay() -> None:
    for attributes in ({"strides": [2]}, {"dilations": [2]}, {}):
        model = raw([node("ConvTranspose", "x w", "y", **attributes)], {"x": (1, 4, 5)}, {"w": normal(4, 3, 3)})
        done = prepared_alike(model)
        assert done.initializers["w"].dims == [4, 3, 3]


def test_products_in_bodies_have_the_weight_on_the_right_too() -> None:
    value, size = helper.make_tensor_value_info, 8
    inside = [
        node("Einsum", "c w", "e", "einsum", equation="bi,io->bo"),
        node("Transpose", "e", "t", "turn", perm=[1, 0]),
        node("MatMul", "v t", "l", "left"),
        node("Transpose", "l", "next", "back", perm=[1, 0]),
        node("Identity", "on", "going"),
    ]
    starts = [value("i", TensorProto.INT64, []), value("on", TensorProto.BOOL, []), value("c", 1, [4, size])]
    body = helper.make_graph(inside, "body", starts, [value("going", TensorProto.BOOL, []), value("next", 1, None)])
    nodes = [node("Loop", "turns true x", "last", "loop", body=body), node("Add", "last x", "y")]
    tensors = {"w": normal(size, size) / 3, "v": normal(size, size, seed=1) / 3}
    model = raw(nodes, {"x": (4, size)}, {**tensors, "turns": np.int64(3), "true": np.bool_(True)})
    products = [n for n in controlled_nodes(prepared_alike(model).graph) if n.op_type in ("Einsum", "MatMul")]
    done = prepared_alike(model)
    assert [n.name for n in products] == ["einsum", "left"] and all(done.is_constant(n.input[1]) for n in products)
