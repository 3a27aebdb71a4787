"""A flat module into an ONNX file, by one of torch's two exporters.

flat module, tensors -> `program` (torch.export) -> `require_fixed_values` -> `write_program`
flat module, tensors -> `write_traced` (TorchScript)
Must not decide which, nor name or check anything.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx

from engines.core.nodes import all_nodes
from qdq.core.errors import InputError
from qdq.frontend.pytorch.axes import Axes
from qdq.frontend.pytorch.flat import INNER
from qdq.frontend.pytorch.libraries import torch_here
from qdq.frontend.pytorch.refused import in_user_code, is_users

# Operators of torch that give other values each time; dropout and others are looked at with their arguments.
_RANDOM = re.compile(r"^aten\.(rand|randn|randint|randperm|bernoulli|multinomial|normal|poisson|exponential)\b")
_RANDOM_LIKE = re.compile(r"^aten\.(rand|randn|randint)_like|^aten\.(uniform|normal|bernoulli|exponential|random)_?\.")
_DROPOUT = re.compile(r"^aten\.(native_dropout|(alpha_|feature_|feature_alpha_)?dropout_?)\b")
_STATISTICS = re.compile(
    r"^aten\.(batch_norm|_native_batch_norm_legit(_functional)?|cudnn_batch_norm|native_batch_norm)\b"
)


def program(flat: Any, tensors: Sequence[Any], axes: Axes) -> Any:
    """The ExportedProgram of a flat module; raises whatever torch raises."""
    torch = torch_here()
    open_ = torch.export.Dim.DYNAMIC
    shapes = {"inputs": tuple({axis: open_ for axis in each} or None for each in axes)}
    return torch.export.export(flat, tuple(tensors), dynamic_shapes=shapes if any(axes) else None, strict=False)


def has_constant_outputs(captured: Any) -> bool:
    """Whether an ExportedProgram returns what no node computes, as numbers and weights, which torch cannot write."""
    made = {node.name for node in captured.graph.nodes if node.op != "placeholder"}
    return any(getattr(spec.arg, "name", "") not in made for spec in captured.graph_signature.output_specs)


def open_axes(captured: Any) -> list[list[int]]:
    """The axes that an ExportedProgram leaves open, of each tensor that it takes."""
    mine = set(captured.graph_signature.user_inputs)
    values = [node.meta.get("val") for node in captured.graph.nodes if node.op == "placeholder" and node.name in mine]
    return [
        [axis for axis, size in enumerate(value.shape) if not isinstance(size, int)]
        for value in values
        if hasattr(value, "shape")
    ]


def require_fixed_values(captured: Any, label: str) -> None:
    """Refuse a program that computes other values each time, or with statistics of the batch it gets.

    Raises:
        InputError: dropout is on, random numbers are drawn, or a normalization uses the batch's own statistics.
    """
    for node in captured.graph.nodes:
        if node.op != "call_function":
            continue
        what, fix = _fault(str(node.target), node)
        if what:
            place = " ".join(filter(None, (_module_of(node), in_user_code(node.meta.get("stack_trace") or ""))))
            raise InputError(f"Cannot export {label}: {what}{f' ({place})' if place else ''}. {fix}")


def _fault(target: str, node: Any) -> tuple[str, str]:
    """What is wrong with an operator, and how to mend it; "" where nothing is."""
    if _DROPOUT.match(target) and len(node.args) > 2 and node.args[2]:
        return (
            "dropout is left on in eval mode",
            "Use torch.nn.Dropout, or pass training=self.training to torch.nn.functional.dropout.",
        )
    if "scaled_dot_product_attention" in target:
        rate = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
        if rate:
            return (
                f"its attention drops {rate:g} of the weights in eval mode",
                "Pass dropout_p=self.rate if self.training else 0.0 to scaled_dot_product_attention.",
            )
    if _RANDOM.match(target) or _RANDOM_LIKE.match(target):
        return (
            f"it draws random numbers ({target.split('.')[1]}) in eval mode, so its outputs are others each time",
            "Make them an input of forward, or draw none in eval mode.",
        )
    if _STATISTICS.match(target) and _by_batch(target, node.args):
        return (
            "a BatchNorm normalizes with the statistics of the batch that it gets, not with those of training",
            "Give it track_running_stats=True and trained statistics, and let eval() reach it.",
        )
    return "", ""


def _by_batch(target: str, args: Sequence[Any]) -> bool:
    """Whether a batch normalization is in training mode; one without a mode has no statistics of its own."""
    flags = [value for value in args if isinstance(value, bool)]
    return "no_training" not in target and (not flags or flags[0])


def _module_of(node: Any) -> str:
    """The path of the module that a node belongs to, in quotation marks; "" for the whole."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    path = path.removeprefix("L['self'].").removeprefix(INNER).lstrip(".")
    return f"in {path!r}" if path else ""


def write_program(
    captured: Any, path: Path, inputs: Sequence[str], outputs: Sequence[str], opset: int, external: bool
) -> None:
    """Write a program; raises whatever torch raises."""
    torch = torch_here()
    made = torch.onnx.export(
        captured,
        dynamo=True,
        opset_version=opset,
        input_names=list(inputs),
        output_names=list(outputs),
        verbose=False,
    )
    made.save(str(path), external_data=external)


def write_traced(
    flat: Any, tensors: Sequence[Any], path: Path, inputs: Sequence[str], outputs: Sequence[str], axes: Axes, opset: int
) -> Iterator[str]:
    """Write what the example's own way through the module is; gives notes. Raises whatever torch raises."""
    torch = torch_here()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.onnx.export(
            flat,
            tuple(tensors),
            str(path),
            dynamo=False,
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={name: dict(each) for name, each in zip(inputs, axes, strict=True) if each},
        )
    baked = [w for w in said if "to a Python boolean" in str(w.message) and is_users(w.filename)]
    if baked:
        places = sorted({f"{Path(w.filename).name} line {w.lineno}" for w in baked})
        yield (
            f"The file has the branches that the example took, at {', '.join(places[:4])}: where a value decides them, "
            "other samples may take others."
        )


def require_fixed_file(file: Path, label: str) -> None:
    """Refuse a traced file that draws random numbers or is in training mode.

    Raises:
        InputError: says which node.
    """
    graph = onnx.load(str(file), load_external_data=False).graph
    for node in all_nodes(graph):
        training = any(a.name == "training_mode" and a.i for a in node.attribute)
        dropped = node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]
        if node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial") or training or dropped:
            raise InputError(
                f"Cannot export {label}: in eval mode it still computes a {node.op_type} ({node.name}) that gives "
                "other values each time, or takes statistics of its batch. Draw no random numbers and use the trained "
                "statistics in eval mode."
            )
