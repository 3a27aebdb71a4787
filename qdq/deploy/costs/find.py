"""Which quantized tensors cost a poor output most, and what to try: run only where a result is poor.

report, float and Q/DQ model -> `switches` -> the output with nothing, with everything and with one tensor at a time
quantized, on one sample, in the types of the file -> those that cost most alone, and advice from what was found.
Must not change a figure of the report, and must not take long: a time limit, no large models.

Where the output with every weight in float is further from the float model than the quantized one, the float weights
found are not right, and only data are told apart.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from engines.core.documents import replace
from engines.core.errors import EngineError
from engines.verify.report import OutputReport, Report, TensorCost
from engines.verify.sums import decibels
from qdq.assemble.held_out import in_its_types
from qdq.core.disk.cache import remembered
from qdq.core.errors import InputError
from qdq.core.progress import Progress
from qdq.deploy.costs.switches import float_weights, switched
from qdq.measure.inference.kept import seen
from qdq.measure.inference.samples import Sample
from qdq.measure.inference.session import Session
from qdq.model.as_bytes import identity
from qdq.model.external import is_large
from qdq.model.model import Model
from qdq.model.nodes import controlled_nodes
from qdq.plan.settings import Settings

TIME_LIMIT_S = 20.0
SHOWN = 5
SHARE = 0.02  # of the noise with everything quantized: less is not worth a name
FEW_SAMPLES = 32
ROLES = frozenset(("data", "weight"))
INSIDE = "What is quantized is in bodies of If, Loop or Scan, where the cost of one tensor was not looked for."
NOTHING = "Nothing in the model is quantized, so its float type costs what is lost. Try --unquantized-type fp32."


def with_costs(
    report: Report,
    float_model: Model,
    quantized: Model,
    samples: Iterable[Sample],
    *,
    settings: Settings | None = None,
    calibrated_on: int | None = None,
    on_progress: Progress | None = None,
) -> Report:
    """The report with the costliest tensors and advice where an output is poor, else as it is.

    Args:
        report: of these two models.
        float_model: prepared.
        quantized: the Q/DQ model made from it.
        samples: the first is run.
        settings: how it was quantized, where that is known.
        calibrated_on: number of samples, where that is known.
    """
    if report.poorest is None:
        return report
    found, _ = remembered(
        "costs",
        lambda: (
            report.to_json(),
            *identity(float_model),
            *identity(quantized),
            *seen(samples),
            settings and settings.to_mapping(),
            calibrated_on,
        ),
        lambda: _with_costs(report, float_model, quantized, samples, settings, calibrated_on, on_progress),
        pack=lambda made: {"report": made[0].to_json().encode()} if made[1] else None,
        unpack=lambda parts: (Report.from_json(parts["report"]), True),
    )
    return found


def _with_costs(
    report: Report,
    float_model: Model,
    quantized: Model,
    samples: Iterable[Sample],
    settings: Settings | None,
    calibrated_on: int | None,
    on_progress: Progress | None,
) -> tuple[Report, bool]:
    """As `with_costs`, and whether all was tried: else the clock had a part in it."""
    worst = report.poorest
    if worst is None:
        return report, True
    if is_large(quantized.graph.initializer):
        return replace(report, advice=("What costs most was not looked for: the model is large.",)), True
    if worst.task == "labels":
        return replace(report, advice=_general(quantized, settings, calibrated_on)), True
    try:
        found = _measured(worst.name, float_model, quantized, next(iter(samples)), on_progress)
    except (InputError, EngineError) as error:
        return replace(report, advice=(f"What costs most was not found: {error}",)), False
    if found is None:
        inside = any(node.op_type == "QuantizeLinear" for node in controlled_nodes(quantized.graph))
        return replace(report, advice=(INSIDE if inside else NOTHING,)), True
    advice = tuple(_advice(found, worst, float_model, quantized, settings, calibrated_on))
    return replace(report, costly=found.costly, advice=advice), found.tried == found.tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """Ratios in dB of one output: with all tensors quantized, with none, and with one, for those that matter."""

    all_db: float
    none_db: float
    costly: tuple[TensorCost, ...]
    tried: int
    tensors: int
    untold: int
    shifted: bool


def _measured(
    output: str, float_model: Model, quantized: Model, sample: Sample, on_progress: Progress | None
) -> _Found | None:
    """Run one sample; None where nothing is quantized.

    Raises:
        InputError: ONNX Runtime refuses the model with switches, or the float model's output is not finite.
        EngineError: the model passes sequences of a low type in or out.
    """
    expected = np.asarray(Session(float_model, [output])(sample)[output], np.float64)
    signal = float((expected * expected).sum())
    if not math.isfinite(signal):
        raise InputError(f"output {output} of the float model itself is not finite on the first sample.")

    def noise(values: np.ndarray, against: np.ndarray) -> float:
        if values.shape != against.shape:
            raise InputError(f"output {output} has another shape than in float on that sample.")
        error = values.astype(np.float64) - against
        found = float((error * error).sum())
        return found if math.isfinite(found) else math.inf

    whole = noise(in_its_types(quantized, [output])(sample)[output], expected)
    for weights in (float_weights(quantized, float_model, sample), {}):
        made = switched(quantized, weights)
        if not made.switches:
            if not made.untold:
                return None
            continue
        model = quantized.replace(made.proto)
        off = {**sample, **{name: np.asarray(False) for name in made.switches}}
        first = in_its_types(model, [output, *made.noises, *made.signals])(off)
        nothing = np.asarray(first[output], np.float64)
        if np.isfinite(nothing).all() and noise(nothing, expected) <= 1.25 * whole:
            break
    else:
        return _Found(
            all_db=decibels(signal, whole),
            none_db=math.nan,
            costly=(),
            tried=0,
            tensors=0,
            untold=made.untold,
            shifted=_shifts(quantized),
        )
    ratios = [_ratio(first[n], first[s]) for n, s in zip(made.noises, made.signals, strict=True)]
    session, known = in_its_types(model, [output]), float_model.names()
    started, tried, costs = time.monotonic(), 0, list[tuple[float, TensorCost]]()
    for index in sorted(range(len(ratios)), key=lambda i: -ratios[i]):
        if time.monotonic() - started > TIME_LIMIT_S:
            break
        if on_progress:
            on_progress(tried, len(ratios), "Find what costs most")
        cost = noise(session({**off, made.switches[index]: np.asarray(True)})[output], nothing)
        tried += 1
        if cost > SHARE * whole or math.isinf(cost):
            row = made.tensors[index]
            name = _named(row.tensor, quantized, known)
            costs.append((cost, replace(row, tensor=name, sqnr_db=decibels(signal, cost))))
    costs.sort(key=lambda pair: -pair[0])
    return _Found(
        all_db=decibels(signal, whole),
        none_db=decibels(signal, noise(nothing, expected)),
        costly=tuple(row for _, row in costs[:SHOWN]),
        tried=tried,
        tensors=len(ratios),
        untold=made.untold,
        shifted=_shifts(quantized),
    )


def _shifts(quantized: Model) -> bool:
    """Whether data are shifted by a constant in front of a quantizer."""
    makers = (quantized.producer(node.input[0]) for node in quantized.graph.node if node.op_type == "QuantizeLinear")
    return any(m is not None and m.op_type == "Sub" and quantized.is_constant(m.input[1]) for m in makers)


def _named(tensor: str, quantized: Model, known: Collection[str]) -> str:
    """The tensor of the float model that one in front of a quantizer was made from."""
    name, node = tensor, quantized.producer(tensor)
    while name not in known and node is not None:
        name, node = node.input[0], quantized.producer(node.input[0])
    return name if name in known else tensor


def _ratio(error: np.ndarray, signal: np.ndarray) -> float:
    return float(error) / float(signal) if float(signal) > 0 else 0.0


def _advice(
    found: _Found,
    worst: OutputReport,
    float_model: Model,
    quantized: Model,
    settings: Settings | None,
    calibrated_on: int | None,
) -> list[str]:
    """What was found, then what to try."""
    said = []
    if found.tensors:
        said.append(
            f"On one sample, output {worst.name} has {found.all_db:.1f} dB, and {found.none_db:.1f} dB if those of its "
            "quantized tensors that can be told apart are in float."
        )
        if found.tried < found.tensors:
            said.append(f"{found.tried} of these {found.tensors} were tried, those with the largest own errors.")
    if found.untold:
        said.append(f"{found.untold} quantized weights could not be told apart from the float model's.")
    if not found.none_db > found.all_db + 3:
        shift = (", in data shifted by a constant", ", --no-shift") if found.shifted else ("", "")
        also = ", in those weights" if found.untold else ""
        said.append(
            f"So more is lost elsewhere: in what is not quantized{shift[0]}{also}, or in biases corrected for "
            f"quantized weights. Try --unquantized-type fp32{shift[1]} and --bias-correction off, one by one."
        )
    known = {node.name for node in float_model.graph.node}
    nodes = [n for row in found.costly for n in row.nodes if n in known]
    if nodes:
        options = " ".join(f"--exclude {name}" for name in list(dict.fromkeys(nodes))[:SHOWN])
        said.append(f"Try to leave what costs most in float: {options}")
    return [*said, *_general(quantized, settings, calibrated_on, {row.role for row in found.costly} or ROLES)]


def _general(
    quantized: Model, settings: Settings | None, calibrated_on: int | None, roles: Collection[str] = ROLES
) -> tuple[str, ...]:
    """What to try whatever costs most."""
    said = []
    if "data" in roles and calibrated_on is not None and calibrated_on < FEW_SAMPLES:
        said.append(f"Try more calibration samples: there are {calibrated_on}.")
    kinds = {quantized.dtype(n.input[2]) for n in quantized.graph.node if n.op_type == "QuantizeLinear" and n.input[2:]}
    if "data" in roles and kinds & {"int8", "uint8"} and (settings is None or settings.calibrator != "auto"):
        used = f"; this was {settings.range_by}" if settings else ""
        said.append(f"Try --calibrator auto, which compares all of them{used}.")
    if "weight" in roles and settings is not None and settings.label != "int8":
        names = ", ".join(row.name for row in settings.schemes if row.name != "int8")
        said.append(f"Try finer weights than those of {names}: --rounding gptq, a smaller --block, int8-weight.")
    return tuple(said)
