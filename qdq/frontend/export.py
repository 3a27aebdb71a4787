"""`export_torch`: a PyTorch module becomes an ONNX file that is checked against it.

module, example -> `pytorch.call` flat -> `pytorch.capture` a file -> `pytorch.renamed` -> compared, accepted -> moved.
Must not change the module, nor leave a file that computes something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from calib_data import DataError
from engines.core.errors import EngineError
from qdq.core.errors import InputError, ModelError
from qdq.core.files import folder_beside, move_all
from qdq.frontend.compare import Arrays, compared
from qdq.frontend.exported import TOLERANCE, Dynamic, Exported, OutputError
from qdq.frontend.pytorch.axes import BATCH, Axes, batch_of, mirrored, named_axes, of_batch
from qdq.frontend.pytorch.call import Call, call_of, distinct_outputs, named_tensors, one_call
from qdq.frontend.pytorch.capture import has_constant_outputs, open_axes
from qdq.frontend.pytorch.job import How, Job, NotExportedError
from qdq.frontend.pytorch.libraries import quiet, torch_here
from qdq.frontend.pytorch.refused import Why, why
from qdq.frontend.pytorch.state import at_rest, in_fp32, placed, unwrapped
from qdq.frontend.pytorch.write import write
from qdq.frontend.sizes import Given, differing, options
from qdq.measure.inference.inputs import as_samples
from qdq.passes.prepare import load_float

BATCHES = (1, 3)  # that a file with an open batch is also tried on


def export_torch(
    module: Any,
    example_inputs: Any,
    path: Path | str,
    *,
    dynamic: Dynamic | bool | None = None,
    opset: int | None = None,
    input_names: Sequence[str] = (),
    output_names: Sequence[str] = (),
    samples: Given = (),
    tolerance: float = TOLERANCE,
    source: str = "",
) -> Exported:
    """Write a module as an ONNX file, and check it in ONNX Runtime against PyTorch.

    The module is left as it was: it is exported in eval mode and put back after that, and its buffers stay.

    Args:
        module: a torch.nn.Module, a torch.jit.ScriptModule or a torch.export.ExportedProgram, on any device.
        example_inputs: a tensor, a tuple of what `forward` takes by position, or a dict by name; None: those of an
            ExportedProgram. None and values that are no tensor are fixed in the file.
        path: of the ONNX file. Weights beyond 1.5 GB go to `<path>.data`.
        dynamic: sizes that stay open, as {"input": {0: "batch"}}; False: none; None: the batch, if the file is then
            right for other batches too, and those in which samples differ.
        opset: of ONNX; None: one that the compilers take.
        input_names, output_names: in place of those of the signature of `forward`, and of the keys that it returns.
        samples: more inputs to compare on, of which the first ones are taken: what `quantize` takes, or a function
            that opens them for the written model.
        tolerance: largest difference that an output may have, as a part of its largest magnitude.
        source: what messages, notes and records call the module; "": its class.

    Raises:
        InputError: the module cannot be exported, or the file computes something else; names the cause.
        MissingRuntimeError: torch, onnxscript or onnxruntime is not installed.
    """
    torch = torch_here()
    label, path = source or type(module).__name__, Path(path)
    if not 0 <= tolerance < float("inf"):
        raise InputError(f"The tolerance is {tolerance}; it must be a number of at least 0, as {TOLERANCE}.")
    how = How(label=label, dynamic=dynamic, opset=opset, outputs=tuple(output_names), tolerance=tolerance)
    if isinstance(module, torch.export.ExportedProgram):
        if dynamic not in (None, False):
            raise InputError(
                f"{label} is an ExportedProgram, whose open sizes were decided by torch.export. Leave out dynamic."
            )
        example = module.example_inputs if example_inputs is None else example_inputs
        if example is None:
            raise InputError(f"{label} holds no example inputs. Give them.")
        with quiet(), torch.no_grad():
            called = module.module()
            by_name = module.call_spec.in_spec.child(1).context
            if example is module.example_inputs:
                example = one_call(called, *example)
            call = call_of(called, example, input_names, label, by_name=by_name)
            if not has_constant_outputs(module):
                return _exported(called, module, call, path, how, samples, [])
            open_ = {
                name: {axis: f"{name}_{axis}" if axis else BATCH for axis in axes}
                for name, axes in zip(call.names, open_axes(module), strict=True)
                if axes
            }
            return _exported(called, None, call, path, replace(how, dynamic=open_ or False), samples, [])
    module, notes = in_fp32(unwrapped(module, label))
    with at_rest(module) as said:
        call = call_of(module, example_inputs, input_names, label)
        return _exported(module, None, call, path, how, samples, [*notes, *said])


def _exported(
    module: Any, captured: Any, call: Call, path: Path, how: How, samples: Given, notes: list[str]
) -> Exported:
    """Try the ways that there are, and keep the first file that is right."""
    tensors = placed(module, call.tensors)
    with _explained(how.label):
        args, kwargs = call.filled(tensors)
        returned, dropped = named_tensors(module(*args, **kwargs), how.label)
    names = how.outputs or [name for name, _ in returned]
    if len(names) != len(returned):
        raise InputError(
            f"{len(names)} output names are given for {how.label}, which returns {len(returned)} tensors: "
            f"{', '.join(name for name, _ in returned)}. Give as many names."
        )
    if complex_ := next((n for n, t in (*zip(call.names, tensors, strict=True), *returned) if t.is_complex()), None):
        raise InputError(
            f"Cannot export {how.label}: {complex_!r} is complex, which ONNX's operators do not take. Take and return "
            "pairs of real numbers, as torch.view_as_real gives them."
        )
    if dropped:
        notes.append(f"Not outputs of the file, for they are no tensors: {', '.join(dropped)}.")
    job = Job(
        module=module,
        captured=captured,
        call=call,
        tensors=tensors,
        outputs=distinct_outputs(names, call.names),
        how=how,
    )
    if how.dynamic is None:
        job = replace(job, sizes=differing(samples, job.sample(tensors), job.batch))
    failed: list[NotExportedError] = []
    reason = Why(says="it was not tried", fix="")
    with folder_beside(path.absolute().parent) as folder:
        file = folder / path.name
        for axes, traced in _ways(job, failed):
            for left in folder.iterdir():
                left.unlink()
            try:
                said = write(job, file, axes, traced=traced)
                errors, count = _checked(job, file, axes, samples)
            except NotExportedError as error:
                failed.append(error)
                if job.scripted or not traced:
                    reason = error.why
                continue
            proto = onnx.load(str(file), load_external_data=False)
            written = max(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
            notes += [*call.notes, *_opened(job, axes, failed), *said, *_unused(job, proto)]
            if how.opset not in (None, written):
                notes.append(f"The file is of opset {written}: torch writes this module in no opset {how.opset}.")
            move_all(folder, path.absolute().parent, outdated=(f"{path.name}.data",))
            return Exported(
                path=path,
                source=how.label,
                exporter="TorchScript" if traced else "torch.export",
                framework=f"torch {torch_here().__version__}",
                opset=written,
                inputs=tuple(v.name for v in proto.graph.input),
                outputs=tuple(v.name for v in proto.graph.output),
                dynamic=named_axes(proto),
                errors=errors,
                samples=count,
                notes=tuple(notes),
            )
    if job.sizes.axes:
        asked = options(job.sizes.with_batch(job.batch))
        raise InputError(
            f"Cannot export {how.label} for samples of several sizes, {job.sizes.text}: {reason.says.rstrip('.')}. "
            f"Give samples of one size, or say which sizes stay open, of {asked}. {reason.fix}".rstrip()
        ) from failed[-1]
    raise InputError(f"Cannot export {how.label}: {reason.says.rstrip('.')}. {reason.fix}".rstrip()) from failed[-1]


def _ways(job: Job, failed: Sequence[NotExportedError]) -> Iterator[tuple[Axes, bool]]:
    """Open sizes, and whether to trace, by preference; looks at what failed meanwhile."""
    none: Axes = tuple({} for _ in job.tensors)
    if job.captured is not None:
        yield none, False
        return
    if isinstance(job.how.dynamic, Mapping):
        choices = [_asked(job, job.how.dynamic)]
    else:
        batch = {} if job.how.dynamic is False else job.batch
        open_ = [job.sizes.with_batch(batch), job.sizes.with_batch({})]
        choices = [_asked(job, each) for each in (open_ if batch else open_[:1])]
    for axes in choices:
        before = len(failed)
        if not job.scripted:
            yield axes, False
        if job.scripted or (len(failed) > before and failed[-1].why.traced):
            yield axes, True
        if failed and not failed[-1].why.traced and not failed[-1].why.fixed:
            return


def _asked(job: Job, dynamic: Mapping[str, Mapping[int, str]]) -> Axes:
    """The open sizes that were asked for.

    Raises:
        InputError: of an input or an axis that is not there.
    """
    for name, axes in dynamic.items():
        if name not in job.call.names:
            raise InputError(
                f"dynamic names the input {name!r}; {job.how.label} has {', '.join(map(repr, job.call.names))}."
            )
        rank = job.tensors[job.call.names.index(name)].ndim
        if wrong := [axis for axis in axes if not 0 <= axis < rank]:
            raise InputError(f"dynamic names axis {wrong[0]} of {name!r}, whose example has {rank} axes, from 0 on.")
    return tuple(dict(dynamic.get(name, {})) for name in job.call.names)


def _checked(job: Job, file: Path, axes: Axes, samples: Given) -> tuple[tuple[OutputError, ...], int]:
    """Compare the file on the example, on it in other batches and mirrored, and on samples; and let `qdq` read it."""
    example = job.sample(job.tensors), job.steady_outputs()
    try:
        model = load_float(file)
        if job.captured is not None:
            _require_open(job, named_axes(model.proto))
        opened = None if samples == () else samples(model) if callable(samples) else as_samples(samples, model)
        chosen = job.sizes.chosen(opened) if opened is not None else ()
        given = chain([example], _others(job, axes), _on_samples(job, chosen))
        errors, count = compared(file, given, job.outputs)
    except NotExportedError:
        raise
    except (EngineError, ModelError) as error:
        if error.exit_code == 3:
            raise
        raise NotExportedError(Why(says=str(error), fix="", traced=True)) from error
    except (InputError, DataError):
        raise
    except Exception as error:
        raise NotExportedError(why(error)) from error
    worst = max(errors, key=lambda e: e.relative)
    if worst.relative > job.how.tolerance:
        raise NotExportedError(
            Why(
                says=f"output {worst.name!r} of the ONNX file differs from PyTorch's by up to {worst.largest:.3g}, "
                f"{worst.relative:.2g} of its largest magnitude, and {job.how.tolerance:.2g} is allowed",
                fix="Raise the tolerance if that is as it should be, for instance of a network in FP16.",
                traced=True,
            )
        )
    return errors, count


def _require_open(job: Job, axes: Dynamic) -> None:
    """Refuse samples of several sizes for a program that has one there."""
    if missing := job.sizes.without(axes):
        shapes = {n: {a: "torch.export.Dim.DYNAMIC" for a in each} for n, each in missing.axes.items()}
        shown = str(shapes).replace("'torch", "torch").replace("DYNAMIC'", "DYNAMIC")
        raise InputError(
            f"{job.how.label} is an ExportedProgram that has one size where its example and the samples differ: "
            f"{missing.text}. Give samples of its size, or export it again with "
            f"torch.export.export(module, inputs, dynamic_shapes={shown})."
        )


def _on_samples(job: Job, samples: Iterable[Arrays]) -> Iterator[tuple[Arrays, list[np.ndarray]]]:
    """Samples with the module's outputs.

    Raises:
        InputError: the module does not run on one.
    """
    for number, sample in enumerate(samples):
        try:
            outputs = job.original(sample)
        except (InputError, MemoryError):
            raise
        except Exception as error:  # whatever the user's module raises
            shown = ", ".join(f"{name} {array.shape}" for name, array in sample.items())
            raise InputError(
                f"{job.how.label} does not run on sample {number} ({shown}): {why(error).says}. Give samples as the "
                "module gets them."
            ) from error
        yield sample, outputs


def _others(job: Job, axes: Axes) -> Iterator[tuple[Arrays, list[np.ndarray]]]:
    """The example with other values, which a trace that froze some does not follow, and in other batches.

    Raises:
        NotExportedError: the batch is open, and the module takes no other than the example's.
    """
    yield from _taken(job, mirrored(job.tensors))
    rows = batch_of(job.tensors, axes)
    if rows is None:
        return
    taken = [pair for n in BATCHES if n != rows for pair in _taken(job, of_batch(job.tensors, axes, n))]
    if not taken:
        raise NotExportedError(Why(says="the module takes no other", fix="Leave it fixed.", fixed=True))
    yield from taken


def _taken(job: Job, tensors: Sequence[Any]) -> Iterator[tuple[Arrays, list[np.ndarray]]]:
    """The tensors as a sample with its outputs; nothing where the module itself does not take them."""
    sample = job.sample(tensors)
    with suppress(Exception):  # whatever the user's module raises
        yield sample, job.original(sample)


def _opened(job: Job, axes: Axes, failed: Sequence[NotExportedError]) -> Iterator[str]:
    """Notes of what is open, and of what did not work."""
    if job.captured is None:
        yield from job.sizes.notes
    batch = any(BATCH in each.values() for each in axes)
    if failed and not batch and job.how.dynamic is None and job.tensors[0].ndim:
        yield f"The batch is fixed at {job.tensors[0].shape[0]}: with an open batch, {failed[0].why.says}."
    elif failed:
        yield f"Traced, for torch.export fails: {failed[-1].why.says}."


def _unused(job: Job, proto: onnx.ModelProto) -> Iterator[str]:
    there = {v.name for v in proto.graph.input}
    if gone := [name for name in job.call.names if name not in there]:
        yield f"Not inputs of the file, for nothing reads them: {', '.join(gone)}."


@contextmanager
def _explained(label: str) -> Iterator[None]:
    """Turn what a user's module raises on its example into an InputError that says where."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        found = why(error)
        fix = found.fix or "Give inputs as at inference, with a batch axis, in the module's types."
        raise InputError(f"Cannot run {label} on its example inputs: {found.says}. {fix}") from error
