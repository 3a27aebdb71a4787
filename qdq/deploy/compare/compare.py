"""Several quantization schemes of one model side by side: precision, scales, sizes, accuracy, predicted time.

scheme texts -> `Entry` (a recipe each) -> tune, quantize, finish as `deploy` does -> a temporary file -> compile,
audit, price, score -> one `SchemeRow` each, after those of the float model -> `Comparison`.
A scheme that cannot be written or compiled is a row with the reason. Must not choose a scheme, and leaves no files.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import fmean

from calib_data import Samples
from engines.backends.backend import backend_named
from engines.backends.compiler import ShapeRange
from engines.core.documents import replace
from engines.core.errors import EngineError, MissingRuntimeError, UnsupportedTargetError, import_runtime
from engines.core.files import Scratch
from engines.cost.gpus import Gpu
from engines.cost.predict import predict
from engines.verify.audit import Audit, audit
from qdq.assemble.finish import float_type_of
from qdq.assemble.precision.convert import convert
from qdq.assemble.tables import Tables
from qdq.build.branches import with_possible_branches
from qdq.build.engine import shape_ranges
from qdq.build.kept import kept_engine
from qdq.build.machine import builds_here, compiler_here, stand_in
from qdq.build.pricing.pricer import gpus_of
from qdq.build.pricing.tensorrt_pricer import TensorRtPricer, pricer_of
from qdq.build.recipe import Recipe
from qdq.core.choices import choose
from qdq.core.errors import InputError
from qdq.core.formats import FORMATS
from qdq.core.progress import Progress
from qdq.deploy.compare.result import Comparison, SchemeRow
from qdq.deploy.compare.score import Reference, inputs_only, require_mask, score
from qdq.deploy.compare.task import Task
from qdq.deploy.report.report import shares
from qdq.deploy.steps.overlap import overlap
from qdq.deploy.steps.shipped import Scales, ShippedModel, file_bytes, written
from qdq.measure.inference.session import registered
from qdq.model.model import Model
from qdq.model.storage import load, save
from qdq.passes.prepare import load_float
from qdq.plan import placement
from qdq.plan.plan import Plan, Point
from qdq.plan.scheme import SCHEMES
from qdq.plan.settings import Settings

OPTIONS = (*(n for n in Settings.__struct_fields__ if n not in ("scheme", "overrides")), "unquantized_type", "tune")
FLOAT_BITS = {"fp32": 32, "fp16": 16, "bf16": 16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One scheme to measure: the text that asked for it, and the recipe it stands for."""

    text: str
    recipe: Recipe


def entries(texts: Sequence[str], given: Mapping[str, object]) -> list[Entry]:
    """What `--schemes` asks for.

    Args:
        texts: each a scheme with options behind colons, such as 'int4:block=32:rounding=nearest'.
        given: keys of a recipe that hold for every scheme; the options of a text go before them.

    Raises:
        InputError: an unknown scheme, option or value, or no scheme at all.
    """
    found = []
    for text in dict.fromkeys(t.strip() for t in texts if t.strip()):
        name, *options = text.split(":")
        chosen: dict[str, object] = {"scheme": choose(name, tuple(SCHEMES), "scheme")}
        for option in options:
            key, equals, value = option.partition("=")
            key = "unquantized_type" if key == "rest" else choose(key.replace("-", "_"), OPTIONS, f"option of {name}")
            if not equals or not value:
                raise InputError(f"Cannot read {option!r} in {text!r}: it must be option=value, such as block=32.")
            chosen[key] = [value] if key == "exclude" else _scalar(value)
        found.append(Entry(text=text, recipe=Recipe.from_mapping({**given, **chosen})))
    if not found:
        raise InputError(f"No scheme to compare: give --schemes some of {', '.join(SCHEMES)}.")
    return found


