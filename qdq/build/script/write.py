"""Writes build_engine.sh: a POSIX shell script that needs nothing but the files beside it and one of three tools.

Q/DQ model, recipe, shapes -> `build_script` -> text -> `save_build_script` -> an executable file beside the model.
Every name is quoted for the shell. Must not compile.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import msgspec
from onnx import ModelProto

from engines.backends.backend import target_name
from engines.backends.compiler import ShapeRange
from engines.backends.tensorrt_options import TensorRtOptions
from engines.core.documents import replace
from engines.core.files import sha256_file, write_atomic
from engines.core.load import load_graph
from engines.core.nodes import external_files
from engines.verify.report import Alarms
from qdq.build.recipe import LIMITS, Recipe
from qdq.build.script.commands import Command, Job, compare, convert, trtexec

NAME = "build_engine.sh"
COSINE = 0.99  # of engine and Q/DQ model, which differ by rounding only; below 20 dB an output is called poor

_HEAD = """\
#!/bin/sh
# Builds {engine} from {model} with {title}, on the GPU of this machine. Written by qdq {version}.
#
#   sh {script} [qdq | trtexec | polygraphy] [FLOAT_MODEL DATA]
#
# Without a name, the first of the three that is installed builds. With the float model and samples of it, qdq then
# checks the engine on them. trtexec measures as all versions do by default from 11 on: CUDA graph, spin wait, data on
# the GPU. Ends with 0 done, 1 an accuracy limit failed, 2 a wrong file or argument, 3 no tool.
# shellcheck disable=SC2016 # what looks like an expression in a quoted name is none
set -eu
unset POLYGRAPHY_USE_TENSORRT_RTX

fail() {{
    printf '%s\\n' "$2" >&2
    exit "$1"
}}

