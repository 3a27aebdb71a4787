"""What a model is asked to do well (`Task`), the samples with their labels, and a candidate's score on them.

folder of .npz with labels -> `labelled` -> Samples that also hold the labels -> `score`: reference and candidate run in
ONNX Runtime sample by sample -> SQNR of the worst output, the task's metric of one. `inputs_only` is what models get.
Must not keep more outputs than `KEPT_BYTES`, and must not know how a candidate was made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from calib_data import DataError, InputSpec, Samples, open_samples
from calib_data.sources import ArrayForm, ImageForm, form_of
from calib_data.sources.function import PythonFunction
from calib_data.volumes.samples import label_form
from calib_data.volumes.spec import VolumeSpec
from engines.core import arithmetic, onnx_runtime as ort
from engines.core.errors import EngineError
from engines.verify.compare import OutputSums
from engines.verify.meaning import FirstSample, meanings
from engines.verify.report import worst_of
from qdq.build.keys.segmentation import WholeVolumes
from qdq.core.choices import choose
from qdq.core.errors import InputError
from qdq.core.progress import Progress
from qdq.core.resources import default_bytes
from qdq.deploy.check import float_session
from qdq.deploy.compare.metrics import METRICS, Array, metric
from qdq.deploy.compare.runs import runs
from qdq.deploy.compare.task import Task
from qdq.deploy.compare.volume_metrics import OfVolumes
from qdq.deploy.volumes.evaluate import compare_volumes
from qdq.measure.inference.inputs import input_specs
from qdq.model.model import Model
from qdq.model.storage import load

KEPT_BYTES = 1 << 28  # of the reference's outputs; beyond, it runs again for every candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How near the outputs are to the float model's, the metric's value, and how many samples were seen.

    Attributes:
        sqnr_db: of the worst output; None where no output is of numbers.
        sqnr_spread_db: of that output, against its spread over samples; None where that is not known.
        worst_output: its name.
        value: of the metric; of several outputs that are scored, that of the worst.
        values: output -> value, in the unit of each.
        value_of: the output of `value`.
        classes: on which axis they were taken to be, and why; '' for a metric without classes.
        samples: seen.
        masked: tokens, of a metric of masked ones.
    """

    sqnr_db: float | None
    sqnr_spread_db: float | None
    worst_output: str
    value: float
    values: dict[str, float]
    value_of: str
    classes: str
    samples: int
    masked: int = 0


def labelled(
    source: str,
    model: Model,
    labels: str,
    *,
    required: bool = True,
    volume: VolumeSpec | None = None,
    case_key: bytes | None = None,
) -> Samples:
    """Evaluation samples that hold one array more than the model's inputs, whatever its shape.

    Args:
        source: as in `calib_data.open_samples`; in one .npz file the labels' leading axis runs over the samples.
        model: says the inputs.
        labels: name of the array; an input of the model may be its own label.
        required: False opens samples without such an array as those of the inputs alone.
        volume: what is done to images; their labels are the array `label`.
        case_key: as in `calib_data.open_samples`.

    Raises:
        DataError: see `calib_data.open_samples`; or the samples hold no such array, and it is required.
    """
    return _labelled(source, input_specs(model), labels, required=required, volume=volume, case_key=case_key)


def _labelled(
    source: str,
    specs: tuple[InputSpec, ...],
    labels: str,
    *,
    required: bool,
    volume: VolumeSpec | None,
    case_key: bytes | None,
) -> Samples:
    def opened(*more: InputSpec) -> Samples:
        return open_samples(source, (*specs, *more), volume=volume, case_key=case_key)

    if labels in [spec.name for spec in specs]:
        return opened()
    try:
        shape, dtype = _label_form(source, labels, volume)
    except DataError:
        if required:
            raise
        return opened()
    return opened(InputSpec(name=labels, dtype="float64" if dtype.kind == "f" else "int64", shape=(None,) * len(shape)))


def inputs_only(samples: Samples, model: Model) -> Samples:
    """The same samples without labels."""
    return _only(samples, input_specs(model))


def unlabelled(
    source: str,
    specs: tuple[InputSpec, ...],
    labels: str,
    *,
    volume: VolumeSpec | None = None,
    case_key: bytes | None = None,
) -> Samples:
    """Samples of the inputs alone, where arrays may hold those of one more name; arguments as of `labelled`.

    Labels of images lie in files of their own, which nobody reads for the inputs.
    """
    if isinstance(form_of(source), ImageForm):
        return open_samples(source, specs, volume=volume, case_key=case_key)
    return _only(_labelled(source, specs, labels, required=False, volume=volume, case_key=case_key), specs)


def _only(samples: Samples, specs: tuple[InputSpec, ...]) -> Samples:
    if len(samples.inputs) == len(specs):
        return samples

    def read() -> Iterator[dict[str, Array]]:
        return ({spec.name: sample[spec.name] for spec in specs} for sample in samples)

    source = PythonFunction(where=samples.origin, function=read, count=samples.len_or_none())
    return Samples(inputs=specs, source=source, indices=samples.indices, origin=samples.origin)


def _label_form(source: str, name: str, volume: VolumeSpec | None) -> ArrayForm:
    """Shape and type of the labels of one sample."""
    form = form_of(source)
    found = label_form(form, source, volume) if isinstance(form, ImageForm) else form.arrays(source)
    if name in found:
        return found[name]
    there = ", ".join(sorted(found)) or "no named arrays"
    source = "what --data or --eval names" if isinstance(form, ImageForm) else source
    raise DataError(
        f"No labels {name!r} in {source}: its samples hold {there}. Save them beside the inputs, "
        "numpy.savez(path, **inputs, labels=labels), or compare with the float model: leave the labels out."
    )


