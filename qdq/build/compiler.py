"""Which compiler's engine a model is for, and for which targets, from what a user names: never by accident.

What `--compiler`, `--gpu` and `--target` say -> `choose_compiler` -> the compiler, the targets, and why in words.
Data-centre GPUs and Jetsons run TensorRT, GeForce and RTX cards TensorRT-RTX, and a target that one of them alone has
decides too. What says nothing is the usual compiler, with how to ask for the other. Must not look at a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engines.backends.backend import DEFAULT, backend_named, target_name
from engines.backends.doctor import gpus as gpus_here
from engines.backends.profile import Profile, profile_named, profile_of, profiles
from engines.cost.datasheets import KINDS
from engines.cost.gpus import Gpu, gpu_named
from qdq.core.errors import InputError

USUAL_TARGETS = ("sm89",)
_WORDS = ("a GPU of the data centre", "an RTX workstation GPU", "a GeForce GPU", "a Jetson")
_SOLD = dict(zip(KINDS.values(), _WORDS, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A compiler's key, why it is that one ("" where the user says so), and the targets to compile for."""

    compiler: str
    because: str
    targets: tuple[str, ...]


def of_another(made_for: str, backend: str, version: str) -> str:
    """A warning where a model was made for another compiler than built its engine, or another version; "" where not.

    Args:
        made_for: key of a profile; "" where it is not known.
        backend: of the engine's layer table.
        version: of the same.
    """
    known = profiles()
    if made_for not in known or known[made_for].same_compiler(backend, version):
        return ""
    title = known[made_for].title
    other = next((p.key for p in known.values() if p.same_compiler(backend, version)), profile_of(backend).name)
    return (
        f"The model was quantized for {title}, and {backend_named(backend).title} {version} compiled it: where it is "
        f"quantized, and in which form, was decided by another compiler's kernels. Quantize it again with --compiler "
        f"{other}, or build it by {title}."
    )


def choose_compiler(
    asked: str | None, gpus: Sequence[str | Mapping[str, object]], targets: Sequence[str] | None
) -> Choice:
    """The compiler that is asked for, else the one of the GPUs and targets.

    Args:
        asked: as `profile_named` takes it; None decides by the others.
        gpus: to predict times for, names or mappings for `Gpu.from_mapping`.
        targets: in any spelling; None takes those of the GPUs, else those of this machine where the compiler needs its
            GPU, else the usual one.

    Raises:
        EngineError: an unknown compiler or GPU, or a target that the version does not have.
        InputError: they ask for two compilers.
    """
    known = [gpu_named(gpu) if isinstance(gpu, str) else Gpu.from_mapping(gpu) for gpu in gpus]
    for_gpus = tuple(dict.fromkeys(gpu.target for gpu in known))
    if asked:
        profile = profile_named(asked)
        here = [gpu.target for gpu in gpus_here()] if backend_named(profile.backend).needs_gpu else []
        return _checked(Choice(compiler=profile.key, because="", targets=tuple(targets or for_gpus or here[:1])))
    votes = {gpu.name: vote for gpu in known if (vote := _of_gpu(gpu))}
    votes |= {target: vote for target in targets or () if (vote := _of_target(target))}
    if len({profile.key for profile, _ in votes.values()}) > 1:
        said = "; ".join(f"{name} means {profile.title}: {why}" for name, (profile, why) in votes.items())
        raise InputError(
            f"The GPUs and targets ask for two compilers, and an engine is of one. {said}. Name one with --compiler "
            f"{' or '.join(dict.fromkeys(p.name for p, _ in votes.values()))}, or run once for each."
        )
    asking = targets or for_gpus
    if votes:
        (profile, why), *_ = votes.values()
        return _checked(Choice(compiler=profile.key, because=why, targets=tuple(asking)))
    usual = profile_named(DEFAULT)
    others = [p for p in _usual() if p.key != usual.key and all(target_name(t) in p.targets for t in asking)]
    ways = "".join(f"; for {p.title} give --compiler {p.name}, or name a GPU of the {p.kinds[0]}" for p in others)
    what = f"--target {' '.join(asking)} alone says of no GPU" if asking else "no GPU is named"
    return _checked(Choice(compiler=usual.key, because=f"{what} what compiles for it{ways}", targets=tuple(asking)))


def _checked(choice: Choice) -> Choice:
    """A choice whose targets the version of the compiler has, with the usual ones where it has none.

    Raises:
        UnsupportedTargetError: it lacks one; names who has it.
    """
    profile = profile_named(choice.compiler)
    for target in choice.targets:
        profile.require_target(target)
    return Choice(compiler=choice.compiler, because=choice.because, targets=choice.targets or USUAL_TARGETS)


def _usual() -> list[Profile]:
    """The usual version of each compiler."""
    return list({p.name: profile_named(p.name) for p in profiles().values()}.values())


def _of_gpu(gpu: Gpu) -> tuple[Profile, str] | None:
    """What usually compiles for a GPU, and why; None where its kind is not known."""
    alone = _of_target(gpu.target)
    if alone or gpu.kind is None:
        return alone
    found = next(p for p in _usual() if gpu.kind in p.kinds)
    return found, f"{gpu.name} is {_SOLD[gpu.kind]}"


def _of_target(target: str) -> tuple[Profile, str] | None:
    """The compiler that alone has a target; None where several have it, or none."""
    having = [p for p in _usual() if target_name(target) in p.targets]
    if len(having) != 1:
        return None
    return having[0], f"{target_name(target)} is a target of {having[0].title} alone"
