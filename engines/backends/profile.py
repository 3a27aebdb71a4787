"""What a compiler of some version makes of quantized graphs: its facts, each with the source that it is known from.

"tensorrt:10.16" -> `profile_named` -> `Profile` -> placement, the form of the Q/DQ model, lint rules, notes follow it.
A file of this folder with `PROFILES` describes its compiler, the usual version first. Must not decide anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache

import engines.backends
from engines.backends.backend import backend_named, members, target_name
from engines.backends.tensorrt_options import DLA
from engines.core.errors import EngineError, UnsupportedTargetError, did_you_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """Whether something holds of a compiler: true, false, or None where nobody says so; and from where that is known.

    `says` is what a person is told who asks why; a fact that is not known counts as one that does not hold.
    """

    holds: bool | None
    says: str
    source: str

    def __bool__(self) -> bool:
        """Whether it is known to hold."""
        return self.holds is True


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One version of a compiler.

    Attributes:
        name: as `--compiler` takes it, without the version.
        version: "" where a compiler has one profile.
        title: the compiler's own name, with the version where there are several.
        backend: name of the `Backend` that builds.
        targets: the GPU generations of that version.
        kinds: of GPUs that it is the usual compiler of, as `engines.cost.datasheets` calls them.
        formats: format of numbers -> the least SM on which products run in it; a format that is absent has no kernels.
        blocks: format -> the lengths along a sum that may share a scale, the longest first.
        opset: the newest ONNX opset that its parser documents; None where that is not known.
        types: element types that its parser takes in an initializer of a quantized tensor.
        trtexec: options that a build of a Q/DQ model needs with the version's command-line tool.
        integer_output: an INT8 convolution writes INT8, so that its neighbours read half of what FP16 has.
        shift: Q behind a Sub fuses into the kernel that made the tensor.
        hoist: a per-channel scale that stands behind a convolution fuses into its kernel.
        padding: zeros that the file adds in front of a quantizer fuse into the kernel that made the tensor, and filling
            up channels to fours so costs less than what the compiler does itself.
        residual: the shortcut of an Add is read quantized.
        concat: one scale for all inputs of a Concat lets their producers write codes.
        mean_pool: average pooling runs in INT8.
        conv_transpose: a transposed convolution runs in INT8.
        first_layer: a convolution of three channels runs in INT8.
        depthwise: a depthwise convolution has an INT8 kernel.
        small_products: products of one row, or with fewer than 16 summands or outputs, gain by INT8.
        attention: products of two computed tensors stay one fused kernel in INT8.
        narrow: a convolution of fewer than 16 channels in or out gains by INT8, whatever its form.
        odd_groups: a convolution with groups has INT8 kernels though the channels of a group are not in fours.
        fp8_convolutions: convolutions of any form have fast FP8 kernels.
        two_level: weights of 4 bits that INT8 products read stay 4 bits in the engine.
        token: one scale per token, computed as the engine runs, leaves the product in INT8.
        attention_fp8: products of two computed tensors stay one fused kernel in FP8.
        tables: a table that a Gather reads rows of stays codes in the engine where it is quantized.
    """

    name: str
    version: str
    title: str
    backend: str
    targets: tuple[str, ...]
    kinds: tuple[str, ...]
    formats: Mapping[str, int]
    blocks: Mapping[str, tuple[int, ...]]
    opset: int | None
    types: tuple[str, ...]
    trtexec: tuple[str, ...]
    integer_output: Fact
    shift: Fact
    hoist: Fact
    padding: Fact
    residual: Fact
    concat: Fact
    mean_pool: Fact
    conv_transpose: Fact
    first_layer: Fact
    depthwise: Fact
    small_products: Fact
    attention: Fact
    narrow: Fact
    odd_groups: Fact
    fp8_convolutions: Fact
    two_level: Fact
    token: Fact
    tables: Fact
    attention_fp8: Fact

    @property
    def key(self) -> str:
        """The whole name, as plans and recipes hold it: 'rtx', 'tensorrt:11'."""
        return f"{self.name}:{self.version}" if self.version else self.name

    @property
    def facts(self) -> dict[str, Fact]:
        """Every fact by name."""
        return {f.name: fact for f in fields(self) if isinstance(fact := getattr(self, f.name), Fact)}

    def about_opset(self, opset: int) -> str:
        """A sentence where a model is newer than what the parser documents, else ""."""
        if self.opset is None or opset <= self.opset:
            return ""
        return f"The model is of ONNX opset {opset}; {self.title} documents opsets up to {self.opset}."

    def require_target(self, text: str) -> str:
        """The name of a target that this version has.

        Raises:
            UnsupportedTargetError: another version, another compiler or none has it; names those, or the nearest.
        """
        name = backend_named(self.backend).target(text)
        if name not in self.targets:
            others = [p for p in profiles().values() if p.backend == self.backend and name in p.targets]
            hint = " or ".join(f"{p.title} (--compiler {p.key})" for p in others)
            known = ", ".join(self.targets)
            raise UnsupportedTargetError(f"{self.title} has no target {text!r}; it has {known}. {name} needs {hint}.")
        return name

    def require_formats(self, formats: Iterable[str], targets: Iterable[str]) -> None:
        """Refuse formats that this version has no kernels for on a target, before anything is measured.

        Args:
            formats: names of `formats`, or of what it lacks.
            targets: in any spelling; one without a number is left to the compiler to refuse.

        Raises:
            UnsupportedTargetError: names the format, the target and the lowest one that has it.
        """
        for fmt in sorted(set(formats)):
            if (least := self.formats.get(fmt)) is None:
                having = [p.key for p in profiles().values() if fmt in p.formats]
                hint = f"take --compiler {' or '.join(having)}, or " if having else ""
                raise UnsupportedTargetError(f"{self.title} has no {fmt}: {hint}choose another scheme such as int8.")
            numbers = {t: name[2:] for t in targets if (name := target_name(t)).startswith("sm")}
            if lacking := [t for t, number in numbers.items() if number.isdecimal() and int(number) < least]:
                raise UnsupportedTargetError(
                    f"{', '.join(lacking)} cannot compile {fmt}: it needs sm{least} or newer. Choose another --target, "
                    "or a scheme, overrides and attention without that format, such as int8."
                )

    def same_compiler(self, backend: str, version: str) -> bool:
        """Whether a layer table of that backend and version is of the compiler that this describes."""
        ours, theirs = self.version.split("."), version.split(".")
        return backend == self.backend and theirs[: len(ours)] == ours if self.version else backend == self.backend