def compare_schemes(
    model_path: Path | str,
    calibration: Samples,
    *,
    schemes: Sequence[Entry],
    task: Task | None = None,
    evaluation: Samples | None = None,
    prepared: Model | None = None,
    allow_overlap: bool = False,
    custom_ops: Sequence[str] = (),
    on_progress: Progress | None = None,
) -> Comparison:
    """Measure every scheme.

    Args:
        model_path: a float ONNX file; it is not changed.
        calibration: samples to quantize with; arrays that are no inputs are left aside.
        schemes: of one set of targets, shapes and GPUs, those of the first.
        task: what the outputs are scored by.
        evaluation: samples, with the labels of the task, to score on; None takes those of the calibration.
        prepared: what `load_float` gave for the model, if it is loaded already.
        allow_overlap: evaluation samples may be calibration samples too; the comparison says how many are.
        custom_ops: libraries of custom operators that ONNX Runtime needs for the model.

    Raises:
        InputError: no scheme could be measured (the first reason), the task does not fit the model or the labels, or
            evaluation samples are calibration samples too.
        DataError: bad samples.
        MissingRuntimeError: ONNX Runtime or the compiler is not installed.
    """
    task, model_path = task or Task(), Path(model_path)
    prepared = load_float(model_path) if prepared is None else prepared
    recipe, notes = schemes[0].recipe, []
    backend = backend_named(recipe.backend)
    for name in ("onnxruntime", compiler_here(recipe).runtime):
        import_runtime(name)
    targets = backend.check_targets(prepared.proto, recipe.targets) or recipe.targets
    gpus: tuple[Gpu, ...] = ()
    try:
        gpus = gpus_of(recipe)
    except UnsupportedTargetError as error:
        notes.append(f"no predicted times: {error}")
    if any(entry.recipe.judge == "measured" for entry in schemes):
        notes.append("times are predicted: `judge: measured` is for deploy and tune")
    if gpus and not backend.predicts:
        notes.append(f"times of {recipe.profile.title} are derived from the float models, for INT8 and float alone")
    if not builds_here(recipe):
        notes.append(
            f"no engine was built, which takes {recipe.profile.title} and a GPU of a target; "
            f"{compiler_here(recipe).title} checked the models, which says nothing of kernels, sizes and types"
        )
    fed = inputs_only(calibration, prepared)
    seen = 0 if evaluation is None else overlap(fed, evaluation, prepared, allowed=allow_overlap).seen
    ranges = shape_ranges(prepared, recipe.shapes, fed)
    every = fed if evaluation is None else chain(fed, evaluation)
    prepared = with_possible_branches(prepared, every, recipe=recipe, shapes=ranges, on_progress=on_progress)
    notes.extend(prepared.notes)
    bench = _Bench(
        path=model_path,
        prepared=prepared,
        calibration=fed,
        evaluation=calibration if evaluation is None else evaluation,
        task=task,
        shapes={name: ShapeRange.fixed(shape.opt) for name, shape in ranges.items()},
        targets=targets,
        gpus=gpus,
        custom_ops=custom_ops,
        on_progress=on_progress,
        reference=Reference(model_path, custom_ops=custom_ops),
        tables=Tables(model=prepared, samples=fed),
    )
    with Scratch() as folder, registered(custom_ops):
        require_mask(bench.reference, bench.evaluation, task, model=prepared)
        rows = bench.float_rows(folder, schemes[0])
        rows += [bench.row(entry, folder) for entry in schemes]
    if all(row.value is None for row in rows[-len(schemes) :]):
        raise InputError(f"None of the schemes could be measured. {rows[-len(schemes)].problem}")
    if evaluation is None:
        notes.append("scored on the calibration samples themselves: give --eval for samples not seen before")
    if seen:
        notes.append(f"{seen} of the evaluation samples are calibration samples too, which was allowed")
    notes += [f"classes of output {bench.classes}"] if bench.classes else []
    notes += [f"{bench.masked} tokens were masked, each once, {task.at_once} at a time"] if task.masking else []
    notes.append("the models in ONNX Runtime stood for the engines: no engine was run")
    return Comparison(
        model=model_path.name,
        model_sha256=prepared.sha256,
        task=task,
        samples=bench.samples,
        evaluated_on="calibration samples" if evaluation is None else "evaluation samples",
        targets=targets,
        gpus=tuple(gpu.name for gpu in gpus),
        shapes={name: shape.opt for name, shape in bench.shapes.items()},
        rows=tuple(rows),
        outputs=len(prepared.outputs),
        overlap=seen,
        notes=tuple(notes),
    )


