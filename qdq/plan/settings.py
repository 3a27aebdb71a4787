"""How tensors are to be quantized: `Spec` for one tensor, `Settings` for a whole run.

recipe or options -> Settings (validated here, trusted everywhere else) -> placement, calibration, solve.
This module must not look at a model.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import msgspec

from engines.backends.backend import DEFAULT
from engines.backends.profile import Profile, profile_named
from engines.core.documents import Part, replace
from engines.core.errors import EngineError
from qdq.core.choices import checked, choose, converted
from qdq.core.errors import InputError
from qdq.core.formats import FORMATS
from qdq.plan.choice import FLOAT, Choice, choice
from qdq.plan.methods import CALIBRATORS, FORMULAS, ROUNDINGS
from qdq.plan.scheme import SCHEMES, Scheme
from qdq.plan.spec import BY_RANGE, Spec

AUTO: Literal["auto"] = "auto"
USUAL_CALIBRATORS = ("mse", "ample", "max")
WHOLE = ("channel", "tensor")  # in place of a block
WORTH = "worth"  # of each weight the block whose scales are worth their bits
TABLES: tuple[str, ...] = (FLOAT, "int8", "int4")  # what tables of words may be stored as
GRADIENTS: tuple[str, ...] = ("free", "tied")  # codes of weights that a gradient reads again
ATTENTIONS: tuple[str, ...] = (FLOAT, "fp8")  # what the products of attention may run in
BIAS_CORRECTIONS: tuple[str, ...] = ("auto", "on", "off")
PIECEWISE: tuple[str, ...] = ("off", "auto", "on")
V0, V1 = 15.0, 150.0  # of FPTQ's paper
Pattern = Annotated[str, msgspec.Meta(min_length=1)]  # of node names, with * and ?
MOST = 1e9  # of numbers that must be finite
Magnitude = Annotated[float, msgspec.Meta(le=MOST)]
LEAST_DAMPING = 1e-4  # inputs that depend on each other leave a matrix that has no inverse otherwise


def choices(setting: str) -> tuple[str | int, ...]:
    """What a setting may be that takes one of several names or lengths, as the registries have them.

    Args:
        setting: a field of `Settings`: scheme, calibrator, rounding, equalize, bias_correction, block, embeddings or
            attention or piecewise.
    """
    found: Mapping[str, Callable[[], tuple[str | int, ...]]] = {
        "scheme": lambda: tuple(SCHEMES),
        "calibrator": lambda: (*CALIBRATORS, AUTO),
        "rounding": lambda: (*ROUNDINGS, AUTO),
        "equalize": lambda: (*FORMULAS, AUTO, "none"),
        "bias_correction": lambda: BIAS_CORRECTIONS,
        "embeddings": lambda: TABLES,
        "attention": lambda: ATTENTIONS,
        "gradients": lambda: GRADIENTS,
        "piecewise": lambda: PIECEWISE,
        "block": lambda: (*sorted({b for f in FORMATS.values() for b in f.blocks}, reverse=True), AUTO, WORTH, *WHOLE),
    }
    return found[setting]()


def _number(value: object) -> object:
    """The number that a text stands for; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