def profiles() -> dict[str, Profile]:
    """Key -> profile, in the order of the files; of each compiler the usual version first."""
    return _profiles(tuple(engines.backends.__path__))


@lru_cache(maxsize=4)
def _profiles(_folders: tuple[str, ...]) -> dict[str, Profile]:
    return {profile.key: profile for found in members("PROFILES") for profile in found}


def names(found: Iterable[Profile]) -> tuple[str, ...]:
    """What `--compiler` takes for some profiles: the name for the usual version, and each version."""
    keys = ((p.name, p.key) for p in found)
    return tuple(dict.fromkeys(name for pair in keys for name in pair))


def profile_named(text: str) -> Profile:
    """The profile of a name, of the usual version where none is given.

    >>> profile_named("tensorrt").key
    'tensorrt:11'

    Raises:
        EngineError: there is none; names the nearest, or says why there is none for DLA.
    """
    found = profiles()
    if text in found:
        return found[text]
    for profile in found.values():
        if profile.name == text:
            return profile
    if text.partition(":")[0].lower() == "dla":
        raise EngineError(DLA)
    known = names(found.values())
    raise EngineError(f"Unknown compiler {text!r}; there are {', '.join(known)}.{_meant(text, known)}")


def _meant(text: str, known: Iterable[str]) -> str:
    """The nearest name, as `did_you_mean`; what backends and compilers are called elsewhere is their name's too."""
    called = {
        other.lower(): p.name for p in profiles().values() for other in (p.backend, backend_named(p.backend).title)
    }
    called |= {name: name for name in known}
    name, _, version = text.lower().partition(":")
    plain = text.lower() if text.lower() in called else ":".join(filter(None, (called.get(name, name), version)))
    return did_you_mean(called.get(plain, plain), called.values())


def profile_of(backend: str) -> Profile:
    """The usual profile of what a backend compiles.

    Raises:
        EngineError: see `backend_named`.
    """
    return next(p for p in profiles().values() if p.backend == backend_named(backend).name)
