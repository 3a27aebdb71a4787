"""TensorRT's kernels derived from those of TensorRT-RTX in float: which tensors are INT8, and where Q kernels stand."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping

import pytest

from engines.backends.layers import KernelTensor, Layer
from engines.cost.family import CONVOLUTIONS
from engines.cost.gpus import gpu_named
from engines.cost.kernel import Kernel
from engines.cost.predict import EngineWork
from engines.cost.tensorrt import Regions
from engines.cost.tensorrt_engine import TensorRtEngine
from engines.cost.work import ATTENTION, POINTWISE, PRODUCT, Work

SHAPE = (1, 64, 56, 56)
ELEMENTS = 64 * 56 * 56
BYTES = 2 * ELEMENTS
FORMS = {"conv": PRODUCT, "mha": ATTENTION}

Part = tuple[str, str, str]  # kind of kernel (or the operations in its name), tensors read, tensors written


def engine(*parts: Part) -> TensorRtEngine:
    """Kernels whose tensors all have one size; one that reads two tensors as a convolution adds the first written."""
    layers, kernels = [], []
    for index, (kind, reads, writes) in enumerate(parts):
        inputs, outputs = (tuple(map(_tensor, names.split())) for names in (reads, writes))
        convolves = kind == "conv"
        form = FORMS.get(kind, POINTWISE)
        axes = {"m": 56.0 * 56, "n": 64.0, "k": 576.0} if form != POINTWISE else {}
        work = Work(
            form=form,
            read=BYTES * len(inputs),
            written=BYTES * len(outputs),
            weights=2.0 * 64 * 576 if convolves else 0.0,
            spatial=2 if convolves else 0,
            **axes,
        )
        name = f"conv{index}" if convolves else f"__myl_{kind}_myl0_{index}"
        layers.append(
            Layer(
                name=name,
                kind=kind if kind in ("maxpool", "avgpool") else "kgen",
                inputs=inputs,
                constants=(),
                outputs=outputs,
                tactic="",
                onnx_nodes=(f"node{index}",),
            )
        )
        kernels.append(Kernel(work=work, dtype="float16"))
    return TensorRtEngine(
        EngineWork(
            targets=("sm80",),
            layers=tuple(layers),
            kernels=tuple(kernels),
            macs=(0,) * len(parts),
            turns=(1,) * len(parts),
            family=CONVOLUTIONS,
            unplaced_macs=0,
            uncounted=(),
        )
    )


def _tensor(name: str) -> KernelTensor:
    return KernelTensor(name=name, dtype="float16", shape=SHAPE)


def carried(
    parts: Iterable[Part], quantized: Iterable[int], apart: Iterable[int] = ()
) -> dict[int, tuple[float, float]]:
    """Index of a kernel -> what it reads and writes, in tensors of float16; a Q kernel is under -1 - index."""
    found = engine(*parts).regions.of_tensorrt(frozenset(quantized), apart=frozenset(apart))
    return {-1 - i if q else i: (k.work.read / BYTES, k.work.written / BYTES) for i, k, q in found}


def test_in_float_only_what_places_values_is_gone() -> None:
    parts = [("Cast", "x", "a"), ("conv", "a", "b"), ("Slic", "b", "c"), ("ConcReshTran", "c", "d"), ("mha", "d", "e")]
    kept = engine(*parts).regions
    assert [i for i, _, _ in kept.of_tensorrt()] == [0, 1, 4]  # Tran before attention too
    assert kept.of_tensorrt()[1][1] == kept.kernels[1]


def test_between_two_int8_products_a_tensor_is_int8_on_both_ends() -> None:
    chain = [("CastConc", "x", "a"), ("conv", "a", "b"), ("conv", "b", "c"), ("conv", "c", "y")]
    found = carried(chain, {1, 2, 3})
    assert found[1] == (0.5, 0.5) and found[2] == (0.5, 0.5)
    assert found[3] == (0.5, 1.0)  # an output is not INT8
    assert found[0] == (0.75, 0.75) and min(found) == 0  # a pointwise kernel takes the Q


def test_behind_a_float_product_and_an_input_stands_a_q_kernel() -> None:
    chain = [("conv", "x", "b"), ("conv", "b", "c"), ("conv", "c", "y")]
    found = carried(chain, {1})
    assert found == {0: (1, 1), 1: (0.5, 1.0), 2: (1, 1), -2: (1, 0.5)}
    assert carried(chain, {0, 1})[-1] == (1, 0.5)  # of the input


def test_one_float_reader_pins_a_tensor() -> None:
    fork = [("conv", "x", "a"), ("conv", "a", "b"), ("conv", "a", "c"), ("conv", "a", "d")]
    assert carried(fork, {0, 1, 2})[0] == (0.5, 1.0)
    assert [i for i in carried(fork, {0, 1, 2}) if i < 0] == [-2, -1]  # one for both readers, one for the input
    assert carried(fork, {0, 1, 2, 3})[0] == (0.5, 0.5)


def test_a_shortcut_has_the_type_of_what_the_product_writes() -> None:
    block = [("conv", "x", "a"), ("conv", "a", "b"), ("conv", "a b", "c"), ("conv", "c", "d"), ("conv", "c d", "e")]
    stream = [*block, ("conv", "e", "y")]
    whole = carried(stream, set(range(6)))
    assert whole[0] == (0.5, 0.5) and whole[2] == (1.0, 0.5) and whole[4] == (1.0, 0.5)  # two tensors of half the bytes
    half = carried(stream, {0, 1, 2, 3, 4})  # the last reader is float
    assert half[4] == (1.0, 1.0) and half[-5] == (0.5, 1)  # what it adds is made float by a kernel of its own
    assert half[2] == (1.0, 0.5) and half[0] == (0.5, 0.5)  # the others are as they were
    apart = carried(stream, set(range(6)), apart={2})  # the shortcut around the first block is float
    assert apart[0] == (0.5, 1.0) and apart[2] == (1.5, 1.0) and -3 not in apart
    assert apart[-2] == (1, 0.5) and apart[-4] == (1, 0.5)  # Q kernels of what these wrote
    assert apart[4] == (1.0, 0.5) and apart[3] == (0.5, 0.5)


def test_pools_and_concats_pass_int8_on() -> None:
    parts = [("conv", "x", "a"), ("maxpool", "a", "b"), ("conv", "b", "c"), ("conv", "b", "d"), ("Conc", "c d", "e")]
    every = carried([*parts, ("conv", "e", "y")], {0, 2, 3, 5})
    assert every[0] == (0.5, 0.5) and every[1] == (0.5, 0.5) and every[2] == (0.5, 0.5)
    one = carried([*parts, ("conv", "e", "y")], {0, 2, 5})
    assert one[1] == (1, 1) and one[2] == (0.5, 1.0)
    assert {-3, -6} <= one.keys()


def test_pointwise_kernels_carry_three_quarters_and_attention_reads_float() -> None:
    parts = [("conv", "x", "a"), ("AddMul", "a", "b"), ("conv", "b", "c"), ("mha", "c", "d"), ("conv", "d", "y")]
    found = carried(parts, {0, 2, 4})
    assert found[0] == (0.5, 0.5) and found[1] == (0.75, 0.75)
    assert found[2] == (0.5, 1.0) and found[3] == (1, 1) and -5 not in found
    assert carried(parts, {2, 4})[1] == (1, 1) and carried(parts, {0})[0] == (0.5, 1.0)
    layers, kernels = engine(*parts).work.layers, engine(*parts).work.kernels
    inside = Regions.of(layers, kernels, attention=True).of_tensorrt({0, 2, 4})
    assert inside[2][1].work.written == BYTES / 2


def test_of_float32_int8_is_a_quarter() -> None:
    work = engine(("conv", "x", "a"), ("AddMul", "a", "b"), ("conv", "b", "y")).work
    kernels = [Kernel(work=k.work, dtype="float32") for k in work.kernels]
    found = Regions.of(work.layers, kernels).of_tensorrt({0, 2})
    assert [k.work.read / BYTES for _, k, _ in found[:3]] == [0.25, 0.625, 0.25]


NETWORKS: Mapping[str, list[Part]] = {
    "chain": [("CastConc", "x", "a"), ("conv", "a", "b"), ("AddMul", "b", "c"), ("conv", "c", "d"), ("conv", "d", "y")],
    "residual": [
        ("conv", "x", "a"),
        ("maxpool", "a", "b"),
        ("conv", "b", "c"),
        ("conv", "b c", "d"),
        ("conv", "d", "e"),
        ("conv", "d e", "f"),
        ("Mean", "f", "g"),
        ("conv", "g", "y"),
    ],
    "fork": [("conv", "x", "a"), ("conv", "a", "b"), ("conv", "a", "c"), ("Conc", "b c", "d"), ("conv", "d", "y")],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_sum_of_terms_is_the_time_of_every_set_at_its_own_clock(name: str) -> None:
    made, gpu = engine(*NETWORKS[name]), gpu_named("a10")
    products = list(made.products)
    for count in range(len(products) + 1):
        for some in itertools.combinations(products, count):
            terms = made.terms(gpu, products, at=some)
            assert terms.us(some) == pytest.approx(made.cost(gpu, some)[1].total_us, rel=1e-9)
            assert all(gain >= 0 for gain, _ in terms.gains) and all(cost >= 0 for cost, _ in terms.costs)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_sum_is_submodular(name: str) -> None:
    made, rng = engine(*NETWORKS[name]), random.Random(1)
    terms = made.terms(gpu_named("t4"), made.products)
    for _ in range(200):
        a, b = ({i for i in made.products if rng.random() < 0.5} for _ in range(2))
        assert terms.us(a) + terms.us(b) >= terms.us(a & b) + terms.us(a | b) - 1e-9


def test_a_gpu_that_the_engine_was_not_compiled_for_is_priced_all_the_same() -> None:
    made = engine(*NETWORKS["residual"])
    layers, cost = made.cost(gpu_named("h100"), set(made.products))
    assert cost.total_us < made.cost(gpu_named("h100"))[1].total_us
    assert [k.name for k in cost.kernels if k.kind.startswith("quantize")] == ["quantizer before conv0"]
    assert [layer.name for layer in layers] == [k.name for k in cost.kernels]
    assert cost.kernels[0].bytes == round(BYTES * 0.5 + BYTES * 0.5 + 64 * 576)
