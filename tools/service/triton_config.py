"""A model of Triton Inference Server from what `qdq deploy` wrote: config.pbtxt, and the file it names.

    python tools/service/triton_config.py build/ -o model_repository/unet

folder, verified -> platform, inputs, outputs, batching -> NAME/config.pbtxt and NAME/1/model.plan or model.onnx.
An engine of TensorRT becomes tensorrt_plan; Triton has no backend for those of TensorRT-RTX, so that their Q/DQ model
becomes onnxruntime_onnx. Triton runs the network on arrays: what an image becomes before and after is for the client.

Source: Triton Inference Server, docs/user_guide/model_configuration.md: batching needs every input and output to have
the batch as its first axis, which `dims` then leaves out; no `dims` may be empty.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import onnx

from engines.backends.compiler import ShapeRange
from engines.core.errors import EngineError
from engines.core.files import Scratch
from engines.verify.covered import Covered
from engines.verify.manifest import data_files

TYPES = {
    onnx.TensorProto.BOOL: "TYPE_BOOL",
    onnx.TensorProto.UINT8: "TYPE_UINT8",
    onnx.TensorProto.UINT16: "TYPE_UINT16",
    onnx.TensorProto.UINT32: "TYPE_UINT32",
    onnx.TensorProto.UINT64: "TYPE_UINT64",
    onnx.TensorProto.INT8: "TYPE_INT8",
    onnx.TensorProto.INT16: "TYPE_INT16",
    onnx.TensorProto.INT32: "TYPE_INT32",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.DOUBLE: "TYPE_FP64",
    onnx.TensorProto.BFLOAT16: "TYPE_BF16",
}
# Triton's own table: what each platform takes.
LACKING = {
    "tensorrt_plan": {"TYPE_UINT16", "TYPE_UINT32", "TYPE_UINT64", "TYPE_INT16", "TYPE_FP64"},
    "onnxruntime_onnx": {"TYPE_BF16"},
}
MAX_BATCH = 8  # of a model whose batch is open, if nobody says


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """An input or an output: -1 where a size is open."""

    name: str
    kind: str
    shape: tuple[int, ...]


def config(
    name: str,
    platform: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    *,
    max_batch: int,
    delay_us: int = 100,
) -> str:
    """The text of config.pbtxt.

    Args:
        name: of the model, which is that of its folder.
        platform: tensorrt_plan or onnxruntime_onnx.
        inputs: with all their axes.
        outputs: with all their axes.
        max_batch: 0 where the first axis of all of them is no open batch.
        delay_us: that a request waits for others, at most.

    Raises:
        EngineError: a type that the platform does not take.
    """
    for tensor in (*inputs, *outputs):
        if tensor.kind in LACKING[platform]:
            raise EngineError(f"{tensor.name} is {tensor.kind}, which Triton's {platform} does not take.")
    lines = [f"name: {json.dumps(name)}", f'platform: "{platform}"', f"max_batch_size: {max_batch}"]
    for what, tensors in (("input", inputs), ("output", outputs)):
        lines += [f"{what} [", ",\n".join(_tensor(tensor, batched=max_batch > 0) for tensor in tensors), "]"]
    if max_batch > 1:
        preferred = sorted({max_batch, max(max_batch // 2, 1)})
        lines += [
            "dynamic_batching {",
            f"  preferred_batch_size: [ {', '.join(map(str, preferred))} ]",
            f"  max_queue_delay_microseconds: {delay_us}",
            "}",
        ]
    return "\n".join(lines) + "\n"


def _tensor(tensor: Tensor, *, batched: bool) -> str:
    dims = tensor.shape[batched:]
    lines = [f"    name: {json.dumps(tensor.name)}", f"    data_type: {tensor.kind}"]
    lines.append(f"    dims: [ {', '.join(map(str, dims or (1,)))} ]")
    if not dims:
        lines.append("    reshape: { shape: [ ] }")
    return "  {\n" + "\n".join(lines) + "\n  }"


def repository(path: Path, out: Path, *, max_batch: int | None = None, delay_us: int = 100) -> str:
    """Write a model's folder; returns what there is to know of it, one sentence.

    Args:
        path: what `qdq deploy` wrote, as `engines.open` takes it.
        out: the model's folder, which must not exist; its name is the model's.
        max_batch: None takes that of the engine, else `MAX_BATCH`.
        delay_us: as of `config`.

    Raises:
        EngineError: a file is another than its manifest says, or `out` exists, or the batch is not possible.
    """
    if out.exists():
        raise EngineError(f"{out} exists: give a folder that does not.")
    held = Covered.of(path)
    held.verify()
    model = held.model(None)
    plan = bool(held.engine) and held.layers().backend == "trt"
    inputs, outputs = tensors_of(model.proto)
    ranges = _profiles(held) if plan else []
    able = _batches([*inputs, *outputs], ranges)
    if max_batch is not None and not 0 <= max_batch <= able:
        raise EngineError(f"--max-batch is {max_batch}; from 0 to {able} is possible here.")
    batch = (min(able, MAX_BATCH) if not plan else able) if max_batch is None else max_batch
    platform = "tensorrt_plan" if plan else "onnxruntime_onnx"
    text = config(out.name, platform, inputs, outputs, max_batch=batch, delay_us=delay_us)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with Scratch(out.absolute().parent) as folder:
        place = folder / out.name / "1"
        place.mkdir(parents=True)
        (place.parent / "config.pbtxt").write_text(text)
        if plan:
            (place / "model.plan").write_bytes(held.read(held.engine))
        else:
            (place / "model.onnx").write_bytes(model.proto.SerializeToString())
            for location, file in data_files(held.folder / model.name, model.proto).items():
                (place / location).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place / location)
        place.parent.rename(out)
    why = "" if plan or not held.engine else f"; Triton has no backend for {held.engine}, an engine of TensorRT-RTX"
    return f"{out.name}: {platform}, max_batch_size {batch}{why}"


def tensors_of(model: onnx.ModelProto) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs of a model.

    Raises:
        EngineError: one is no tensor, or of a type or an unknown rank that no configuration can name.
    """
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [_read(value) for value in model.graph.input if value.name not in stored]
    return inputs, [_read(value) for value in model.graph.output]


