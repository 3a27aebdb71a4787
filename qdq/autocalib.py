"""`--calibrator auto`: the calibrator of each tensor by the error it causes where the tensor is read.

table -> candidate parameters per tensor -> float model with the error of each candidate sent through its consumers,
summed in the graph -> best method per tensor -> whole models (this mixture, and each method alone) on held-out
calibration samples -> the best one. This module must not see samples other than those of the calibration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from qdq.calibrate import Progress
from qdq.footprint import cores
from qdq.formats import FORMATS
from qdq.graph import Model
from qdq.insert import insert
from qdq.judge import Judge, Split, split
from qdq.observers import LIMITS
from qdq.plan import Plan
from qdq.qtensor import QParams
from qdq.scheme import CALIBRATORS
from qdq.solve import Solution, activation_params, solve
from qdq.table import CalibrationTable
from qdq.tap import Sample, Tap, overlapped

METHODS = tuple(name for name in CALIBRATORS if name in LIMITS)
MARGIN_DB = 0.5  # by which another must beat the default: less, on few samples, is chance


def solve_auto(
    model: Model,
    plan: Plan,
    table: CalibrationTable,
    *,
    samples: Iterable[Sample],
    on_progress: Progress | None = None,
) -> Solution:
    """The solution of the mixture of calibrators, or of one for all tensors, whichever keeps the outputs best.

    It is mse if none beats that by MARGIN_DB.

    Args:
        model: the prepared float model.
        plan: its points; its settings hold all but the calibrator.
        table: histograms of the plan's activation tensors.
        samples: re-iterable calibration samples.
        on_progress: called with (done, in all or None, text).

    Returns:
        The best solution; its notes begin with what was picked and why.

    Raises:
        StaleFileError, InputError: see `solve`.
    """
    held = split(samples)
    judge = Judge(model, held)
    notes: list[str] = []
    params = {
        m: activation_params(model, plan, table, dict.fromkeys(table.tensors, m), notes if m == METHODS[0] else None)
        for m in METHODS
    }
    mixture = pick(model, plan, params, held, on_progress=on_progress)
    candidates: dict[str, Mapping[str, str]] = {m: dict.fromkeys(mixture, m) for m in METHODS}
    if len(set(mixture.values())) > 1:
        candidates["mixed"] = mixture
    chosen = {name: {t: params[m][t] for t, m in methods.items()} for name, methods in candidates.items()}
    found: dict[str, float] = {}
    solutions: dict[str, Solution] = {}
    for name in candidates:  # rounded and equalized as in the end: the order of the calibrators depends on it
        solutions[name] = solve(model, plan, table, samples=samples, params=chosen[name], on_progress=on_progress)
        found[name] = judge.sqnr_db(insert(model, plan, solutions[name]))
    best = max(found, key=found.__getitem__)
    if found[best] < found[METHODS[0]] + MARGIN_DB:
        best = METHODS[0]
    counts = {m: list(candidates[best].values()).count(m) for m in METHODS}
    what = ", ".join(f"{count} {m}" for m, count in counts.items() if count)
    scores = ", ".join(f"{name} {score:.1f}" for name, score in found.items())
    note = (
        f"calibrator auto took {best} ({what} of {len(mixture)} tensors): output SQNR in dB on {len(held.held)} "
        f"held-out calibration samples: {scores}"
    )
    return replace(solutions[best], notes=(note, *notes, *solutions[best].notes))


def pick(
    model: Model,
    plan: Plan,
    params: Mapping[str, Mapping[str, QParams]],
    held: Split,
    *,
    on_progress: Progress | None = None,
) -> dict[str, str]:
    """The method per activation tensor with the least error at its consumers' outputs.

    The error of a consumer is |W (x - x')|^2 / |W x|^2 over the samples to fit, x' the quantized x, W its float weight;
    errors of several consumers add up. Tied tensors share one method, the one with the least sum.

    Args:
        model: the prepared float model.
        plan: its points.
        params: method -> tensor -> parameters.
        held: samples to fit on.
        on_progress: called with (samples done, samples in all, text).

    Returns:
        Tensor -> method; of equal errors the method named first in METHODS.
    """
    probe = _Probe(model)
    wanted: dict[tuple[str, str], list[tuple[str, str]]] = {}  # (tensor, method) -> (error, signal) outputs
    for point in plan.activations:
        readers = [
            model.node(n) for n, i in point.uses if i == 0 and model.node(n).op_type in ("Conv", "Gemm", "MatMul")
        ]
        signals = [probe.energy(node, point.tensor) for node in readers]
        for method in METHODS:
            error = probe.error(point.tensor, params[method][point.tensor])
            energies = [probe.energy(node, error) for node in readers]
            wanted[point.tensor, method] = list(zip(energies, signals, strict=True))
    tap = Tap(probe.model(), probe.outputs, threads=1)
    sums: dict[str, float] = dict.fromkeys(probe.outputs, 0.0)
    for done, values in enumerate(overlapped(tap, held.fitting(), cores()), 1):
        for name, value in values.items():
            sums[name] += float(value)
        if on_progress is not None:
            on_progress(done, len(held.fit), "comparing calibrators")
    groups: dict[str, list[str]] = {}
    for point in plan.activations:
        groups.setdefault(point.tie or point.tensor, []).append(point.tensor)
    chosen = {}
    for tensors in groups.values():
        errors = {
            m: sum(sums[e] / max(sums[s], 1e-30) for tensor in tensors for e, s in wanted[tensor, m]) for m in METHODS
        }
        chosen.update(dict.fromkeys(tensors, min(METHODS, key=errors.__getitem__)))
    return chosen


class _Probe:
    """The float model with nodes that compute errors and energies, each made once."""

    def __init__(self, model: Model) -> None:
        self._base = model
        self._proto = ModelProto()
        self._proto.CopyFrom(model.proto)
        self._made: dict[tuple[object, ...], str] = {}

    @property
    def outputs(self) -> list[str]:
        """The energies."""
        return [name for key, name in self._made.items() if key[0] == "energy"]

    def model(self) -> Model:
        """The model so far."""
        return self._base.replace(self._proto)

    def error(self, tensor: str, params: QParams) -> str:
        """The tensor less itself quantized and dequantized."""
        key = ("error", tensor, float(params.scale), params.zero_point)
        if key not in self._made:
            fmt = FORMATS[params.format]
            info = self._base.info(tensor)
            dtype = _numpy(info.dtype if info is not None else "float32")
            scale = self._constant(np.asarray(params.scale).astype(dtype))
            zero = self._constant(np.asarray(params.zero_point, dtype=fmt.dtype))
            codes = self._add("QuantizeLinear", tensor, scale, zero)
            self._made[key] = self._add("Sub", tensor, self._add("DequantizeLinear", codes, scale, zero))
        return self._made[key]

    def energy(self, node: NodeProto, tensor: str) -> str:
        """Sum of the squares of what a weighted node makes of a tensor in place of its data operand, without bias."""
        key = ("energy", node.name, tensor)
        if key not in self._made:
            copy = NodeProto()
            copy.CopyFrom(node)
            del copy.input[:]
            copy.input.extend([tensor, node.input[1]])
            copy.name = copy.output[0] = self._name()
            self._proto.graph.node.append(copy)
            wide = self._add("Cast", copy.output[0], to=TensorProto.FLOAT)  # squares would overflow float16
            self._made[key] = self._add("ReduceSumSquare", wide, keepdims=0)
        return self._made[key]

    def _name(self) -> str:
        return f"qdq_probe_{len(self._proto.graph.node)}_{len(self._proto.graph.initializer)}"

    def _add(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        name = self._name()
        self._proto.graph.node.append(helper.make_node(op_type, list(inputs), [name], name=name, **attributes))
        return name

    def _constant(self, values: np.ndarray) -> str:
        name = self._name()
        self._proto.graph.initializer.append(numpy_helper.from_array(values, name))
        return name


def _numpy(name: str) -> np.dtype[np.generic]:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
