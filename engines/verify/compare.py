"""Reference against candidate on samples: what quantization, or an engine, costs in accuracy.

Two Polygraphy runners -> its Comparator runs one sample at a time -> `Sums` per output -> `Report` with limits.
The first sample decides what each output means. Must not keep outputs: memory does not grow with the samples.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx

from engines.core import onnx_runtime as ort
from engines.core.errors import EngineError, import_runtime
from engines.core.load import load_graph
from engines.core.nodes import leading_is_batch, sized_by_values
from engines.verify.meaning import FirstSample, Meaning, meanings
from engines.verify.report import Alarms, Limits, OutputReport, Report
from engines.verify.sums import Sums

STOOD_FOR_ENGINE = "the Q/DQ model in ONNX Runtime stood for the engine: no GPU here"


class OutputSums:
    """The sums of every output of one model; a meaning for each comes with the first sample."""

    def __init__(
        self, model: Path | str | onnx.ModelProto | None, *, task: str = "auto", class_axis: int | None = None
    ) -> None:
        """Of a float model; None where there is only a runner of it. `task` and `class_axis` as in `meanings`."""
        self._model, self._task, self._class_axis = model, task, class_axis
        self._sums: dict[str, Sums] = {}
        self._sized: frozenset[str] = frozenset()
        self._batched = True  # along the leading axis that all inputs share lie samples
        self._unlike: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self.samples = 0

    def add(
        self, inputs: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray], candidate: Mapping[str, np.ndarray]
    ) -> None:
        """Adds the outputs of one sample, arrays by name."""
        shapes = {name: np.shape(array) for name, array in inputs.items()}
        if not self._sums:
            seen = FirstSample(inputs=shapes, outputs=reference)
            graph = load_graph(self._model) if self._model is not None else None
            found = meanings(graph, seen, task=self._task, class_axis=self._class_axis)
            self._sums = {name: Sums(found[name]) for name in reference}
            self._sized = sized_by_values(graph.graph) if graph is not None else frozenset()
            self._batched = graph is None or leading_is_batch(graph.graph)
        batches = {shape[0] if shape else 0 for shape in shapes.values()}
        for name, array in reference.items():
            leading = array.shape[0] if array.ndim else 0
            batched = self._batched and batches == {leading}
            if array.shape != candidate[name].shape:
                self._unlike.setdefault(name, (array.shape, candidate[name].shape))
            self._sums[name].add(array, candidate[name], leading if leading and batched else None)
        self.samples += 1

    def reports(self, others: Mapping[str, str] = MappingProxyType({})) -> tuple[OutputReport, ...]:
        """The metrics of each output; `others` are those that are no tensors, and what they are.

        Raises:
            EngineError: there was no sample, or an output whose size does not depend on values never had the shape of
                the reference.
        """
        if not self.samples:
            raise EngineError("There is no sample to compare on: give at least one.")
        found = []
        for name, sums in self._sums.items():
            if not sums.samples and name not in self._sized:
                shape, other = self._unlike[name]
                raise EngineError(f"Output {name} has shape {shape} in the reference and {other} elsewhere.")
            why = f"its size depends on the data ({sums.samples} of {self.samples} samples had the same shape)"
            left = why if sums.mismatched and name in self._sized else ""
            found.append(sums.report(name, not_compared=left))
        none = (
            Sums(Meaning(task="none", why=f"it is {kind}")).report(n, not_compared=kind) for n, kind in others.items()
        )
        return (*found, *none)


def compare(
    reference: Any,
    candidate: Any,
    samples: Iterable[Mapping[str, np.ndarray]],
    *,
    limits: Limits | None = None,
    alarms: Alarms | None = None,
    task: str = "auto",
    class_axis: int | None = None,
    model: Path | str | onnx.ModelProto | None = None,
    stood_for_engine: bool = False,
    names: tuple[str, str] = ("reference", "candidate"),
) -> Report:
    """Runs both on every sample and compares their outputs by name.

    Args:
        reference: a Polygraphy runner (of `onnx_runtime` or a backend), an ONNX Runtime session, an ONNX path or model.
        candidate: the same.
        samples: {input name: array}; consumed one at a time.
        limits: what decides `passed`.
        alarms: what decides `poor`.
        task: what the outputs are, as in `meanings`; 'auto' takes what the reference's graph tells.
        class_axis: axis of the classes; None takes the one that the graph tells.
        model: the graph of the reference where that is a session or a runner.
        stood_for_engine: the candidate is the Q/DQ model in ONNX Runtime in place of an engine; the report says so.
        names: shown in the report.

    Raises:
        EngineError: no samples, a sample with wrong input names, outputs with other names or in every sample with
            another shape, or a failed run.
        MissingRuntimeError: onnxruntime or polygraphy is not installed.
    """
    polygraphy = import_runtime("polygraphy.comparator")
    exceptions = import_runtime("polygraphy.exception")
    log = import_runtime("polygraphy.logger").G_LOGGER
    sources = [_opened(x) for x in (reference, candidate)]
    others: dict[str, str] = {}
    for source in sources:
        others |= ort.no_tensors(source) if hasattr(source, "get_outputs") else {}
    runners = [_runner(x, name) for x, name in zip(sources, names, strict=True)]
    if model is None and isinstance(reference, str | Path | onnx.ModelProto):
        model = reference
    sums = OutputSums(model, task=task, class_axis=class_axis)
    fed: deque[dict[str, np.ndarray]] = deque()  # samples that were run and not yet compared: one

    def checked() -> Iterator[dict[str, np.ndarray]]:
        for sample in samples:  # both runners are active here
            for r in runners:
                ort.check_sample(sample, r.get_input_metadata(use_numpy_dtypes=False))
            fed.append(dict(sample))
            yield fed[-1]

    def accumulate(ref: Mapping[str, np.ndarray], cand: Mapping[str, np.ndarray]) -> None:
        if set(ref.keys()) != set(cand.keys()):
            raise EngineError(f"The reference has outputs {sorted(ref.keys())}, the candidate {sorted(cand.keys())}.")
        sums.add(fed.popleft(), ref, cand)

    failures: tuple[type[Exception], ...] = (exceptions.PolygraphyException, *ort.failures())
    with log.verbosity(log.CRITICAL + 1):
        try:
            for iteration in polygraphy.Comparator.run(runners, data_loader=checked(), streaming=True):
                accumulate(*(iteration[index][1][0] for index in (0, 1)))
        except failures as error:
            raise EngineError(f"Running {names[0]} and {names[1]} on a sample failed: {error}") from error
    return Report(
        outputs=sums.reports(others),
        samples=sums.samples,
        limits=limits or Limits(),
        alarms=alarms or Alarms(),
        reference=names[0],
        candidate=names[1],
        stood_for_engine=stood_for_engine,
        note=STOOD_FOR_ENGINE if stood_for_engine else "",
    )


def _opened(source: Any) -> Any:
    """A session of a path or a model; a session or a runner as it is."""
    return ort.session(source) if isinstance(source, str | Path | onnx.ModelProto) else source


def _runner(source: Any, name: str) -> Any:
    """A Polygraphy runner of a session or a runner, under a name."""
    if hasattr(source, "get_inputs"):
        return ort.runner(source, name=name)
    source.name = name
    return source