def _read(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    if kind.elem_type not in TYPES or not kind.HasField("shape"):
        raise EngineError(f"{value.name} is no tensor of a known rank and of a type that Triton has.")
    sizes = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
    return Tensor(name=value.name, kind=TYPES[kind.elem_type], shape=sizes)


def _profiles(held: Covered) -> list[Mapping[str, ShapeRange]]:
    """The shapes of each optimization profile of an engine."""
    shapes, options = held.shapes(), held.manifest.options if held.manifest else {}
    some = msgspec.json.decode(str(options.get("tensorrt.profiles", "[]")))
    return [{**shapes, **{n: ShapeRange.parse(text) for n, text in own.items()}} for own in some] or [shapes]


def _batches(tensors: Sequence[Tensor], profiles: Sequence[Mapping[str, ShapeRange]]) -> int:
    """The largest batch that one profile takes from 1 on; 0 where the first axes are no open batch."""
    if any(not tensor.shape or tensor.shape[0] != -1 for tensor in tensors):
        return 0
    if not profiles:
        return 4096
    found = [0]
    for profile in profiles:
        known = [profile[t.name] for t in tensors if t.name in profile]
        if known and all(shape.min[0] <= 1 for shape in known):
            found.append(min(shape.max[0] for shape in known))
    return max(found)


def main() -> None:
    """Write a model's folder from the command line."""
    parser = argparse.ArgumentParser(description="A model of Triton Inference Server from what qdq deploy wrote.")
    parser.add_argument("path", type=Path, help="folder of qdq deploy, an engine, or a Q/DQ model")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the model's folder; its name is the model's")
    parser.add_argument("--max-batch", type=int, help=f"default: the engine's, else {MAX_BATCH}; 0 for no batching")
    parser.add_argument("--delay-us", type=int, default=100, help="that a request waits for others (default 100)")
    given = parser.parse_args()
    try:
        print(repository(given.path, given.out, max_batch=given.max_batch, delay_us=max(given.delay_us, 0)))
    except (EngineError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
