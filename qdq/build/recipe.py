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

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeGuard

import msgspec
import yaml

from calib_data.volumes.nnunet import plans_labels
from calib_data.volumes.preprocess import nnunet_plans, preprocess_spec
from calib_data.volumes.spec import VolumeSpec, volume_spec
from engines.backends.backend import DEFAULT, backends
from engines.core.files import read_file
from engines.verify.meaning import TASKS
from engines.verify.report import OF_VOLUMES, Alarms, Limits
from qdq.build.segmentation import Segmentation, WholeVolumes
from qdq.build.window import Window
from qdq.core.choices import choose, converted
from qdq.core.errors import InputError
from qdq.plan.settings import Settings

UNQUANTIZED_TYPES = ("auto", "fp16", "bf16", "fp32")
TUNES = ("placement", "rewrites", "off")
TUNE_COMPILES = 160
TIME_LIMIT_S = 1800.0
MOST_BYTES, MOST_CHARACTERS = 1 << 20, 1000  # of a recipe, and of one value in it
MOST_VALUES = 10_000  # in a recipe, keys among them: PyYAML takes a tenth of a millisecond for each
OLDER = {"rest": "unquantized_type"}  # keys that recipes still may have, and what they are called now
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
        gpu: names or rows.
        target: to compile for.
        backend: a name in `engines.backends.backend.backends`.
        shape: as `ShapeOption.parse` reads them.
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
    gpu: str | tuple[str | GpuRow, ...] = ()
    target: Words = ("sm89",)
    backend: str = DEFAULT
    shape: Words = ()
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