@dataclass(kw_only=True)
class _Bench:
    """What the rows of one comparison share; calibration tables are kept, since schemes measure the same tensors."""

    path: Path
    prepared: Model
    calibration: Samples
    evaluation: Samples
    task: Task
    shapes: Mapping[str, ShapeRange]
    targets: tuple[str, ...]
    gpus: Sequence[Gpu]
    custom_ops: Sequence[str]
    on_progress: Progress | None
    reference: Reference
    tables: Tables
    samples: int = 0
    masked: int = 0
    classes: str = ""
    pricers: dict[str, TensorRtPricer] = field(default_factory=dict)

    def float_rows(self, folder: Path, entry: Entry) -> list[SchemeRow]:
        """The float model as it is, in FP16, and in the recipe's type for what is not quantized if that is another."""
        plan = placement.plan(self.prepared, Settings())
        table = self.tables.of(plan, self._tell("FP16"))
        rows = []
        for kind in dict.fromkeys(("fp32", "fp16", float_type_of(plan, entry.recipe.unquantized_type))):
            path, bits = folder / f"{kind}.onnx", f"W{FLOAT_BITS[kind]}A{FLOAT_BITS[kind]}"
            fused = bool(entry.recipe.profile.shift)
            save(convert(self.prepared, unquantized_type=kind, split_biases=fused, table=table).model, path)
            row = SchemeRow(scheme=kind.upper(), precision=bits, weights_per="-", data_per="-", quantized_nodes=0)
            rows.append(self._measured(row, path, self.path if kind == "fp32" else path, entry))
            path.unlink()
        return rows

    def row(self, entry: Entry, folder: Path) -> SchemeRow:
        """Quantize by one scheme and measure."""
        path = folder / "scheme.onnx"
        try:
            entry.recipe.profile.require_formats(entry.recipe.settings.formats, self.targets)
            done = self._written(entry)
            save(done.finished.model, path)
        except MissingRuntimeError:
            raise
        except (InputError, EngineError) as error:
            return SchemeRow(scheme=entry.text, problem=str(error))
        made = done.made
        row = SchemeRow(
            scheme=entry.text,
            precision=precision(made.plan, float_type_of(made.plan, entry.recipe.unquantized_type)),
            weights_per=_counted(_weight_kind(p.spec.block, p.spec.axis) for p in made.plan.weights),
            data_per=_counted(_data_kind(p, made.solution) for p in made.plan.activations),
            quantized_nodes=len(made.plan.quantized_nodes),
            notes=(*done.notes, *made.solution.notes, *done.finished.notes),
        )
        return self._measured(row, path, path, entry)

    def _written(self, entry: Entry) -> ShippedModel:
        on_progress, tuned = self._tell(entry.text), entry.recipe.tune != "off" and bool(self.gpus)
        pricer = pricer_of(entry.recipe, self.shapes, gpus=self.gpus) if tuned else None
        return written(
            self.prepared, self.calibration, entry.recipe, pricer=pricer, tables=self.tables, on_progress=on_progress
        )

    def _measured(self, row: SchemeRow, path: Path, scored: Path, entry: Entry) -> SchemeRow:
        """The row with what its file compiles to, and how well it does."""
        on_progress, problems = self._tell(row.scheme), list[str]()
        row = replace(row, model_bytes=file_bytes(load(scored)))
        with _noted(problems, "does not compile"):
            audited, us = self._compiled(path, entry.recipe, on_progress)
            row = replace(row, predicted_us=us)
            if audited is not None:
                known = {"weight_bytes": audited.weight_bytes, "kernels": audited.kernels, "shares": shares(audited)}
                row = replace(row, **known)
        with _noted(problems, "does not run in ONNX Runtime"):
            found = score(
                self.reference,
                scored,
                self.evaluation,
                self.task,
                model=self.prepared,
                custom_ops=self.custom_ops,
                whole=entry.recipe.whole,
                on_progress=on_progress,
            )
            row = replace(
                row,
                sqnr_db=found.sqnr_db,
                sqnr_spread_db=found.sqnr_spread_db,
                worst_output=found.worst_output,
                value=found.value,
                values=found.values,
                value_of=found.value_of,
            )
            self.samples, self.classes, self.masked = found.samples, found.classes, found.masked
        return replace(row, problem="; ".join(problems))

    def _pricer(self, recipe: Recipe) -> TensorRtPricer:
        """Of a compiler: rows have float forms in common, which are compiled once."""
        key = recipe.profile.key
        if key not in self.pricers:
            self.pricers[key] = TensorRtPricer(recipe=recipe, shapes=self.shapes, gpus=self.gpus)
        return self.pricers[key]

    def _compiled(self, path: Path, recipe: Recipe, on_progress: Progress) -> tuple[Audit | None, float | None]:
        """The audit of the engine for all targets, and the mean predicted time; each target has its own kernels.

        No audit where the compiler does not work here: the model is only checked by who stands in for it.
        """
        derived = None
        if self.gpus and not backend_named(recipe.backend).predicts:
            us = self._pricer(recipe)(load(path)).us
            derived = us if math.isfinite(us) else None
        if not builds_here(recipe):
            other = stand_in(recipe, load(path).proto)
            kept_engine(path, recipe=other, shapes=self.shapes, on_progress=on_progress)
            return None, derived
        engine = kept_engine(path, recipe=recipe, shapes=self.shapes, on_progress=on_progress)
        if not backend_named(recipe.backend).predicts:
            return audit(path, engine.table, shapes=self.shapes), derived
        tables = {}
        for target in dict.fromkeys(gpu.target for gpu in self.gpus):
            tables[target] = engine.table
            if engine.table.targets != (target,):
                alone = replace(recipe, targets=(target,))
                tables[target] = kept_engine(path, recipe=alone, shapes=self.shapes, on_progress=on_progress).table
        times = [predict(path, tables[gpu.target], gpu, shapes=self.shapes).total_us for gpu in self.gpus]
        return audit(path, engine.table, shapes=self.shapes), fmean(times) if times else None

    def _tell(self, name: str) -> Progress:
        """Progress under the name of a row."""

        def report(done: int, total: int | None, label: str) -> None:
            if self.on_progress:
                self.on_progress(done, total, f"{name}: {label.lower()}")

        return report