tool=${{1-}}
float=${{2-}}
data=${{3-}}
[ "$#" -le 3 ] || fail 2 'At most three arguments: [qdq | trtexec | polygraphy] [FLOAT_MODEL DATA].'
[ "$#" -ne 2 ] || fail 2 'FLOAT_MODEL needs DATA behind it.'
case $float in '' | /*) ;; *) float=$PWD/$float ;; esac
case $data in '' | /*) ;; *) data=$PWD/$data ;; esac
cd -- "$(dirname -- "$0")"
PATH=$PATH:/usr/src/tensorrt/bin # trtexec, up to TensorRT 10.14

expect() {{
    [ -f "$2" ] || fail 2 "There is no file $2 beside this script."
    found=$(sha256sum <"$2")
    [ "${{found%% *}}" = "$1" ] || fail 2 "$2 has the sha256 ${{found%% *}}, and $1 is needed: it is another file."
}}

{expected}

if [ -z "$tool" ]; then
    for name in qdq trtexec polygraphy; do
        if command -v "$name" >/dev/null 2>&1; then
            tool=$name
            break
        fi
    done
    [ -n "$tool" ] || fail 3 "None of qdq, trtexec and polygraphy is installed: pip install 'qdq[gpu]'"
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

case $tool in
qdq)
    cat >"$work/recipe.yaml" <<'QDQ_RECIPE'
{recipe}
QDQ_RECIPE
    {build}
    {audit}
    if [ -n "$float" ]; then
        {check}
    fi
    ;;
trtexec)
{trtexec}
    ;;
polygraphy)
{polygraphy}
    ;;
*)
    fail 2 "There is no way to build named $tool: give qdq, trtexec or polygraphy."
    ;;
esac

# The engine against the Q/DQ model in ONNX Runtime, on random inputs: they differ by rounding only.
if command -v polygraphy >/dev/null 2>&1 && polygraphy run --help | grep cosine_similarity >/dev/null; then
    {reference}
    {compared}
else
    printf '%s\\n' "Not compared with ONNX Runtime: that needs pip install 'polygraphy>=0.53' onnxruntime."
fi
printf '%s\\n' {done}
"""


class _Variable(str):
    """An argument that the script itself fills in."""


_RECIPE, _INPUTS, _OUTPUTS = (_Variable(f"$work/{name}") for name in ("recipe.yaml", "inputs.json", "outputs.json"))
_FLOAT, _DATA = _Variable("$float"), _Variable("$data")


def save_build_script(
    model: Path, engine: str, *, recipe: Recipe, shapes: Mapping[str, ShapeRange], path: Path | None = None
) -> Path:
    """Write the script beside a Q/DQ model, executable; returns where it is.

    Args:
        model: the Q/DQ model, which the script expects beside itself.
        engine: name of the engine that it builds there.
        recipe: with the compiler, its options and the limits.
        shapes: of the inputs.
        path: of the script; `NAME` beside the model if None.

    Raises:
        EngineError: see `build_script`; the folder is not writable.
    """
    path = path or model.with_name(NAME)
    write_atomic(path, build_script(model, engine, recipe=recipe, shapes=shapes, script=path.name))
    path.chmod(0o755)
    return path


def build_script(
    model: Path, engine: str, *, recipe: Recipe, shapes: Mapping[str, ShapeRange], script: str = NAME
) -> str:
    """The text of the script. Arguments as of `save_build_script`.

    Raises:
        EngineError: the model cannot be read; a plugin library is another than the recipe says, or it is not here and
            the recipe has no sha256 of it.
    """
    options = replace(
        recipe.tensorrt,
        plugins=tuple(replace(library, path=_loaded(library.path)) for library in recipe.tensorrt.libraries),
    )
    if options.timing_cache:  # a path of this machine means nothing on another
        options = replace(options, timing_cache=_beside(Path(options.timing_cache).name))
    proto = load_graph(model)
    dynamic = _dynamic_inputs(proto)
    profiles = [{n: s for n, s in {**shapes, **own}.items() if n in dynamic} for own in options.ranges or ({},)]
    profiles = [profile for profile in profiles if profile]
    job = Job(
        model=_beside(model.name), engine=_beside(engine), options=options, profiles=profiles, profile=recipe.profile
    )
    reference, compared = compare(
        job,
        inputs=_INPUTS,
        outputs=_OUTPUTS,
        cosine=recipe.limits.get("min_cosine", COSINE),
        snr_db=recipe.limits.get("min_sqnr_db", Alarms().warn_sqnr_db),
    )
    limits = [f"--{n.replace('_', '-')}={recipe.limits[n]:g}" for n in LIMITS if n in recipe.limits]
    check = [*limits, "--task", recipe.task]
    check += [] if recipe.class_axis is None else [f"--class-axis={recipe.class_axis}"]
    share = [] if recipe.min_int8_share is None else [f"--min-int8-share={recipe.min_int8_share:g}"]
    written = {"shape": _shape_options(profiles), "tensorrt": _plain(options, profiles)}
    built = ["qdq", "build", job.model, "-o", job.engine, "--compiler", recipe.profile.key]
    built += [word for target in recipe.targets for word in ("--target", target_name(target))]
    return _HEAD.format(
        script=_comment(script),
        engine=_comment(engine),
        model=_comment(model.name),
        title=recipe.profile.title,
        version=metadata.version("qdq"),
        expected="\n".join(f"expect {sha} {shlex.quote(name)}" for name, sha in _expected(model, proto, options)),
        recipe=json.dumps({k: v for k, v in written.items() if v}, ensure_ascii=False),
        build=_line([*built, "--recipe", _RECIPE]),
        audit=_line(["qdq", "audit", job.engine, *share]),
        check=_line(["qdq", "check", _FLOAT, job.engine, "--data", _DATA, "--recipe", _RECIPE, *check]),
        trtexec=_branch(trtexec(job)),
        polygraphy=_branch(convert(job)),
        reference=_line(reference.arguments),
        compared=_line(compared.arguments),
        done=shlex.quote(f"Built {engine}."),
    )


def _plain(options: object, profiles: Sequence[Mapping[str, ShapeRange]]) -> dict[str, object]:
    """The options as a recipe holds them, with complete profiles."""
    default = msgspec.to_builtins(type(options)())
    found = {name: value for name, value in msgspec.to_builtins(options).items() if value != default[name]}
    if len(profiles) > 1:
        found["profiles"] = [{name: str(shape) for name, shape in profile.items()} for profile in profiles]
    else:
        found.pop("profiles", None)
    return found


def _shape_options(profiles: Sequence[Mapping[str, ShapeRange]]) -> list[str]:
    """The shapes of one profile, as `--shape` takes them; several stand among the options."""
    return [f"{name}:{shape}" for name, shape in profiles[0].items()] if len(profiles) == 1 else []


def _expected(model: Path, proto: ModelProto, options: TensorRtOptions) -> Iterable[tuple[str, str]]:
    """(path, sha256) of every file that the build reads."""
    for name in (model.name, *sorted(external_files(proto))):
        yield _beside(name), sha256_file(model.parent / name)
    yield from ((library.path, library.known()) for library in options.libraries)


def _dynamic_inputs(proto: ModelProto) -> set[str]:
    held = {i.name for i in proto.graph.initializer}
    inputs = (v for v in proto.graph.input if v.name not in held)
    return {v.name for v in inputs if any(not d.HasField("dim_value") for d in v.type.tensor_type.shape.dim)}


def _branch(command: Command) -> str:
    """The line of a tool, or why it cannot build this."""
    if not command.lacking:
        return f"    {_line(command.arguments)}"
    what = f"{command.arguments[0]} has no option for {', '.join(command.lacking)}: build with another tool."
    return f"    fail 2 {shlex.quote(what)}"


def _line(arguments: Sequence[str]) -> str:
    """A command line of the shell; the script's own variables stay variables."""
    return " ".join(f'"{a}"' if isinstance(a, _Variable) else shlex.quote(a) for a in arguments)


def _beside(name: str) -> str:
    """A file beside the script, never taken for an option."""
    return f"./{name}"


def _loaded(library: str) -> str:
    """A library's path; one without a folder is beside the script, where no loader looks unless it is told."""
    return library if "/" in library else _beside(library)


def _comment(name: str) -> str:
    """A name in a comment, which a line end would leave."""
    return " ".join(name.split())
