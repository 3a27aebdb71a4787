"""The float model beside a candidate on samples: what `check` and `deploy` report. Must not compile.

A Q/DQ model is computed in the types that its file gives its tensors, or rounded where an engine's kernels write them;
the float model as the user gave it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from calib_data import Samples
from engines.backends.backend import Running, backend_named
from engines.backends.doctor import gpus
from engines.backends.layers import LayerTable
from engines.core import arithmetic, onnx_runtime as ort
from engines.core.documents import replace
from engines.core.errors import EngineError
from engines.core.files import sha256_file
from engines.verify.as_compiled import roundings
from engines.verify.compare import compare
from engines.verify.report import Alarms, Limits, Report, Unit
from qdq.build.keys.segmentation import WholeVolumes
from qdq.core.choices import choose
from qdq.core.disk.cache import remembered
from qdq.core.progress import Progress
from qdq.deploy.volumes.evaluate import compare_volumes
from qdq.deploy.volumes.slices import Keeper
from qdq.measure.inference.kept import seen
from qdq.measure.inference.samples import Sample
from qdq.model.as_bytes import identity
from qdq.model.graphsurgeon import ModelSource, called
from qdq.model.model import Model
from qdq.model.storage import load
from qdq.passes.prepare import prepare

NOT_RUN = "the Q/DQ model in ONNX Runtime stood for the engine, which was not run"


def float_session(model: Model, where: str, *, custom_ops: Sequence[str] = ()) -> Any:
    """ONNX Runtime's session of a float model as the user gave it, repaired where it had to be.

    In FP32 where ONNX Runtime has no FP64 kernels for it.

    Args:
        model: as it was loaded.
        where: what messages call it.
        custom_ops: libraries of custom operators that ONNX Runtime needs for it.

    Raises:
        EngineError: ONNX Runtime refuses the model or a library.
    """
    try:
        if model.file is not None:
            return ort.session(model.file, custom_ops=custom_ops)
        return ort.session(model.proto, directory=model.directory, where=where, custom_ops=custom_ops)
    except EngineError:
        single = prepare(model)
        if not single.notes:
            raise
    return ort.session(single.proto, directory=model.directory, where=where, custom_ops=custom_ops)


def evaluate(
    float_model: ModelSource,
    candidate: ModelSource,
    samples: Samples,
    *,
    limits: Mapping[str, float],
    alarms: Alarms | None = None,
    task: str = "auto",
    class_axis: int | None = None,
    units: Mapping[str, Unit] = MappingProxyType({}),
    engine_backend: str | None = None,
    running: Running | None = None,
    as_compiled: LayerTable | None = None,
    predicted: bool = False,
    custom_ops: Sequence[str] = (),
    whole: WholeVolumes | None = None,
    pictures: Keeper | None = None,
    on_progress: Progress | None = None,
) -> Report:
    """The candidate's outputs against those of the float model as the user gave it.

    Args:
        float_model: a path, an onnx.ModelProto or an onnx_graphsurgeon.Graph.
        candidate: a Q/DQ model in these forms, which stands for its engine; or the path of an engine.
        limits: keys of `qdq.build.recipe.LIMITS`.
        alarms: below these a result is called poor.
        task: what the outputs are, as in `engines.verify.meaning.meanings`.
        class_axis: axis of their classes; None is what the graph tells.
        units: output -> in which unit its mean error is told.
        engine_backend: that runs the candidate where it is an engine.
        running: what the engine needs beside it.
        as_compiled: layers of the candidate's engine: values are rounded where its kernels write them, and nowhere
            else. None rounds where the file says.
        predicted: the layers are those of another compiler, which predicts the engine.
        custom_ops: libraries of custom operators that ONNX Runtime needs for the models.
        whole: how the samples' images are run as whole volumes too, where that is asked for.
        pictures: as of `compare_volumes`.

    Raises:
        InputError: a unit is of an output that the model does not have.

    Where work is kept, what was found of the same models and samples before; not what a GPU ran, nor of whole volumes.
    """

    def found() -> Report:
        return _evaluated(
            float_model,
            candidate,
            samples,
            limits=limits,
            alarms=alarms,
            task=task,
            class_axis=class_axis,
            engine_backend=engine_backend,
            running=running,
            as_compiled=as_compiled,
            predicted=predicted,
            custom_ops=custom_ops,
            whole=whole,
            pictures=pictures,
            on_progress=on_progress,
        )

    for name in units:
        choose(name, [o.name for o in load(float_model).outputs], "output")
    if engine_backend or (whole and whole.asked):
        return replace(found(), units=dict(units))
    asked = (sorted(limits.items()), alarms, task, class_axis, predicted, bool(gpus()))
    kept = remembered(
        "reports",
        lambda: (
            *identity(load(float_model)),
            *identity(load(candidate)),
            as_compiled and as_compiled.to_json(),
            asked,
            *map(sha256_file, custom_ops),
            *seen(samples),
        ),
        found,
        pack=lambda report: {"report": report.to_json().encode()},
        unpack=lambda parts: Report.from_json(parts["report"]),
    )
    return replace(kept, units=dict(units))


def _evaluated(
    float_model: ModelSource,
    candidate: ModelSource,
    samples: Samples,
    *,
    limits: Mapping[str, float],
    alarms: Alarms | None,
    task: str,
    class_axis: int | None,
    engine_backend: str | None,
    running: Running | None,
    as_compiled: LayerTable | None,
    predicted: bool,
    custom_ops: Sequence[str],
    whole: WholeVolumes | None,
    pictures: Keeper | None,
    on_progress: Progress | None,
) -> Report:
    total = samples.len_or_none()

    def counted() -> Iterator[Sample]:
        for done, sample in enumerate(samples):
            if on_progress:
                on_progress(done, total, "Check")
            yield sample
        if on_progress and total is not None:
            on_progress(total, total, "Check")

    reference = load(float_model)
    name, notes = "engine", []
    if engine_backend:
        tried: Any = backend_named(engine_backend).runner(called(candidate), name=name, running=running)
    else:
        model = load(candidate)
        found = roundings(model.proto, as_compiled) if as_compiled else None
        name = "Q/DQ model"
        if found and as_compiled:
            name = f"Q/DQ model {'as predicted' if predicted else 'as compiled'}"
            notes = [f"rounded {'as predicted' if predicted else 'as compiled'} by {as_compiled.backend}: {found.note}"]
        tried = arithmetic.session(
            model.proto,
            directory=model.directory,
            where=called(candidate) if isinstance(candidate, str | os.PathLike) else "the Q/DQ model",
            written=found.written if found else None,
            custom_ops=custom_ops,
        )
    expected = float_session(reference, called(float_model), custom_ops=custom_ops)
    names = ("float model", name)
    volumes = None
    if whole and whole.asked:
        volumes = compare_volumes(
            expected,
            tried,
            samples,
            whole,
            graph=reference.proto,
            task=task,
            class_axis=class_axis,
            names=names,
            pictures=pictures,
            on_progress=on_progress,
        )
    report = compare(
        expected,
        tried,
        counted(),
        limits=Limits(**limits),
        alarms=alarms,
        task=task,
        class_axis=class_axis,
        model=reference.proto,
        stood_for_engine=engine_backend is None,
        names=names,
    )
    if engine_backend and (kept := getattr(tried, "runtime_cache", None)):
        notes = [kept.note] * bool(kept.note)
    stood = [NOT_RUN if gpus() else report.note] if report.stood_for_engine else []
    return replace(report, note="; ".join([*stood, *notes]), volumes=volumes)