@contextmanager
def _noted(problems: list[str], what: str) -> Iterator[None]:
    """An engine's error inside is noted as a problem; that a runtime is missing is none of the scheme."""
    try:
        yield
    except MissingRuntimeError:
        raise
    except EngineError as error:
        problems.append(f"{what}: {error}")


def precision(plan: Plan, unquantized_type: str) -> str:
    """Bits of the weights and of the data of a plan's quantized products.

    'W4A8', 'W4/8A16' where some weights fell back to 8 bits, 'W8A8 fp8' where codes are floating-point numbers.
    """
    if not plan.weights:
        return f"W{FLOAT_BITS[unquantized_type]}A{FLOAT_BITS[unquantized_type]}"
    read = {consumer for p in plan.activations for consumer, _ in p.uses}
    alone = any(name not in read for p in plan.weights for name, _ in p.uses)
    weights = sorted({FORMATS[p.spec.format].bits for p in plan.weights})
    data = sorted(
        {FORMATS[p.spec.format].bits for p in plan.activations} | ({FLOAT_BITS[unquantized_type]} if alone else set())
    )
    floats = sorted({p.spec.format for p in plan.points if not FORMATS[p.spec.format].integer})
    return " ".join([f"W{'/'.join(map(str, weights))}A{'/'.join(map(str, data))}", *floats])


def _weight_kind(block: int | None, axis: int | None) -> str:
    return f"block of {block}" if block else "tensor" if axis is None else "channel"


def _data_kind(point: Point, scales: Scales) -> str:
    if point.spec.residual:
        return "tensor, two codes"
    if blocks := FORMATS[point.spec.format].blocks:
        return f"block of {blocks[0]}"
    return "token" if point.tensor in scales.tokens else "piece" if point.tensor in scales.beyond else "tensor"


def _counted(kinds: Iterable[str]) -> str:
    """Each kind, with its number if there are several, the most frequent first."""
    counts = Counter(kinds).most_common()
    if len(counts) < 2:
        return counts[0][0] if counts else "-"
    return ", ".join(f"{kind} ({count})" for kind, count in counts)


def _scalar(text: str) -> str | int | float | bool:
    """The value of an option: true and false, a number, else text."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
