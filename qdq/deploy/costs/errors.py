"""How far each quantized tensor is from what was quantized: its own rounding and clipping, nothing of other tensors.

Q/DQ model + a few samples -> sums of squares beside each DequantizeLinear of data -> dB by tensor
Must not change a figure of the report; only sums leave the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import ModelProto, TensorProto, helper

from engines.core.errors import EngineError
from engines.verify.sums import decibels
from qdq.assemble.held_out import in_its_types
from qdq.core.errors import InputError
from qdq.core.progress import Progress
from qdq.deploy.costs.switches import quantized_data
from qdq.deploy.steps.shipped import Made
from qdq.measure.inference.samples import Sample
from qdq.model.external import is_large
from qdq.model.model import Model
from qdq.model.nodes import Names

VALUES = 1 << 20  # of inputs: no further sample is run after so many
SAMPLES = 16
LARGE = "The model is large, so the error of each tensor was not measured."


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorErrors:
    """Signal to noise of each quantized tensor.

    Attributes:
        sqnr_db: (role, tensor of the float model) -> 10 log10(sum x^2 / sum (x - x')^2), x before it is quantized in
            the Q/DQ model; of a tensor that is quantized twice the lower.
        samples: that data were measured on.
        why: why nothing was measured; '' where it was.
    """

    sqnr_db: Mapping[tuple[str, str], float] = field(default_factory=dict)
    samples: int = 0
    why: str = ""


def tensor_errors(
    made: Made, quantized: Model, samples: Iterable[Sample], *, on_progress: Progress | None = None
) -> TensorErrors:
    """Measure the tensors of a Q/DQ model, but for data in bodies of If, Loop and Scan.

    Args:
        made: how it was made.
        quantized: the Q/DQ model as it is compiled.
        samples: the first are run, as many as hold `VALUES` values, at most `SAMPLES`; the same on every machine.
    """
    if not made.plan.quantizes:
        return TensorErrors()
    if is_large(quantized.graph.initializer):
        return TensorErrors(why=LARGE)
    chosen = list(_first(samples))
    try:
        return _measured(made, quantized, chosen, on_progress)
    except (InputError, EngineError) as error:
        return TensorErrors(why=f"The error of each tensor was not measured: {error}")


def _measured(done: Made, quantized: Model, chosen: list[Sample], on_progress: Progress | None) -> TensorErrors:
    found: dict[tuple[str, str], float] = {}
    for tensor, db in done.solution.weight_db.items():
        _keep(found, ("weight", tensor), db)
    proto, sums = _with_sums(quantized)
    if sums:
        session = in_its_types(quantized.replace(proto), [name for _, *pair in sums for name in pair])
        totals = np.zeros((len(sums), 2))
        for number, sample in enumerate(chosen):
            if on_progress:
                on_progress(number, len(chosen), "Measure tensors")
            made = session(sample)
            totals += [[float(made[name]) for name in pair] for _, *pair in sums]
        known = done.prepared.names()
        for (tensor, *_), (signal, noise) in zip(sums, totals, strict=True):
            _keep(found, ("activation", _before(tensor, quantized, known)), decibels(float(signal), float(noise)))
    return TensorErrors(sqnr_db=found, samples=len(chosen))


def _keep(found: dict[tuple[str, str], float], key: tuple[str, str], value: float) -> None:
    """The lower of two; one that is no number stays."""
    found[key] = value if key not in found or not found[key] < value else found[key]


def _first(samples: Iterable[Sample]) -> Iterator[Sample]:
    values = 0
    for number, sample in enumerate(samples):
        if number and (values >= VALUES or number == SAMPLES):
            return
        values += sum(np.asarray(array).size for array in sample.values())
        yield sample


def _with_sums(quantized: Model) -> tuple[ModelProto, list[tuple[str, str, str]]]:
    """The model with two sums for each quantized tensor: of its squares and of its error's; and their names."""
    proto, sums = ModelProto(), []
    proto.CopyFrom(quantized.proto)
    fresh = Names(quantized.names()).fresh
    for node in quantized.graph.node:
        source = quantized_data(node, quantized) if node.op_type == "DequantizeLinear" else None
        if source is None or not quantized.consumers(node.output[0]):
            continue
        whole = _unshifted(source, quantized)
        base = node.output[0]
        x, y, z, error, signal, noise = (
            fresh(f"{base}_{what}") for what in ("x", "y", "z", "error", "signal", "noise")
        )
        proto.graph.node.extend(
            [
                helper.make_node("Cast", [source], [x], to=TensorProto.DOUBLE),
                helper.make_node("Cast", [node.output[0]], [y], to=TensorProto.DOUBLE),
                helper.make_node("Cast", [whole], [z], to=TensorProto.DOUBLE),
                helper.make_node("Sub", [x, y], [error]),
                helper.make_node("ReduceSumSquare", [error], [noise], keepdims=0),
                helper.make_node("ReduceSumSquare", [z], [signal], keepdims=0),
            ]
        )
        sums.append((source, signal, noise))
    return proto, sums


def _unshifted(tensor: str, quantized: Model) -> str:
    """The tensor before a constant was subtracted from it: the signal is that of the float model."""
    node = quantized.producer(tensor)
    if node is not None and node.op_type == "Sub" and quantized.is_constant(node.input[1]):
        return str(node.input[0])
    return tensor


def _before(tensor: str, quantized: Model, known: Iterable[str]) -> str:
    """The tensor of the float model that one in front of a quantizer was made from."""
    name, node = tensor, quantized.producer(tensor)
    while name not in known and node is not None and node.input:
        name, node = node.input[0], quantized.producer(node.input[0])
    return name if name in known else tensor