class Settings(Part, frozen=True, kw_only=True):
    """Everything that decides how a model is quantized, apart from the model and the samples.

    Attributes:
        scheme: which operands get which format, a name in SCHEMES.
        calibrator: how an activation's range is chosen from its histogram; "" takes "ample" where held-out samples lose
            next to nothing by it, "max" where they clearly gain, else "mse" (`qdq.assemble.judge`), and "auto" compares
            all of them, tensor by tensor.
        percentile: percent of the values that the `percentile` calibrator keeps inside the range.
        rounding: how weights are rounded to codes; "auto" takes that of the scheme's which is best on held-out samples
            (`qdq.assemble.judge`), as does "", unless the scheme has one only.
        equalize: the formula by which input channels of a layer are balanced where that pays, or "none"; "auto" and ""
            as for rounding. Weight-only blocks are balanced as AWQ does, unless it is "none" or "sinq".
        shift: allow `Spec.shift` for activations; "auto" allows it where the compiler is known to fuse it, unless
            held-out samples lose by it.
        exclude: glob patterns of node names that stay in float; each must match at least one node.
        bias_correction: shift biases so that quantization does not move means; "auto" where held-out samples gain.
        block: weights that share a scale along the reduction axis, for formats that have blocks; "worth" takes for
            each weight the one whose scales are worth their bits (`block_length.best`), "auto" too unless held-out
            samples gain by the shortest for all (`qdq.assemble.judge`); "channel", "tensor": the whole. INT8 weights
            have one scale per output channel, and one in all with "tensor".
        damping: of rounding by second moments: the share of their mean diagonal that is added to the diagonal.
        act_order: GPTQ rounds the inputs of largest second moment first; else in their order.
        moment_inputs: weights of up to so many inputs per output are rounded by second moments, the others without
            data: a matrix takes 8 bytes times its square, and rounding several times that.
        v0: of FPTQ's rule: tensors whose largest magnitude is at most this have one scale; "auto" equalizes every one
            that gains.
        v1: those above v0 and at most this are equalized first; those above v1 have one scale per token; "auto" gives
            it to those whose error counts beside that of the weights.
        piecewise: data of MatMul and Gemm in two pieces, with a scale and a product each: "on" everywhere, "auto" where
            the error of one scale counts beside that of the weights and two pieces are predicted to gain 1 dB.
        overrides: node name pattern -> what those nodes become, as `qdq.plan.choice` reads it: a scheme with its
            granularity, "float" or "fp32"; the first that matches counts.
        embeddings: how tables are stored that a Gather reads rows of: "float", "int8" with a scale for each row, or
            "int4" in blocks of a row.
        attention: "fp8" quantizes Q, K, V and the output of the Softmax of attention to FP8, in any scheme.
        gradients: "tied" gives a weight that is read along both axes, for an energy and for its gradient, one set of
            codes, so that forces stay the gradient of the quantized energy; "free" rounds each reader's for itself.
        compiler: whose engine the model is for, a key of `engines.backends.profile.profiles`; placement, the form of
            the Q/DQ model and what "auto" means follow its profile.

    Raises:
        InputError: an unknown name, a value outside its range, or a format that the compiler has no kernels for.
    """

    scheme: str = "int8"
    calibrator: str = ""
    percentile: Annotated[float, msgspec.Meta(gt=50, le=100)] = 99.99
    rounding: str = ""
    equalize: str = ""
    shift: bool | Literal["auto"] = AUTO
    exclude: tuple[Pattern, ...] = ()
    bias_correction: str = "auto"
    block: int | str = "auto"
    damping: Annotated[float, msgspec.Meta(ge=LEAST_DAMPING, le=MOST)] = 0.01
    act_order: bool = True
    moment_inputs: Annotated[int, msgspec.Meta(ge=0)] = 2304
    v0: Magnitude | str = V0
    v1: Magnitude | str = V1
    embeddings: str = FLOAT
    attention: str = FLOAT
    gradients: str = GRADIENTS[0]
    piecewise: str = "off"
    overrides: dict[Pattern, str] = msgspec.field(default_factory=dict)
    compiler: str = DEFAULT

    def __post_init__(self) -> None:
        """Hold each field to its type, and names to those that exist."""
        set_field = msgspec.structs.force_setattr
        for name in ("v0", "v1"):  # text where the command line gives them
            set_field(self, name, _number(getattr(self, name)))
        block = self.block
        if isinstance(block, str) and re.fullmatch(r"[0-9]{1,9}", block):
            block = int(block)
        set_field(self, "block", block)
        checked(self)
        choose(self.scheme, tuple(SCHEMES), "scheme")
        rows = self.schemes
        for name in ("embeddings", "attention", "gradients", "piecewise"):
            choose(getattr(self, name), [str(n) for n in choices(name)], name)
        try:
            set_field(self, "compiler", profile_named(self.compiler).key)
            self.profile.require_formats(self.formats, ())
        except EngineError as error:
            raise InputError(str(error)) from None
        for own in {each for each in map(choice, self.overrides.values()) if each.block is not None}:
            self.alone(own)  # refuses a block that its scheme has none of
        for name in ("rounding", "equalize"):
            if getattr(self, name) == "":
                set_field(self, name, AUTO if len(self.options(name)) > 1 else self.options(name)[0])
        for name in ("calibrator", "rounding", "equalize", "bias_correction"):
            if getattr(self, name) or name != "calibrator":
                choose(getattr(self, name), [str(n) for n in choices(name)], name)
        if block not in choices("block"):
            raise InputError(f"block is {block!r}: it must be one of {', '.join(map(str, choices('block')))}.")
        for name, low in (("v0", 0.0), ("v1", 0.0 if isinstance(self.v0, str) else self.v0)):
            value = getattr(self, name)
            if value != AUTO and (isinstance(value, str) or value < low):
                least = "v0" if name == "v1" else "0"
                shown = repr(value) if isinstance(value, str) else f"{value:g}"
                raise InputError(f"{name} is {shown}: it must be a number of at least {least}, or auto.")
        for name in dict.fromkeys(row.weight for row in rows):
            if block in FORMATS[name].blocks and block not in self.lengths(name):
                known = ", ".join(map(str, self.lengths(name)))
                raise InputError(f"block is {block}: {self.profile.title} documents {known} for {name}.")
        through = [row for row in rows if row.compute_format or FORMATS[row.weight].scale_format]
        if self.block in WHOLE and through:
            fmt = FORMATS[through[0].weight]
            raise InputError(
                f"block is {self.block!r}, but {through[0].name} multiplies {fmt.bits}-bit weights through blocks: "
                f"choose {', '.join(map(str, fmt.blocks))} or auto, or the weight-only scheme int4."
            )

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The scheme, and those of the overrides, each once."""
        others = (each.row for each in map(choice, self.overrides.values()) if each.quantizes)
        return tuple(dict.fromkeys((SCHEMES[self.scheme], *others)))

    @property
    def label(self) -> str:
        """The scheme's name; "mixed" where overrides name another one."""
        return self.scheme if len(self.schemes) == 1 else "mixed"

    @property
    def profile(self) -> Profile:
        """What is known of the compiler."""
        return profile_named(self.compiler)

    def options(self, setting: str) -> tuple[str | int, ...]:
        """What an open setting is chosen from; the first where nothing can be compared.

        Of several schemes: the roundings of the one that has most, which do for the others what nearest ones or GPTQ
        do; and every formula, for each looks at the operands that it is for.
        """
        rows = self.schemes
        formulas = dict.fromkeys(name for row in rows for name in row.equalizations)
        if len(rows) > 1:
            formulas = dict.fromkeys((*(name for name in formulas if name != "none"), "none"))
        found: Mapping[str, tuple[str | int, ...]] = {
            "calibrator": USUAL_CALIBRATORS,
            "rounding": max((row.roundings for row in rows), key=len),
            "equalize": tuple(formulas),
            "shift": (True, False) if self.profile.shift else (False,),
            "block": (WORTH, min(self._lengths, default=AUTO)),
        }
        return found[setting]

    @property
    def _lengths(self) -> tuple[int, ...]:
        """The block lengths that formats of weights leave a choice of."""
        each = (self.lengths(row.weight) for row in self.schemes)
        return tuple(block for lengths in each if len(lengths) > 1 for block in lengths)

    def lengths(self, fmt: str) -> tuple[int, ...]:
        """The block lengths of a format that the compiler has kernels for, the longest first."""
        known = self.profile.blocks.get(fmt, ())
        return tuple(block for block in FORMATS[fmt].blocks if block in known)

    @property
    def range_by(self) -> str:
        """The calibrator, the first of the usual ones where none is asked for or chosen yet."""
        return self.calibrator or USUAL_CALIBRATORS[0]

    @property
    def open(self) -> tuple[str, ...]:
        """The settings that are not decided yet, in the order in which they are."""
        usual = () if self.calibrator else ("calibrator",)
        several = (name for name in ("shift", "equalize", "rounding") if len(self.options(name)) > 1)
        found = (*usual, *(name for name in several if getattr(self, name) == AUTO))
        return (*found, "block") if self.block == AUTO and self._lengths else found

    @property
    def settled(self) -> Settings:
        """The same with the first of the options in place of every one that is open."""
        return replace(self, **{name: self.options(name)[0] for name in self.open})

    @property
    def quick(self) -> Settings:
        """The same, as far as it needs no comparison of models and no second moments."""
        return replace(self, calibrator="mse" if self.calibrator == AUTO else self.range_by, rounding="nearest")

    @property
    def idle(self) -> tuple[str, ...]:
        """What was set to another value than the default and means nothing to the schemes, a sentence each."""
        rows = self.schemes
        weights = [FORMATS[row.weight] for row in rows]
        lengths = {block for fmt in weights for block in fmt.blocks}
        alone = any(FORMATS[row.weight].blocks and row.data is None for row in rows)
        integers = any(f is not None and FORMATS[f].integer for row in rows for f in (row.data, row.convolution))
        rounding, formula = ROUNDINGS[self.settled.rounding], FORMULAS.get(self.settled.equalize)
        rounded = bool(lengths) or (any(fmt.integer for fmt in weights) and not rounding.for_blocks)
        of_data, of_weights = (True, True) if formula is None else (formula.for_data, formula.by_weights is not None)
        of_weights |= not of_data  # awq; what is for data only has no say in weight-only blocks
        balanced = self.equalize != "none" and ((integers and of_data) or (alone and of_weights))
        balanced |= self.equalize in ("rms", AUTO) and any(row.residual for row in rows)
        by_moments = alone and self.equalize != "none" and (formula is None or formula.by_weights is None)
        asked = CALIBRATORS if self.calibrator == AUTO else (self.range_by,)
        ranged = any(row.token == BY_RANGE for row in rows)
        names = ", ".join(row.name for row in rows)
        scheme, method, ranges = f"scheme {names}", f"rounding {self.rounding}", f"calibrator {self.range_by}"
        means = {  # setting -> whether it has an effect, and what it has none with
            "block": (
                self.block == AUTO
                or self.block in lengths
                or len(lengths) > 1
                or (self.block == "tensor" and any(fmt.integer for fmt in weights)),
                scheme,
            ),
            "rounding": (self.rounding == "nearest" or rounded, scheme),
            "equalize": (self.equalize == "none" or balanced, scheme),
            "calibrator": (integers, scheme),
            "percentile": (integers and any("percentile" in CALIBRATORS[c].settings for c in asked), ranges),
            "shift": (integers or self.shift is not False, scheme),
            "damping": (rounded and "damping" in rounding.settings, method),
            "act_order": (rounded and "act_order" in rounding.settings, method),
            "moment_inputs": ((rounded and rounding.needs_moments) or by_moments, method),
            "v0": (ranged, scheme),
            "v1": (ranged, scheme),
            "piecewise": (any(row.data and FORMATS[row.data].integer for row in rows), scheme),
        }
        defaults = {f.name: f.default for f in msgspec.structs.fields(type(self))}
        said = [
            f"{name} {getattr(self, name)} has no effect with {cause}"
            for name, (used, cause) in means.items()
            if not used and getattr(self, name) != defaults[name]
        ]
        for pattern, own in ((pattern, choice(text)) for pattern, text in self.overrides.items()):
            mine = [text for text in self.alone(own).idle if text.split()[0] in own.given] if own.given else []
            said += [f"override {pattern!r}: {text}" for text in mine]
        return tuple(said)

    @property
    def doubts(self) -> tuple[str, ...]:
        """What is asked for and not known to serve its purpose with this compiler, a sentence each."""
        rows, profile = self.schemes, self.profile
        asked = (
            ("shift", profile.shift, self.shift is True),
            *((f"scheme {row.name}", profile.two_level, row.compute_format is not None) for row in rows),
            *((f"scheme {row.name}", profile.token, row.token is not None) for row in rows),
            ("embeddings", profile.tables, self.embeddings != FLOAT),
            ("attention", profile.attention_fp8, self.attention != FLOAT),
        )
        return tuple(dict.fromkeys(f"{what}: {fact.says}" for what, fact, wanted in asked if wanted and not fact))

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> Settings:
        """Build settings from a recipe's keys.

        Raises:
            InputError: a key that is no setting, or a bad value.
        """
        return converted(values, cls, "setting")

    def to_mapping(self) -> dict[str, object]:
        """The settings as plain values, ready for JSON or YAML."""
        return dict(msgspec.to_builtins(self))

    def scheme_of(self, node: str) -> Scheme:
        """The scheme of a node by its name; one of `FLOATS` where it is not to be quantized."""
        return self.choice_of(node).row

    def choice_of(self, node: str) -> Choice:
        """What a node becomes, by its name."""
        return choice(
            next((s for pattern, s in self.overrides.items() if fnmatch.fnmatchcase(node, pattern)), self.scheme)
        )

    def of(self, node: str) -> Settings:
        """The settings with a node's own granularity."""
        own = self.choice_of(node)
        return self if own.block is None and own.shift is None else self.alone(own)

    def alone(self, own: Choice) -> Settings:
        """The settings where every node becomes the same, a scheme."""
        return replace(
            self,
            scheme=own.scheme,
            block=self.block if own.block is None else own.block,
            shift=self.shift if own.shift is None else own.shift,
            overrides={},
        )

    @property
    def formats(self) -> frozenset[str]:
        """Every format that a model quantized so may hold: `Profile.require_formats` says which GPUs have them."""
        found = {f for row in self.schemes for f in (row.data, row.weight, row.compute_format, row.convolution)}
        return frozenset(f for f in (*found, self.embeddings, self.attention) if f not in (None, FLOAT))

    def activation(self, scheme: Scheme, *, convolution: bool = False) -> Spec | None:
        """How a scheme quantizes the data operand of a weighted operator; None leaves it float."""
        fmt = scheme.convolution if convolution else scheme.data
        if fmt is None:
            return None
        wanted = self.options("shift")[0] if self.shift == AUTO else self.shift
        if scheme.residual and not convolution:
            return Spec(format=fmt, residual=True)  # a constant taken off would gain a bit of sixteen
        shift = bool(wanted) and FORMATS[fmt].integer
        return Spec(format=fmt, shift=shift, token=None if convolution else scheme.token)

    def weight(
        self, scheme: Scheme, *, outputs: int, inputs: int, block: int | None, convolution: bool = False
    ) -> Spec | None:
        """How a scheme quantizes a weight; None leaves it float.

        Args:
            scheme: of the node.
            outputs: the axis of the output channels.
            inputs: the axis that the product sums over.
            block: elements of `inputs` that share a scale; None for one scale per output channel, or per tensor.
            convolution: whether the node is a Conv.
        """
        fmt = scheme.convolution if convolution else scheme.weight
        if fmt is None:
            return None
        alone = scheme.data is None and not convolution
        if FORMATS[fmt].blocks and block is not None:
            read = scheme.compute_format
            return Spec(format=fmt, axis=inputs, block=block, compute_format=read, weight_only=alone)
        # One scale loses nothing where codes are floating-point numbers, and behind a product per-channel scales cost a
        # kernel; behind a convolution the rewrite `hoist` moves them.
        whole = self.block == "tensor" if FORMATS[fmt].blocks or FORMATS[fmt].integer else not convolution
        return Spec(format=fmt, axis=None if whole else outputs, weight_only=alone)
