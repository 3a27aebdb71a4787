"""TensorRT's kernels derived from those of TensorRT-RTX in float."""

from __future__ import annotations

from dataclasses import replace

from engines.backends.layers import Layer
from engines.cost.kernel import Kernel
from engines.cost.tensorrt import tensorrt_kernels
from engines.cost.work import Work

POINTWISE = Work(form="pointwise", read=100, written=80, weights=10)
PRODUCT = Work(form="product", read=1000, written=400, weights=200, m=8, n=8, k=8)
ATTENTION = replace(PRODUCT, form="attention")


def network(*parts: tuple[str, Work]) -> tuple[list[Layer], list[Kernel]]:
    layers = [
        Layer(name=f"__myl_{name}_myl0_{i}", kind="", inputs=(), constants=(), outputs=(), tactic="", onnx_nodes=())
        for i, (name, _) in enumerate(parts)
    ]
    return layers, [Kernel(work=work, dtype="float16") for _, work in parts]


def test_what_only_places_values_costs_nothing() -> None:
    parts = ("Conc", "ReshSlicSlic", "ConcReshTran", "Resi", "Add", "Cast")
    layers, kernels = network(*[(name, POINTWISE) for name in parts])
    assert [i for i, _ in tensorrt_kernels(layers, kernels)] == [2, 3, 4, 5]
    named = [replace_name(layers[0], "/model/Conc")]
    assert len(tensorrt_kernels(named, kernels[:1])) == 1  # the name of a node says nothing


def replace_name(layer: Layer, name: str) -> Layer:
    return Layer(**{**{f: getattr(layer, f) for f in layer.__struct_fields__}, "name": name})


def test_attention_takes_its_operands_as_they_are() -> None:
    mean = ("AddMeanSubTran", POINTWISE)
    transpose, attention = ("AddReshTranReshMove", POINTWISE), ("Fc", ATTENTION)
    layers, kernels = network(
        transpose, mean, ("Fc", PRODUCT), transpose, transpose, transpose, attention, transpose, mean
    )
    assert [i for i, _ in tensorrt_kernels(layers, kernels)] == [0, 1, 2, 6, 8]
    last = network(transpose, attention)
    assert [i for i, _ in tensorrt_kernels(*last)] == [1]


def test_in_float_the_others_stay_as_they_are() -> None:
    layers, kernels = network(("Fc", PRODUCT), ("Add", POINTWISE), ("Fc", ATTENTION))
    assert tensorrt_kernels(layers, kernels) == list(enumerate(kernels))


def test_int8_products_carry_half_and_what_is_between_them_three_quarters() -> None:
    layers, kernels = network(
        ("Cast", POINTWISE), ("Fc", PRODUCT), ("Add", POINTWISE), ("Fc", PRODUCT), ("Mul", POINTWISE), ("Fc", PRODUCT)
    )
    found = dict(tensorrt_kernels(layers, kernels, quantized={1, 3}))
    assert (found[1].dtype, found[1].work.read, found[1].work.written, found[1].work.weights) == ("int8", 500, 200, 100)
    assert found[1].work.macs == PRODUCT.macs
    # before the first, and between two that are quantized
    assert [found[i].work.read for i in (0, 2)] == [75, 75] and found[2].work.weights == 10
    # beside one that is not; and that one itself
    assert found[4] == kernels[4] and found[5] == kernels[5]


def test_fused_attention_stays_in_float() -> None:
    layers, kernels = network(("Fc", PRODUCT), ("Fc", ATTENTION), ("AddMean", POINTWISE), ("Fc", PRODUCT))
    found = dict(tensorrt_kernels(layers, kernels, quantized={0, 3}))
    assert found[1] == kernels[1] and found[2].work.read == 75
