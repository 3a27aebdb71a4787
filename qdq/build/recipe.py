"""What a run is to do, apart from the model and the data: a YAML file, the command line's options, or both.

recipe.yaml -> mapping -> options given on the command line replace keys -> `Recipe`, valid from then on.
A key is the name of the option with underscores. It must not look at a model or load a runtime.

    scheme: int8
    calibrator: entropy
    exclude: ["*/head/*"]
    target: [sm86, sm89]
    shape: ["image:1x1x32x32x32:1x1x64x64x64:1x1x96x96x96"]
    min_sqnr_db: 20
    volume: {orientation: RAS, spacing_mm: [1, 1, 1], grid: centers, intensity: {zscore: nonzero}}
    gpu: [a10, {name: edge, target: sm89, bandwidth_gb_s: 288, tera_ops: {float32: 22, float16: 88, int8: 353}}]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard

import msgspec

from calib_data.volumes.nnunet import plans_labels
from calib_data.volumes.preprocess import nnunet_plans, preprocess_spec
from calib_data.volumes.spec import VolumeSpec, volume_spec
from engines.backends.backend import Running, backend_named
from engines.backends.compiler import ShapeRange
from engines.backends.profile import Profile, profile_of
from engines.backends.tensorrt_options import TensorRtOptions
from engines.core.documents import replace
from engines.verify.meaning import TASKS
from engines.verify.report import OF_VOLUMES, Alarms, Limits, Unit
from qdq.build.compiler import USUAL_TARGETS, choose_compiler
from qdq.build.keys.segmentation import Segmentation, WholeVolumes
from qdq.build.keys.shapes import ShapeOption, held_input
from qdq.build.keys.units import units_of
from qdq.build.keys.window import Window
from qdq.core.choices import choose, converted
from qdq.core.errors import InputError
from qdq.model.model import Held
from qdq.plan.settings import Settings

UNQUANTIZED_TYPES = ("auto", "fp16", "bf16", "fp32")
TUNES = ("placement", "rewrites", "off")
JUDGES = ("predicted", "measured")
AIMS = ("time", "size", "error")
PICKS = ("knee", "smallest", "fastest", "most-accurate")
TUNE_COMPILES = 160
TIME_LIMIT_S = 1800.0
# keys that recipes still may have, and what they are called now
OLDER = {"rest": "unquantized_type", "backend": "compiler"}
Words = str | tuple[str, ...]  # one text stands for a list of one
Rates = dict[str, float]
GpuRow = dict[str, str | float | dict[str, float | Rates] | None]  # what `engines.cost.gpus.Gpu` can be made of
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Decibels = Annotated[float, msgspec.Meta(ge=-300, le=300)]


class RecipeFile(Settings, frozen=True, kw_only=True):
    """A recipe's keys, one per option, those of `Settings` among them.

    Attributes:
        unquantized_type: as of `Recipe`.
        tune: as of `Recipe`; "" takes the default of the scheme.
        tune_compiles: variants that a search prices at most.
        time_limit: seconds.
        judge: as of `Recipe`.
        gpu: names or rows.
        target: to compile for; none takes that of the GPUs, or the usual one.
        shape: as `ShapeOption.parse` reads them.
        hold: inputs and values, as `held_input` reads them.
        minimize: as of `Recipe`.
        pick: as of `Recipe`.
        candidates: texts as `qdq.plan.choice` reads them, with commas between.
        max_size_mib: most that the weights in the engine may take, in MiB.
        max_memory_mib: most that those and what the engine computes may take, in MiB.
        max_latency_us: most microseconds that one inference may be predicted to take.
        min_metric: NAME=VALUE of metrics that a plan of several precisions must reach.
        min_sqnr_db: least signal to noise ratio of each output, in dB.
        min_sqnr_spread_db: least ratio of the spread over samples to the error, of each output that varies, in dB.
        min_cosine: least cosine similarity of each output.
        min_dice: least Dice of each class of each segmentation.
        min_top1: least agreement of the argmax.
        min_int8_share: least fraction of the multiply-adds that run in INT8 as compiled.
        warn_sqnr_db: below this an output is called poor, in dB.
        warn_top1: below this agreement of the argmax, too.
        task: what the outputs are, one of `engines.verify.meaning.TASKS`.
        class_axis: axis of their classes.
        units: output -> in which unit its mean error is told, as `units_of` reads it.
        tensorrt: options of TensorRT's builder, as `TensorRtOptions.from_mapping` reads them.
        runtime_cache: file for what TensorRT-RTX compiles when an engine first runs.
        window: that goes over whole volumes, as a mapping or as `Window.parse` reads it.
        segmentation: what a network's channels are in whole volumes.
        max_dice_drop: most that a structure's mean Dice falls in whole volumes.
        max_hd95_mm: most HD95 of a structure to the float model.
        max_volume_diff_ml: most difference of a structure's volume to the float model.
        volume: what is done to images, as `calib_data.volumes.spec` says.
        preprocess: reads `volume` from elsewhere: nnunet:FOLDER, nnunet:FOLDER:CONFIGURATION, or monai:BUNDLE.json.
        case_key: file with the key of the names by which messages call images.
    """

    unquantized_type: str = "auto"
    tune: str = ""
    tune_compiles: Annotated[int, msgspec.Meta(ge=0)] = TUNE_COMPILES
    time_limit: Annotated[float, msgspec.Meta(ge=0)] = TIME_LIMIT_S
    judge: str = ""
    gpu: str | tuple[str | GpuRow, ...] = ()
    target: Words = ()
    shape: Words = ()
    hold: Words = ()
    minimize: str = ""
    pick: str = ""
    candidates: Words = ()
    max_size_mib: Annotated[float, msgspec.Meta(gt=0, le=1e9)] | None = None
    max_memory_mib: Annotated[float, msgspec.Meta(gt=0, le=1e9)] | None = None
    max_latency_us: Annotated[float, msgspec.Meta(gt=0, le=1e12)] | None = None
    min_metric: Words = ()
    min_sqnr_db: Decibels | None = None
    min_sqnr_spread_db: Decibels | None = None
    min_cosine: Annotated[float, msgspec.Meta(ge=-1, le=1)] | None = None
    min_dice: Share | None = None
    min_top1: Share | None = None
    min_int8_share: Share | None = None
    warn_sqnr_db: Decibels = Alarms().warn_sqnr_db
    warn_top1: Share = Alarms().warn_top1
    task: str = "auto"
    class_axis: Annotated[int, msgspec.Meta(ge=-64, le=63)] | None = None
    units: dict[str, str] = msgspec.field(default_factory=dict)
    tensorrt: TensorRtOptions = TensorRtOptions()
    runtime_cache: str = ""
    window: Window | str | None = None
    segmentation: Segmentation | None = None
    max_dice_drop: Share | None = None
    max_hd95_mm: Annotated[float, msgspec.Meta(ge=0, le=1e6)] | None = None
    max_volume_diff_ml: Annotated[float, msgspec.Meta(ge=0, le=1e9)] | None = None
    volume: VolumeSpec | None = None
    preprocess: str = ""
    case_key: str = ""


LIMITS = Limits.__struct_fields__
"""The limits on outputs that decide the exit code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Settings, the float type of what `deploy` leaves unquantized, what to compile for, and the limits to pass.

    Attributes:
        settings: how to quantize.
        unquantized_type: float type of what is not quantized; "auto" is that of a tuned plan (FP16, or FP32 where that
            is faster), else FP16.
        tune: what is chosen by compiled results: 'placement' (rewrites, and which nodes are quantized at all),
            'rewrites' (everything the rules want is quantized), or 'off'. By default placement for the scheme int8; who
            asks for another wants a smaller model, and gets rewrites.
        tune_compiles: variants that are priced for that choice, at most; the same on every machine.
        time_limit_s: seconds for that choice, at most; a search that they end depends on the machine.
        judge: what decides between the forms that a search finds: 'predicted' times, or times 'measured' on this
            machine's GPU; "" measures where a GPU of the one target and the compiler's runtime are here.
        minimize: what is chosen for: 'time', 'size' or 'error'; "" is time, and what is quantized alone is chosen.
        pick: of the front of all that was looked at: 'knee', 'smallest', 'fastest', 'most-accurate' or a number; "" for
            none.
        candidates: precisions that each group of nodes may have; none takes the usual ones.
        max_size_mib: most that the weights in the engine may take, in MiB; None: not checked.
        max_memory_mib: of those and of what the engine computes; None: not limited.
        max_latency_us: most microseconds that one inference may be predicted to take; None: not limited.
        min_metrics: NAME -> what a metric must reach.
        gpus: to predict times for, names in `engines.cost.gpus.GPUS` or mappings for `Gpu.from_mapping`;
            none for the usual one of each target.
        targets: to compile for.
        chosen_because: why the compiler of the settings is that one; "" where the user says so.
        shapes: of dynamic inputs.
        held_inputs: of one bool or integer, and the value that the engine is for.
        limits: keys of `LIMITS`.
        min_int8_share: least fraction of the multiply-adds that run in INT8 as compiled; None: not checked.
        alarms: below these a result is called poor.
        task: what the outputs are; "auto" is what the end of the graph tells.
        class_axis: axis of their classes; None is what the graph tells.
        units: output -> in which unit its mean error is told.
        tensorrt: options of TensorRT's builder, where that compiles.
        runtime_cache: file for what TensorRT-RTX compiles when an engine first runs; None keeps nothing.
        whole: how whole volumes are run, and whether they are.
        volume: what is done to images; None where samples are arrays.
        case_key: file with the key of images' names; "" for a key of this run.
    """

    settings: Settings = field(default_factory=Settings)
    unquantized_type: str = "auto"
    tune: str = "placement"
    tune_compiles: int = TUNE_COMPILES
    time_limit_s: float = TIME_LIMIT_S
    judge: str = ""
    minimize: str = ""
    pick: str = ""
    candidates: tuple[str, ...] = ()
    max_size_mib: float | None = None
    max_memory_mib: float | None = None
    max_latency_us: float | None = None
    min_metrics: Mapping[str, float] = field(default_factory=dict)
    gpus: tuple[str | Mapping[str, object], ...] = ()
    targets: tuple[str, ...] = USUAL_TARGETS
    chosen_because: str = ""
    shapes: tuple[ShapeOption, ...] = ()
    held_inputs: Mapping[str, Held] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    min_int8_share: float | None = None
    alarms: Alarms = field(default_factory=Alarms)
    task: str = "auto"
    class_axis: int | None = None
    units: Mapping[str, Unit] = field(default_factory=dict)
    tensorrt: TensorRtOptions = field(default_factory=TensorRtOptions)
    runtime_cache: Path | None = None
    whole: WholeVolumes = field(default_factory=WholeVolumes)
    volume: VolumeSpec | None = None
    case_key: str = ""

    def with_tensorrt(self, **changes: Any) -> Recipe:
        """The same with other fields of `TensorRtOptions`."""
        return replace(self, tensorrt=replace(self.tensorrt, **changes))

    @property
    def profiles(self) -> tuple[dict[str, ShapeRange], ...]:
        """The optimization profiles that are asked for, where its compiler takes them."""
        return () if backend_named(self.backend).no_options else self.tensorrt.ranges

    def table_shapes(self, shapes: Mapping[str, ShapeRange]) -> dict[str, ShapeRange]:
        """What the layer table of an engine is for: its first optimization profile, in the shapes else."""
        return {**shapes, **(self.profiles[0] if self.profiles else {})}

    @property
    def option_notes(self) -> tuple[str, ...]:
        """What to know of `tensorrt` and `runtime_cache`, such as why its compiler has no use for them."""
        backend, several = backend_named(self.backend), len(self.profiles)
        found = [backend.no_options if self.tensorrt else "", backend.no_runtime_cache if self.runtime_cache else ""]
        if several > 1:
            found.append(f"the layers are those of the first of {several} optimization profiles")
        return tuple(filter(None, found))

    @property
    def running(self) -> Running:
        """What an engine needs beside it when it runs."""
        return Running(
            runtime_cache=None if backend_named(self.backend).no_runtime_cache else self.runtime_cache,
            weight_streaming_budget=self.tensorrt.weight_streaming_budget,
            plugins=self.tensorrt.libraries,
        )

    @property
    def profile(self) -> Profile:
        """What is known of the compiler that the engine is for."""
        return self.settings.profile

    @property
    def backend(self) -> str:
        """Name of the backend that compiles."""
        return self.profile.backend

    def compiled_by(self, backend: str, targets: tuple[str, ...]) -> Recipe:
        """The same for the usual compiler of a backend and other targets: what compiles in the place of another."""
        return replace(self, settings=replace(self.settings, compiler=profile_of(backend).key), targets=targets)

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> Recipe:
        """The recipe in plain values, as YAML holds them.

        Raises:
            InputError: an unknown key or value; the message names the nearest key.
            DataError: the same of `volume`, or what `preprocess` names is not there or not understood.
        """
        words = {True: "on", False: "off"}  # YAML reads on and off as booleans
        if twice := next((key for key, now in OLDER.items() if key in values and now in values), None):
            raise InputError(f"The recipe has both {twice} and {OLDER[twice]}, its name today. Remove {twice}.")
        named = {OLDER.get(key, key): value for key, value in values.items()}
        if isinstance(backend := values.get("backend"), str):  # the name of who builds, before compilers had one
            named["compiler"] = profile_of(backend).key
        named |= {k: words[v] for k, v in named.items() if k in ("tune", "bias_correction") and isinstance(v, bool)}
        options = named.pop("tensorrt", None)
        if options is not None:
            named["tensorrt"] = TensorRtOptions.from_mapping(options)
        asked = named.pop("compiler", None)
        if not isinstance(asked, str | None):
            raise InputError(f"compiler is {asked!r}: it must be a text such as rtx or tensorrt.")
        if named.get("volume") is not None:
            named["volume"] = volume_spec(named["volume"])
        named |= {k: converted(v, _BLOCKS[k], f"key of {k}") for k, v in named.items() if k in _BLOCKS and _is_block(v)}
        file = converted(named, RecipeFile, "recipe key")
        if file.volume and file.preprocess:
            raise InputError("Both `volume` and `preprocess` say what is done to images: choose one.")
        gpus = (file.gpu,) if isinstance(file.gpu, str) else file.gpu
        choice = choose_compiler(asked, gpus, _list(file.target))
        fields = {name: getattr(file, name) for name in Settings.__struct_fields__}
        settings = Settings(**{**fields, "compiler": choice.compiler})
        volume = preprocess_spec(file.preprocess) if file.preprocess else file.volume
        usual = "placement" if settings.label == "int8" else "rewrites"  # of several schemes each node has its own
        tune = choose(file.tune or usual, TUNES, "way to tune")
        judge = choose(file.judge, JUDGES, "judge") if file.judge else ""
        if judge == "measured" and tune == "off":
            raise InputError(
                "--judge measured decides between forms of a model, and --tune off makes none: leave one out."
            )
        made = cls(
            settings=settings,
            unquantized_type=choose(file.unquantized_type, UNQUANTIZED_TYPES, "type for what is not quantized"),
            tune=tune,
            tune_compiles=file.tune_compiles,
            time_limit_s=file.time_limit,
            judge=judge,
            minimize=choose(file.minimize, AIMS, "thing to minimize") if file.minimize else "",
            pick=file.pick if file.pick.isdecimal() or not file.pick else choose(file.pick, PICKS, "pick"),
            candidates=tuple(text.strip() for some in _list(file.candidates) for text in some.split(",")),
            max_size_mib=file.max_size_mib,
            max_memory_mib=file.max_memory_mib,
            max_latency_us=file.max_latency_us,
            min_metrics=dict(map(_least, _list(file.min_metric))),
            gpus=gpus,
            targets=choice.targets,
            chosen_because=choice.because,
            shapes=tuple(map(ShapeOption.parse, _list(file.shape))),
            held_inputs=dict(map(held_input, _list(file.hold))),
            limits={name: getattr(file, name) for name in LIMITS if getattr(file, name) is not None},
            min_int8_share=file.min_int8_share,
            alarms=Alarms(warn_sqnr_db=file.warn_sqnr_db, warn_top1=file.warn_top1),
            task=choose(file.task, TASKS, "task"),
            class_axis=file.class_axis,
            units=units_of(file.units),
            tensorrt=file.tensorrt,
            runtime_cache=Path(file.runtime_cache) if file.runtime_cache else None,
            whole=_whole(file, volume),
            volume=volume,
            case_key=file.case_key,
        )
        if not backend_named(made.backend).no_options:
            made.tensorrt.require(made.profile.version)
        return made


_BLOCKS: Mapping[str, type[Window] | type[Segmentation]] = {"window": Window, "segmentation": Segmentation}


def _is_block(value: object) -> TypeGuard[Mapping[str, object]]:
    """Whether a value has keys of its own."""
    return isinstance(value, Mapping)


def _whole(file: RecipeFile, volume: VolumeSpec | None) -> WholeVolumes:
    """How whole volumes are run; what the recipe does not say, nnU-Net's plans do where images are prepared by them."""
    window = Window.parse(file.window) if isinstance(file.window, str) else file.window
    segmentation = file.segmentation
    if plans := nnunet_plans(file.preprocess):
        if window is None and volume and volume.patch:
            window = Window(patch=volume.patch, rule="nnunet")
        if segmentation is None:
            structures, order = plans_labels(plans[0])
            kind: Literal["softmax", "sigmoid"] = "sigmoid" if order else "softmax"
            segmentation = Segmentation(
                activation=kind, structures=dict(structures), regions_class_order=order, resample="logits"
            )
    asked = bool(file.window or file.segmentation or any(getattr(file, name) is not None for name in OF_VOLUMES))
    return WholeVolumes(window=window, segmentation=segmentation or Segmentation(), asked=asked)


def _least(text: str) -> tuple[str, float]:
    """A metric and the value that it must reach, of NAME=VALUE.

    Raises:
        InputError: no such text.
    """
    name, equals, value = text.rpartition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (name and equals and math.isfinite(number)):
        raise InputError(
            f"--min-metric is {text!r}: it must be NAME=VALUE with a number, as in dice=0.9 or scores.py:iou=0.8."
        )
    return name, number


def _list(words: Words) -> tuple[str, ...]:
    """A list, of one where one text was given."""
    return (words,) if isinstance(words, str) else words
