"""A module that takes and returns tensors in a row, for the exporters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qdq.frontend.pytorch.call import Call, named_tensors
from qdq.frontend.pytorch.libraries import torch_here

INNER = "module"  # what the wrapped module is called in names of weights and nodes


def flat(module: Any, call: Call, label: str) -> Any:
    """The torch.nn.Module that calls `module` so; its weights are those of the module, not copies."""
    base: Any = torch_here().nn.Module

    class Flat(base):  # type: ignore[misc]  # torch is known at run time only
        def __init__(self) -> None:
            super().__init__()
            self.add_module(INNER, module)

        def forward(self, *inputs: Any) -> tuple[Any, ...]:
            args, kwargs = call.filled(inputs)
            found, _ = named_tensors(getattr(self, INNER)(*args, **kwargs), label)
            weights = (*self.parameters(), *self.buffers())
            return _apart([tensor for _, tensor in found], (*inputs, *weights))

        def train(self, mode: bool = True) -> Any:
            """Stay as it is: a module made of an ExportedProgram has no modes, and the others are in theirs."""
            return self

    made = Flat()
    made.training = False
    return made


def _apart(outputs: Sequence[Any], inputs: Sequence[Any]) -> tuple[Any, ...]:
    """The outputs; one that is an input, a weight or another output, as a copy, for ONNX has a name for each."""
    seen: list[Any] = list(inputs)
    made = []
    for tensor in outputs:
        made.append(tensor.clone() if any(tensor is other for other in seen) else tensor)
        seen.append(tensor)
    return tuple(made)
