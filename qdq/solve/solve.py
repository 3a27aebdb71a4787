"""Turn measured ranges and float weights into scales and codes.

Plan + CalibrationTable -> QParams per activation (`activations`), divisors of channels; Plan + weights (+ second
moments) -> QTensor per weight, each by itself. This module must not change the graph; its only look at data is through
`gram`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version

import numpy as np
import numpy.typing as npt

from qdq.core.errors import InputError
from qdq.core.formats import FORMATS
from qdq.core.progress import Progress
from qdq.core.qtensor import QParams, QTensor
from qdq.core.resources import Room, cores
from qdq.measure import second_moments
from qdq.measure.inference.samples import Sample, overlapped
from qdq.measure.table import CalibrationTable
from qdq.model.external import is_large, tensor_bytes
from qdq.model.model import Model
from qdq.model.nodes import WEIGHTED, attribute, input_axis, weight_axis
from qdq.model.weight_store import Spool, key_of
from qdq.plan.plan import Plan, Point
from qdq.plan.settings import Settings
from qdq.plan.spec import Spec
from qdq.solve import token_scales
from qdq.solve.activations import activation_params
from qdq.solve.equalize import choose, weight_only
from qdq.solve.equalize.carriers import Carrier, carried, factors, scaled
from qdq.solve.rounding import ROUNDINGS
from qdq.solve.weights import quantize_weight

ROUNDING_BYTES = 1 << 30  # for the weights that are rounded at a time, with their copies


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """Everything `insert` needs.

    Attributes:
        activations: tensor -> parameters per tensor.
        divisors: tensor -> (channels,) what its channels are divided by before they are quantized; the codes of the
            weights that read it already hold the factor.
        carriers: of those, tensor -> the constants that divide it as it is made; no node has to do so.
        weights: (tensor, axis) -> codes and parameters.
        tokens: tensors that have one scale per token, computed as the engine runs; their parameters have scale 1.
        notes: what a person should know, one line each (ties given up, weights rounded to nearest for want of data).
        spool: where the codes of a large model lie.
    """

    activations: Mapping[str, QParams]
    divisors: Mapping[str, npt.NDArray[np.float32]]
    weights: Mapping[tuple[str, int | None], QTensor]
    notes: tuple[str, ...]
    tokens: frozenset[str] = frozenset()
    spool: Spool | None = None
    carriers: Mapping[str, Carrier] = field(default_factory=dict)

    @property
    def factors(self) -> dict[str, npt.NDArray[np.float64]]:
        """Weighted node -> (channels,) what its output is multiplied by in the Q/DQ model: it carries divisors."""
        return factors(self.carriers, self.divisors)


def solve(
    model: Model,
    plan: Plan,
    table: CalibrationTable,
    *,
    samples: Iterable[Sample] | None = None,
    params: Mapping[str, QParams] | None = None,
    on_progress: Progress | None = None,
) -> Solution:
    """Choose every scale and round every weight.

    Args:
        model: the prepared float model.
        plan: its points.
        table: histograms of the plan's activation tensors.
        samples: re-iterable calibration samples, for roundings that need the second moments of a layer's inputs;
            without them such weights are rounded to nearest, and a note says so.
        params: of every activation tensor, as `activation_params` gives them, in place of the plan's calibrator.
        on_progress: called with (done, in all or None, text).

    Returns:
        The solution; the same arguments give the same one.

    Raises:
        StaleFileError: plan or table belong to another model.
        InputError: an edited plan has a weight that no integer kernel takes so, or a weight holds NaN or infinity.
    """
    plan.check(model)
    table.check(model, plan)
    _check_weights(model, plan)
    notes: list[str] = []
    samples = None if samples is None else second_moments.few(samples)
    activations = activation_params(model, plan, table, {}, notes) if params is None else dict(params)
    classes = token_scales.classes(model, plan, table, data=samples is not None)
    notes += classes.notes
    tokens, compressed = [*classes.tokens], classes.compressed
    running = {*tokens, *(p.tensor for p in plan.activations if FORMATS[p.spec.format].blocks)}
    static = {tensor: found for tensor, found in activations.items() if tensor not in running}
    divisors: dict[str, npt.NDArray[np.float32]] = {}
    formula = "smoothquant" if plan.settings.equalize == "auto" else plan.settings.equalize  # see `crossfit.resolved`
    if formula not in ("none", "awq") and samples is not None:
        wanted = _only(plan, [t for t in static if compressed is None or t in compressed])
        equalized = choose.choose(model, wanted, static, samples, formula=formula, on_progress=on_progress)
        divisors = {tensor: e.scale for tensor, e in equalized.items()}
        static |= {tensor: e.params for tensor, e in equalized.items()}
        activations |= static
        if equalized:
            gains = sorted(e.gain_db for e in equalized.values())
            notes.append(
                f"the channels of {len(equalized)} of {len(activations)} tensors are equalized: {gains[0]:.1f} to "
                f"{gains[-1]:.1f} dB less noise predicted at their consumers"
            )
    if samples is not None:
        late = token_scales.by_error(model, plan, static, divisors, samples, on_progress=on_progress)
        tokens += late
        for tensor in late:
            del static[tensor]
            divisors.pop(tensor, None)
    activations |= {tensor: QParams(scale=np.asarray(1, dtype=np.float32)) for tensor in tokens}
    if compressed is not None:
        asked = sum(p.spec.token is not None for p in plan.activations)
        notes.append(f"{len(tokens)} of {asked} tensors have one INT8 scale per token, computed as the engine runs")
    grams = _moments(model, plan, static, samples, divisors, notes, on_progress)
    if plan.settings.equalize != "none":
        divisors |= _balance(model, plan, grams, divisors, notes)
    carriers = carried(model, plan, divisors)
    if divisors:
        notes.append(
            f"of {len(divisors)} tensors whose channels are divided, {len(carriers)} are made so by the layer before; "
            "the others cost one Mul"
        )
    spool = Spool() if is_large(model.graph.initializer) else None
    weights = _weights(model, plan, grams, divisors, factors(carriers, divisors), spool, on_progress)
    return Solution(
        activations=activations,
        divisors=divisors,
        weights=weights,
        notes=tuple(notes),
        tokens=frozenset(tokens),
        spool=spool,
        carriers=carriers,
    )


def _weights(
    model: Model,
    plan: Plan,
    grams: second_moments.Grams,
    divisors: Mapping[str, npt.NDArray[np.float32]],
    outputs: Mapping[str, npt.NDArray[np.float64]],
    spool: Spool | None,
    on_progress: Progress | None,
) -> dict[tuple[str, int | None], QTensor]:
    """Every weight rounded by itself; one per core at a time, as far as the memory of their copies allows."""
    settings = plan.settings

    def solved(point: Point) -> QTensor:
        key = (point.tensor, point.spec.axis)
        reader = model.node(point.uses[0][0])
        moments, divisor, factor = grams.get(key), divisors.get(reader.input[0]), outputs.get(reader.name)

        def make() -> QTensor:
            return _weight(model, point, settings, moments, divisor, factor)

        with room.taken(_copies(model, point, moments)):
            if spool is None:
                return make()
            how = (settings.rounding, settings.damping, settings.act_order)
            decides = (model.sha256, plan.rewrites, point, how, version("qdq"), moments, divisor, factor)
            return spool.weight(key_of(*decides), make)

    room = Room(ROUNDING_BYTES)
    weights: dict[tuple[str, int | None], QTensor] = {}
    for index, (point, made) in enumerate(zip(plan.weights, overlapped(solved, plan.weights, cores()), strict=True)):
        weights[point.tensor, point.spec.axis] = made
        if on_progress is not None:
            on_progress(index + 1, len(plan.weights), "rounding weights")
    return weights


def _copies(model: Model, point: Point, moments: npt.NDArray[np.float64] | None) -> int:
    """Bytes that rounding a weight takes at most: itself and its codes, and without data little else."""
    values = tensor_bytes(model.initializers[point.tensor])
    return values * (12 if moments is not None else 2)


def _only(plan: Plan, tensors: list[str]) -> Plan:
    """The plan with no other activation points."""
    points = tuple(p for p in plan.points if p.role == "weight" or p.tensor in tensors)
    return replace(plan, points=points)


def _moments(
    model: Model,
    plan: Plan,
    static: Mapping[str, QParams],
    samples: Iterable[Sample] | None,
    divisors: Mapping[str, npt.NDArray[np.float32]],
    notes: list[str],
    on_progress: Progress | None,
) -> second_moments.Grams:
    """Second moments for the weights whose rounding or balancing wants them."""
    rounding = plan.settings.rounding
    by_data = ROUNDINGS[rounding].needs_moments
    balance = plan.settings.equalize not in ("none", "sinq")
    wanted = tuple(
        p
        for p in plan.weights
        if ROUNDINGS[rounding].needs_moments or (balance and p.spec.weight_only and p.spec.block)
    )
    if not wanted:
        return {}
    if samples is None:
        notes.append(f"weights are rounded to nearest: {rounding} needs the samples, and only a table was given")
        return {}
    others = tuple(p for p in plan.points if p.role != "weight")
    grams = second_moments.collect(
        model, replace(plan, points=(*others, *wanted)), static, samples, divisors=divisors, on_progress=on_progress
    )
    plain = [p.tensor for p in wanted if (p.tensor, p.spec.axis) not in grams]
    if plain and by_data:
        notes.append(
            f"{len(plain)} of {len(plan.weights)} weights are rounded without their inputs: {rounding} takes up to "
            f"{plan.settings.moment_inputs} inputs per output (moment_inputs), and no batched weights"
        )
    return grams


def _balance(
    model: Model,
    plan: Plan,
    grams: second_moments.Grams,
    divisors: Mapping[str, npt.NDArray[np.float32]],
    notes: list[str],
) -> dict[str, npt.NDArray[np.float32]]:
    """Divisors of the tensors that weight-only blocks read, and nothing quantized does; `grams` become those after."""
    readers: dict[str, list[Point]] = {}
    mixed = {p.tensor for p in plan.activations}
    for point in plan.weights:
        nodes = [model.node(name) for name, _ in point.uses]
        for node in nodes:
            readers.setdefault(node.input[0], []).append(point)
        known = plan.settings.equalize == "sinq" or (point.tensor, point.spec.axis) in grams
        alone = (
            point.spec.weight_only and point.spec.block and known and len(model.initializers[point.tensor].dims) == 2
        )
        if not alone or len({n.input[0] for n in nodes}) > 1 or any(attribute(n, "transA", 0) for n in nodes):
            mixed |= {n.input[0] for n in nodes}
    found = {}
    candidates = {tensor: points for tensor, points in readers.items() if tensor not in mixed | divisors.keys()}
    for tensor, points in candidates.items():
        rows, blocks = [], []
        for point in points:
            values = model.array(point.tensor)
            assert point.spec.axis is not None and point.spec.block is not None
            rows.append(np.moveaxis(values, point.spec.axis, -1).astype(np.float32))
            blocks.append(point.spec.block)
        fmt = points[0].spec.format
        if plan.settings.equalize == "sinq":
            divisor = weight_only.levelled(rows, blocks, fmt=fmt)
        else:
            moment = grams[points[0].tensor, points[0].spec.axis][0]
            divisor = weight_only.balanced(rows, blocks, moment, fmt=fmt)
        if divisor is not None:
            found[tensor] = divisor
            for key in {(p.tensor, p.spec.axis) for p in points} & grams.keys():
                grams[key] = grams[key] / np.outer(divisor, divisor)
    if candidates:
        notes.append(f"the channels of {len(found)} of {len(candidates)} tensors are balanced for their 4-bit readers")
    return found


def _check_weights(model: Model, plan: Plan) -> None:
    """Refuse weight points that an edited plan may hold, and values that no scale fits."""
    for point in plan.weights:
        values = model.array(point.tensor)
        for name, index in point.uses:
            node = model.node(name)
            if index != 1 or node.op_type not in WEIGHTED:
                raise InputError(
                    f"The plan quantizes {point.tensor!r} as the weight of operand {index} of {name!r} "
                    f"({node.op_type}): weights are operand 1 of {', '.join(WEIGHTED)}. Remove the consumer."
                )
            outputs, inputs = weight_axis(node, values.ndim), input_axis(node, values.ndim)
            axis, what = (inputs, "reduction") if point.spec.block else (outputs, "output channels")
            whole = point.spec.axis is None and point.spec.block is None  # one scale is right for any product
            if point.spec.axis != axis and not whole:
                raise InputError(
                    f"The plan quantizes {point.tensor!r} along axis {point.spec.axis}, but the {what} of "
                    f"{name!r} lie on axis {axis}. Set the axis to {axis}."
                )
            if (point.spec.block or point.spec.weight_only) and (node.op_type == "Conv" or point.spec.shift):
                raise InputError(
                    f"The plan gives the weight {point.tensor!r} of {name!r} ({node.op_type}) blocks or no quantized "
                    "data: TensorRT has kernels for that in Gemm and MatMul only. Set an axis of output channels."
                )
            if point.spec.via and values.ndim != 2:
                raise InputError(
                    f"The plan gives the batched weight {point.tensor!r} of {name!r} two levels: they need a matrix."
                )
        if not _finite(values):
            raise InputError(
                f"Weight {point.tensor!r} of the float model holds NaN or infinity: no scale fits it. "
                f"Mend the model, or exclude {point.uses[0][0]!r}."
            )


def _finite(values: npt.NDArray[np.generic]) -> bool:
    """Whether all values are finite as float32; makes no copy as large as the weight."""
    return all(bool(np.isfinite(np.float32(v))) for v in (values.max(), values.min())) if values.size else True


def _weight(
    model: Model,
    point: Point,
    settings: Settings,
    moments: npt.NDArray[np.float64] | None,
    divisor: npt.NDArray[np.float32] | None,
    factor: npt.NDArray[np.float64] | None,
) -> QTensor:
    """One weight rounded, its input channels multiplied by `divisor` and its output channels by `factor`."""
    reader, rounding = model.node(point.uses[0][0]), settings.rounding
    if moments is None and ROUNDINGS[rounding].needs_moments:
        rounding = without_data(point.spec)
    values = scaled(model.array(point.tensor), reader, divisor, factor)
    return quantize_weight(
        values,
        point.spec,
        outputs=weight_axis(reader, values.ndim),
        rounding=(
            settings.rounding
            if moments is not None or not ROUNDINGS[settings.rounding].needs_moments
            else without_data(point.spec)
        ),
        moments=moments,
        damping=settings.damping,
        act_order=settings.act_order,
    )


def without_data(spec: Spec) -> str:
    """The rounding of a weight whose inputs are not known: the best that needs none."""
    return "clip" if spec.block else "nearest"
