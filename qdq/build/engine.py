"""From an ONNX file to an engine with its layer table and manifest, and from these to what the engine does.

recipe + shapes -> engine -> X.engine, X.engine.json (layers), X.engine.manifest.json -> audited later, without a GPU.
Must not quantize: it takes any ONNX file. Must not believe a file that the manifest does not cover.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onnx import ModelProto

from engines.backends.backend import backend_named
from engines.backends.compiler import Engine, ShapeRange
from engines.backends.layers import LayerTable
from engines.backends.locate import located, nothing_named
from engines.core.documents import replace
from engines.core.errors import BuildError, EngineError
from engines.core.files import read_file, sha256_file, write_atomic
from engines.core.load import load_graph
from engines.verify.audit import Audit, audit
from engines.verify.covered import BESIDE, LAYERS, MANIFEST, SHAPE_KEY, Covered
from engines.verify.manifest import Manifest, sha256_model
from qdq.build.compiler import of_another
from qdq.build.keys.shapes import ShapeOption
from qdq.build.machine import builds_here, model_of_another, runs_here, stand_in
from qdq.build.recipe import Recipe
from qdq.core.choices import choose
from qdq.core.errors import InputError, MissingRuntimeError
from qdq.model.made_for import made_for
from qdq.model.model import Model
from qdq.model.storage import load
from qdq.passes.steered import advice
from qdq.plan.settings import Settings

if TYPE_CHECKING:
    from calib_data import Samples
    from qdq.core.progress import Progress

TENSORRT_KEY, QUANTIZED_FOR = "tensorrt.", "quantized_for"  # of options in a manifest
LOCATE_S, SEARCHES = 20, 4  # seconds, or times what the refusal took: the longest search for the node that it is about


def shape_ranges(model: Model, options: Sequence[ShapeOption], samples: Samples | None) -> dict[str, ShapeRange]:
    """The shapes to compile each input for: as the user says, else as the samples have them.

    Raises:
        InputError: an option for an unknown input, or one that does not fit the input.
        DataError: a sample does not fit the model.
    """
    given = {}
    for option in options:
        given[option.name] = ShapeRange(min=option.min, opt=option.opt, max=option.max)
        _require_fit(model, option.name, given[option.name], f"--shape {option}")
    if samples is not None and {info.name for info in model.inputs} - set(given):
        seen = samples.shapes().items()
        given = {name: ShapeRange(min=s.min, opt=s.opt, max=s.max) for name, s in seen} | given
    return given


def _require_fit(model: Model, name: str, shapes: ShapeRange, what: str) -> None:
    """Refuse shapes that no input has; `what` says where they stand."""
    declared = {info.name: info.shape or () for info in model.inputs}
    shape = declared[choose(name, tuple(declared), "input")]
    fixed = {i: size for i, size in enumerate(shape) if isinstance(size, int)}
    if len(shape) != len(shapes.opt) or any({shapes.min[i], shapes.max[i]} != {n} for i, n in fixed.items()):
        raise InputError(
            f"{what} does not fit input {name!r}, declared as {list(shape)}: it needs that rank and those fixed sizes."
        )


def require_profiles(model: Model, recipe: Recipe, shapes: Mapping[str, ShapeRange], samples: Samples) -> None:
    """Refuse early what would fail when the engine is built or runs, of its optimization profiles.

    Raises:
        InputError: an unknown input, a shape that does not fit it, or samples too small or too large for all profiles.
    """
    for number, own in enumerate(profiles := recipe.profiles):
        for name, range_ in own.items():
            _require_fit(model, name, range_, f"The shape {range_} of the recipe's tensorrt: profiles[{number}]")
    seen = samples.shapes() if profiles else {}
    for kind in ("min", "max") if profiles else ():
        given: dict[str, tuple[int, ...]] = {name: getattr(s, kind) for name, s in seen.items()}
        taken = ({**shapes, **own} for own in profiles)
        if not any(all(n not in own or own[n].takes(shape) for n, shape in given.items()) for own in taken):
            said = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in given.items())
            raise InputError(
                f"The engine is to be checked on samples of {said}, and none of the recipe's {len(profiles)} "
                "optimization profiles takes that: add a profile that does, or give --eval samples that one takes."
            )


def compile_engine(
    model: Model | Path,
    *,
    recipe: Recipe,
    shapes: Mapping[str, ShapeRange],
    on_progress: Progress | None = None,
    label: str = "Compile",
    locate: bool | Callable[[], bool] = True,
) -> Engine:
    """The engine of a model, by the recipe's backend.

    Args:
        model: as it was loaded; or the path of a file that qdq wrote, which needs no repair.
        shapes: the range of each dynamic input.

    Raises:
        EngineError: see `build` of the backend. `locate` says whether to search for a node that it does not name.
    """

    def report(fraction: float, _phase: str) -> None:
        if on_progress:
            on_progress(int(fraction * 100), 100, label)

    report(0, "")
    build, began = backend_named(recipe.backend).build, time.monotonic()
    source: Path | ModelProto = model if isinstance(model, Path) else model.file or model.proto
    directory = None if isinstance(model, Path) else model.directory
    try:
        return build(
            source,
            targets=recipe.targets,
            shapes=shapes,
            options=recipe.tensorrt,
            directory=directory,
            on_progress=report,
        )
    except BuildError as error:
        refusal, took = _advised(error, model), time.monotonic() - began
        if not (locate() if callable(locate) else locate) or not nothing_named(error):
            raise refusal from None

    def trial(part: Path) -> Engine:
        there = {v.name for v in load_graph(part).graph.input}
        used = {name: shape for name, shape in recipe.table_shapes(shapes).items() if name in there}
        return build(
            part, targets=recipe.targets, shapes=used, options=None, directory=None, on_progress=lambda *_: None
        )

    proto, place = (load_graph(model), model.parent) if isinstance(model, Path) else (model.proto, model.directory)
    raise located(refusal, proto, place, trial, seconds=max(LOCATE_S, SEARCHES * took))


def checked(
    model: Path, graph: ModelProto, recipe: Recipe, shapes: Mapping[str, ShapeRange], tell: Progress
) -> tuple[str, bool]:
    """Compile a file with who stands in for the recipe's compiler: what that shows of syntax and types, and if it does.

    `graph` is what the file holds, perhaps without the values of weights.
    """
    other = stand_in(recipe, graph)
    where, title = f"{other.profile.title} for {other.targets[0]}", recipe.profile.title
    try:
        compile_engine(model, recipe=other, shapes=shapes, on_progress=tell, label="Check syntax", locate=False)
    except BuildError as error:
        said = f"{where}, which checks the model in the place of {title}, refuses it, and {title} may too: {error}"
        return said, False
    return f"{where} compiles the model, which checks its syntax and types for {title}, not its kernels or times.", True


def _advised(error: BuildError, model: Model | Path) -> BuildError:
    """A refusal, and what to do where the model has an input that steers it, or whose values decide sizes."""
    loaded = load(model) if isinstance(model, Path) else model
    sizes = re.search(r"missing values for shape input tensor (\S+?)\.? ", f"{error} ")
    what = advice(loaded, sizes[1] if sizes else "")
    return BuildError(f"{error} {what}", nodes=error.nodes) if what else error


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """How a Q/DQ model came to be, for the manifest of its engine.

    Attributes:
        model: sha256 of the float model.
        samples: sha256 of the calibration samples together, None where they are not known.
        plan: sha256 of the plan.
        table: sha256 of the calibration table.
        settings: how it was quantized.
    """

    model: str
    samples: str | None
    plan: str
    table: str
    settings: Settings


def save_engine(
    engine: Engine,
    path: Path,
    compiled: Path,
    *,
    recipe: Recipe,
    shapes: Mapping[str, ShapeRange],
    made_from: Provenance | None = None,
) -> None:
    """Write an engine to `path`, its layers to `<path>.json` and its manifest to `<path>.manifest.json`.

    `compiled` is the ONNX file it was compiled from; `made_from` says how that came to be, where it is known.
    """
    engine.save(path)
    options: dict[str, str | int | float | bool | None] = {
        "backend": recipe.backend,
        "compiler": recipe.settings.compiler,
        QUANTIZED_FOR: made_for(load_graph(compiled)),
    }
    options |= {f"{SHAPE_KEY}{name}": str(s) for name, s in sorted(recipe.table_shapes(shapes).items())}
    if not backend_named(recipe.backend).no_options:
        options |= {f"{TENSORRT_KEY}{name}": value for name, value in recipe.tensorrt.recorded().items()}
    output = sha256_model(compiled)
    if made_from:
        settings = made_from.settings.to_mapping()
        options |= {k: v if isinstance(v, str | int | float) else json.dumps(v) for k, v in settings.items()}
    manifest = Manifest(
        model=made_from.model if made_from else output,
        output=output,
        samples=made_from.samples if made_from else None,
        plan=made_from.plan if made_from else None,
        table=made_from.table if made_from else None,
        engine=sha256_file(path),
        layers=sha256_file(path.with_name(path.name + LAYERS)),
        targets=engine.table.targets,
        options=options,
    )
    write_atomic(path.with_name(path.name + MANIFEST), manifest.to_json())


def add_files(path: Path) -> None:
    """Put what lies beside an engine (`BESIDE`) into its manifest."""
    beside = {name: path.with_name(f"{name}.json") for name in BESIDE}
    file = path.with_name(path.name + MANIFEST)
    held = {name: sha256_file(place) for name, place in beside.items() if place.is_file()}
    write_atomic(file, replace(Manifest.from_json(read_file(file)), **held).to_json())


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """A model, the layers that it was compiled to and the shapes it was compiled for.

    `predicted` where the compiler that made the layers stands for another.
    """

    model: Path
    table: LayerTable
    shapes: Mapping[str, ShapeRange]
    predicted: bool = False

    @property
    def of_another(self) -> str:
        """A warning where another compiler made the layers than the model was quantized for; "" where not."""
        return "" if self.predicted else model_of_another(self.model, self.table.backend, self.table.version)


def audit_engine(path: Path) -> Audit:
    """Say what each node runs in, from the layer table and manifest of an engine; needs no GPU.

    Raises:
        InputError, EngineError: see `compiled`.
    """
    found = compiled(path)
    return audit(load(found.model).proto, found.table, shapes=found.shapes)


def compiled(path: Path) -> Compiled:
    """What an engine was compiled from and to, by its layer table and manifest; needs no GPU.

    Raises:
        InputError: the ONNX file that the engine was compiled from is not in its folder.
        EngineError: a file is missing, damaged, or not the one that the manifest or SHA256SUMS names.
    """
    held = _papers(path)
    assert held.manifest is not None  # of an engine
    manifest, table, shapes, seen = held.manifest, held.layers(), held.shapes(), []
    for candidate in sorted(path.absolute().parent.glob("*.onnx")):
        with suppress(EngineError):  # a file that cannot be read is not the one
            found = sha256_model(candidate)
            if found == manifest.output:
                return Compiled(model=candidate, table=table, shapes=shapes)
            seen.append(f"{candidate.name} has {found[:12]}…")
    raise InputError(
        f"No .onnx file beside {path} is the one it was compiled from (sha256 {manifest.output[:12]}…"
        f"{''.join(f'; {other}' for other in seen[:3])}), and only that says what its nodes asked for. Put it there, "
        "or audit the ONNX file itself."
    )


def layers_of(path: Path, recipe: Recipe, samples: Samples | None, on_progress: Progress | None = None) -> Compiled:
    """The layers of an engine, or of an ONNX file: those of an engine beside it, else it is compiled now.

    Where the recipe's compiler does not build here, the one that predicts its times stands for it.

    Args:
        path: an engine with its layer table and manifest, or an ONNX file.
        samples: say the shapes to compile for, where the recipe does not.

    Raises:
        InputError, EngineError: see `compiled` and `compile_engine`.
    """
    if path.suffix != ".onnx":
        return compiled(path)
    for manifest in sorted(path.absolute().parent.glob(f"*{MANIFEST}")):
        engine = manifest.with_name(manifest.name.removesuffix(MANIFEST))
        try:
            found = compiled(engine)
        except (InputError, EngineError):
            continue  # of another engine, or damaged: it says nothing of this model
        if found.model.samefile(path):
            return found
    model = load(path)
    predicted = not builds_here(recipe)
    recipe = stand_in(recipe, model.proto)
    shapes = shape_ranges(model, recipe.shapes, samples)
    engine_made = compile_engine(model, recipe=recipe, shapes=shapes, on_progress=on_progress)
    return Compiled(model=path, table=engine_made.table, shapes=shapes, predicted=predicted)


def engine_of_another(path: Path) -> str:
    """A warning where an engine is not of the compiler that its model was quantized for; "" where it is, or none known.

    Raises:
        EngineError: the engine, its layer table or its manifest is missing or another.
    """
    held = Covered.of(path)
    assert held.manifest is not None  # of an engine
    table = held.layers()
    return of_another(str(held.manifest.options.get(QUANTIZED_FOR, "")), table.backend, table.version)


def engine_backend(path: Path) -> str:
    """The backend of an engine that a GPU of this machine can run.

    Raises:
        EngineError: the engine, its layer table or its manifest is missing, or a file is not the one that they name.
        MissingRuntimeError: there is no such GPU.
    """
    table = _papers(path).layers()
    if not runs_here(table.targets):
        raise MissingRuntimeError(
            f"No GPU here can run {path}, which is for {', '.join(table.targets)}. Give the Q/DQ model in its place "
            "(the .onnx file it was compiled from), or do this on a machine with such a GPU."
        )
    return table.backend


def _papers(path: Path) -> Covered:
    """The files of an engine, where every file that they and SHA256SUMS name is that one.

    Raises:
        EngineError: as `Covered.of` and `Covered.verify`.
    """
    held = Covered.of(path)
    held.verify()
    return held