_SHAPE = r"\d{1,18}(?:x\d{1,18})*"
_SHAPE_OPTION = re.compile(rf"(?P<name>.+?):(?:(?P<fixed>{_SHAPE})|(?P<range>{_SHAPE}:{_SHAPE}:{_SHAPE}))")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeOption:
    """The smallest, the usual and the largest shape of one input, as a user wrote them."""

    name: str
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> ShapeOption:
        """Read 'name:shape' or 'name:min:opt:max', each shape like 1x3x224x224. A name may hold colons.

        >>> ShapeOption.parse("input:0:1x3:2x3:4x3").max
        (4, 3)

        Raises:
            InputError: another form, or shapes that are no range.
        """
        match = _SHAPE_OPTION.fullmatch(text)
        if not match:
            raise InputError(
                f"Cannot read the shape {text!r}: it must be name:shape or name:min:opt:max, with shapes such as "
                "1x1x64x64x64."
            )
        parts = (match["range"] or ":".join([match["fixed"]] * 3)).split(":")
        low, usual, high = (tuple(int(size) for size in part.split("x")) for part in parts)
        one_rank = len(low) == len(usual) == len(high)
        if not one_rank or any(not 1 <= a <= b <= c for a, b, c in zip(low, usual, high, strict=True)):
            raise InputError(
                f"The shape {text!r} is no range: min, opt and max need one rank, and 1 <= min <= opt <= max in every "
                "dimension."
            )
        return cls(name=match["name"], min=low, opt=usual, max=high)

    def __str__(self) -> str:
        """The text that `parse` reads."""
        shapes = ["x".join(map(str, shape)) for shape in (self.min, self.opt, self.max)]
        return ":".join([self.name, *(shapes[:1] if len(set(shapes)) == 1 else shapes)])


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
        gpus: to predict times for, names in `engines.cost.gpus.GPUS` or mappings for `Gpu.from_mapping`;
            none for the usual one of each target.
        targets: to compile for.
        backend: that compiles, a name in `engines.backends`.
        shapes: of dynamic inputs.
        limits: keys of `LIMITS`.
        min_int8_share: least fraction of the multiply-adds that run in INT8 as compiled; None: not checked.
        alarms: below these a result is called poor.
        task: what the outputs are; "auto" is what the end of the graph tells.
        class_axis: axis of their classes; None is what the graph tells.
        whole: how whole volumes are run, and whether they are.
        volume: what is done to images; None where samples are arrays.
        case_key: file with the key of images' names; "" for a key of this run.
    """

    settings: Settings = field(default_factory=Settings)
    unquantized_type: str = "auto"
    tune: str = "placement"
    tune_compiles: int = TUNE_COMPILES
    time_limit_s: float = TIME_LIMIT_S
    gpus: tuple[str | Mapping[str, object], ...] = ()
    targets: tuple[str, ...] = ("sm89",)
    backend: str = DEFAULT
    shapes: tuple[ShapeOption, ...] = ()
    limits: Mapping[str, float] = field(default_factory=dict)
    min_int8_share: float | None = None
    alarms: Alarms = field(default_factory=Alarms)
    task: str = "auto"
    class_axis: int | None = None
    whole: WholeVolumes = field(default_factory=WholeVolumes)
    volume: VolumeSpec | None = None
    case_key: str = ""

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
        named |= {k: words[v] for k, v in named.items() if k in ("tune", "bias_correction") and isinstance(v, bool)}
        if named.get("volume") is not None:
            named["volume"] = volume_spec(named["volume"])
        named |= {k: converted(v, _BLOCKS[k], f"key of {k}") for k, v in named.items() if k in _BLOCKS and _is_block(v)}
        file = converted(named, RecipeFile, "recipe key")
        if file.volume and file.preprocess:
            raise InputError("Both `volume` and `preprocess` say what is done to images: choose one.")
        volume = preprocess_spec(file.preprocess) if file.preprocess else file.volume
        settings = Settings(**{name: getattr(file, name) for name in Settings.__struct_fields__})
        usual = "placement" if settings.scheme == "int8" else "rewrites"
        return cls(
            settings=settings,
            unquantized_type=choose(file.unquantized_type, UNQUANTIZED_TYPES, "type for what is not quantized"),
            tune=choose(file.tune or usual, TUNES, "way to tune"),
            tune_compiles=file.tune_compiles,
            time_limit_s=file.time_limit,
            gpus=(file.gpu,) if isinstance(file.gpu, str) else file.gpu,
            targets=_list(file.target),
            backend=choose(file.backend, tuple(backends()), "backend"),
            shapes=tuple(map(ShapeOption.parse, _list(file.shape))),
            limits={name: getattr(file, name) for name in LIMITS if getattr(file, name) is not None},
            min_int8_share=file.min_int8_share,
            alarms=Alarms(warn_sqnr_db=file.warn_sqnr_db, warn_top1=file.warn_top1),
            task=choose(file.task, TASKS, "task"),
            class_axis=file.class_axis,
            whole=_whole(file, volume),
            volume=volume,
            case_key=file.case_key,
        )


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


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a few lines of them stand for more values than any memory holds."""

    values = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """A node; an alias is refused."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name); write the value out")
        self.values += 1
        if self.values > MOST_VALUES:
            raise yaml.YAMLError(f"it has more than {MOST_VALUES} values")
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.ScalarNode) and len(node.value) > MOST_CHARACTERS:
            raise yaml.YAMLError(f"a value has {len(node.value)} characters; at most {MOST_CHARACTERS} are taken")
        return node


def read_recipe(path: Path | str) -> dict[str, object]:
    """The keys of a recipe file, not yet checked.

    Raises:
        InputError: the file is unreadable, no YAML, or no mapping.
    """
    try:
        text = read_file(path)
        if len(text) > MOST_BYTES:
            raise InputError(f"The recipe {path} has {len(text)} bytes; a recipe has at most {MOST_BYTES}.")
        values = yaml.load(text.decode(), _PlainLoader)
    except OSError as error:
        raise InputError(f"Cannot read the recipe {path}: {error.strerror or error}. Check the path.") from error
    except RecursionError:
        raise InputError(f"The recipe {path} is nested too deeply; a recipe holds texts, numbers and lists.") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        # what PyYAML's resolvers raise for a date or a number that is none has no base of its own
        raise InputError(f"The recipe {path} is not YAML: {' '.join(str(error).split())[:300]}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise InputError(f"The recipe {path} holds a {kind}; it needs lines such as 'scheme: int8', one per option.")
    return {str(key): value for key, value in values.items()}


def _list(words: Words) -> tuple[str, ...]:
    """A list, of one where one text was given."""
    return (words,) if isinstance(words, str) else words