class Reference:
    """The float model's outputs for each sample, kept from the first candidate on as far as `KEPT_BYTES` allow."""

    def __init__(self, path: Path | str, *, custom_ops: Sequence[str] = ()) -> None:
        """Of a model's file; `custom_ops` are libraries for ONNX Runtime."""
        self._model, self._path, self._custom_ops = load(path), path, custom_ops
        self._session: Any = None
        self._kept: dict[int, dict[str, Array]] = {}
        self._bytes = 0

    @property
    def graph(self) -> ModelProto:
        """The model without its external data."""
        return self._model.proto

    @property
    def session(self) -> Any:
        """ONNX Runtime's session of it, opened once."""
        if self._session is None:
            self._session = float_session(self._model, str(self._path), custom_ops=self._custom_ops)
        return self._session

    def outputs(self, index: int, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs for the sample of an index.

        Raises:
            EngineError: ONNX Runtime refuses the model or the sample.
        """
        if index in self._kept:
            return self._kept[index]
        found = next(ort.run(self.session, [inputs]))
        self._bytes += sum(array.nbytes for array in found.values())
        if self._bytes <= min(KEPT_BYTES, default_bytes() // 4):
            self._kept[index] = found
        return found


def require_mask(reference: Reference, samples: Samples, task: Task, *, model: Model) -> None:
    """Refuse a mask token that the float model does not take, before any scheme is made.

    Raises:
        InputError: names the token.
    """
    if task.masking is None:
        return
    for index, run in enumerate(islice(runs(samples, model, task), 2), 1):  # the first may have none masked
        try:
            reference.outputs(index, run.inputs)
        except EngineError as error:
            token = task.masking.token
            raise InputError(f"The float model does not take {token}, given as --mask-token: {error}") from error


def score(
    reference: Reference,
    candidate: Path | str,
    samples: Samples,
    task: Task,
    *,
    model: Model,
    custom_ops: Sequence[str] = (),
    whole: WholeVolumes | None = None,
    on_progress: Progress | None = None,
) -> Score:
    """Run a model on every sample, in its own arithmetic, and compare it with the float model.

    Args:
        reference: of the float model, for these samples.
        candidate: a float or Q/DQ model's file with the same inputs and outputs.
        samples: with the task's labels, in the same order each time.
        model: the float model, loaded: says inputs and outputs.
        custom_ops: libraries of custom operators for ONNX Runtime.
        whole: how whole volumes are run, for a metric of them.

    Raises:
        InputError: the task does not fit the model or the labels.
        EngineError: ONNX Runtime refuses a model or a sample.
    """
    outputs = [o.name for o in model.outputs if not o.dtype.endswith("_type")]
    if not outputs:
        raise EngineError("No output is a tensor, so there is nothing to score.")
    of = choose(task.output, outputs, "output") if task.output else outputs[0]
    for name in task.units:
        choose(name, outputs, "output")
    numeric = [o.name for o in model.outputs if "float" in o.dtype]
    each = (task.of_each and numeric) or [of]
    scored = {name: metric(task.metric, per=1 / task.unit_of(name).scale) for name in each}
    total = samples.len_or_none()
    tried = load(candidate)
    session = arithmetic.session(tried.proto, directory=tried.directory, where=str(candidate), custom_ops=custom_ops)
    sums, classes, seen, masked = OutputSums(reference.graph), "", 0, 0
    for done, run in enumerate(runs(samples, model, task), 1):
        inputs, labels, seen = run.inputs, run.labels, run.sample
        found, expected = next(ort.run(session, [inputs])), reference.outputs(done, inputs)
        sums.add(inputs, {name: expected[name] for name in outputs}, found)
        if done == 1 and METRICS[task.metric].has_classes:
            first = FirstSample(inputs={k: np.shape(v) for k, v in inputs.items()}, outputs={of: expected[of]})
            meant = meanings(reference.graph, first, task="classification", class_axis=task.class_axis)[of]
            axis = task.class_axis if meant.axis is None else meant.axis  # one that does not fit, the metric refuses
            if axis is not None:
                scored[of], classes = metric(task.metric, axis=axis), f"{of}: {meant.why}"
        for name, counting in scored.items():
            if labels is not None or found[name].shape == expected[name].shape:
                counting.add(found[name], expected[name], labels)
        masked += int(np.count_nonzero(labels >= 0)) if task.masking and labels is not None else 0
        if on_progress:
            on_progress(seen, total, "score")
    if isinstance(counting := scored[of], OfVolumes):
        volumes = compare_volumes(
            reference.session,
            session,
            samples,
            whole or WholeVolumes(),
            graph=reference.graph,
            class_axis=task.class_axis,
            on_progress=on_progress,
        )
        counting.take(volumes.to_labels[1] if task.labels else volumes.to_float)
        classes = f"of whole volumes: {volumes.decoded}; {volumes.window}"
    worst = worst_of(sums.reports())
    least = max(scored, key=lambda name: math.inf if math.isnan(r := scored[name].relative) else r)
    return Score(
        sqnr_db=-math.inf if worst.sqnr_db is not None and math.isnan(worst.sqnr_db) else worst.sqnr_db,
        sqnr_spread_db=worst.sqnr_spread_db,
        worst_output=worst.name,
        value=scored[least].value,
        values={name: counting.value for name, counting in scored.items()},
        value_of=least,
        classes=classes,
        samples=seen,
        masked=masked,
    )
