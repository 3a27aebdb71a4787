"""Sizes that stay open: which are the batch, examples that show them, and their names in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnx import ModelProto

from qdq.frontend.pytorch.libraries import torch_here

Axes = Sequence[Mapping[int, str]]
"""Of each input: axis -> name of its open size."""

BATCH = "batch"


def batch_axes(tensors: Sequence[Any]) -> Axes:
    """The first axis of every tensor that has as many rows as the first one that has axes."""
    rows = next((t.shape[0] for t in tensors if t.ndim), 0)
    return tuple({0: BATCH} if rows and t.ndim and t.shape[0] == rows else {} for t in tensors)


def widened(tensors: Sequence[Any], axes: Axes) -> tuple[Any, ...]:
    """The tensors with at least 2 along every open axis: torch.export takes a size of 1 for one that never changes.

    They are new objects, for torch.export leaves marks on them.
    """
    made = []
    for tensor, each in zip((t.detach() for t in tensors), axes, strict=True):
        for axis in each:
            if tensor.shape[axis] == 1:
                tensor = torch_here().cat([tensor, tensor], axis)
        made.append(tensor)
    return tuple(made)


def batch_of(tensors: Sequence[Any], axes: Axes) -> int | None:
    """Rows of the tensors whose first axis is the open batch; None where there are none."""
    return next((t.shape[0] for t, each in zip(tensors, axes, strict=True) if _in_batch(t, each)), None)


def of_batch(tensors: Sequence[Any], axes: Axes, size: int) -> tuple[Any, ...]:
    """The tensors with `size` rows where the first axis is the open batch."""
    torch = torch_here()
    return tuple(
        t[torch.arange(size, device=t.device) % t.shape[0]] if _in_batch(t, each) else t
        for t, each in zip(tensors, axes, strict=True)
    )


def _in_batch(tensor: Any, axes: Mapping[int, str]) -> bool:
    return axes.get(0) == BATCH and tensor.shape[0] > 0


def mirrored(tensors: Sequence[Any]) -> tuple[Any, ...]:
    """The tensors with all axes backwards: other values, of the same kind."""
    return tuple(t.flip(*range(t.ndim)) for t in tensors)


def named_axes(proto: ModelProto) -> dict[str, dict[int, str]]:
    """Input name -> axis -> name, of the sizes that a file leaves open."""
    found = {}
    for info in proto.graph.input:
        dims = info.type.tensor_type.shape.dim
        if names := {axis: dim.dim_param for axis, dim in enumerate(dims) if dim.dim_param}:
            found[info.name] = names
    return found
