"""A module at rest with an example and all names: what is exported, and what PyTorch computes with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qdq.core.errors import InputError
from qdq.frontend.compare import Arrays
from qdq.frontend.exported import Dynamic
from qdq.frontend.pytorch.axes import batch_axes
from qdq.frontend.pytorch.call import Call, named_tensors
from qdq.frontend.pytorch.flat import flat
from qdq.frontend.pytorch.libraries import torch_here
from qdq.frontend.pytorch.refused import Why
from qdq.frontend.pytorch.state import at_rest, placed
from qdq.frontend.sizes import Sizes

LARGE = 1_500_000_000  # bytes of weights that do not go into the ONNX file itself, which ends at 2 GiB
STEADY = 1e-3  # relative, of two runs on the same inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """What a user asked for, as of `export_torch`; `label` is what messages call the module."""

    label: str
    dynamic: Dynamic | bool | None
    opset: int | None
    outputs: tuple[str, ...]
    tolerance: float


class NotExportedError(Exception):
    """One way of several failed."""

    def __init__(self, why: Why) -> None:
        """Why it did."""
        super().__init__(why.says)
        self.why = why


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is exported.

    Attributes:
        module: at rest.
        captured: its ExportedProgram, where that was given.
        call: how it is called.
        tensors: the example, where the module's weights are.
        outputs: names.
        how: what was asked for.
        sizes: in which samples differ.
    """

    module: Any
    captured: Any
    call: Call
    tensors: tuple[Any, ...]
    outputs: tuple[str, ...]
    how: How
    sizes: Sizes = field(default_factory=Sizes)

    @property
    def batch(self) -> Dynamic:
        """Input -> the axis of the batch, of those that have one."""
        return {name: axes for name, axes in zip(self.call.names, batch_axes(self.tensors), strict=True) if axes}

    @property
    def scripted(self) -> bool:
        """Whether TorchScript keeps its control flow."""
        return isinstance(self.module, torch_here().jit.ScriptModule) is True

    @property
    def external(self) -> bool:
        """Whether its weights go beside the file."""
        weights = (*self.module.parameters(), *self.module.buffers())
        return int(sum(w.numel() * w.element_size() for w in {id(w): w for w in weights}.values())) > LARGE

    @property
    def traceable(self) -> Any:
        """What the exporters take: the module called flat; a scripted one as it is, which a trace cannot call."""
        return self.module if self.scripted else flat(self.module, self.call, self.how.label)

    def original(self, sample: Arrays) -> list[np.ndarray]:
        """What PyTorch gives."""
        torch = torch_here()
        given = [torch.from_numpy(np.array(sample[name])) for name in self.call.names]
        args, kwargs = self.call.filled(placed(self.module, given))
        return [_array(t) for _, t in named_tensors(self.module(*args, **kwargs), self.how.label)[0]]

    def steady_outputs(self) -> list[np.ndarray]:
        """What PyTorch gives for the example.

        Raises:
            InputError: its outputs are others at a second run; names the buffers that it changes, if any.
        """
        before = {name: buffer._version for name, buffer in self.module.named_buffers()}
        sample = self.sample(self.tensors)
        first, second = self.original(sample), self.original(sample)
        if all(
            np.allclose(a, b, rtol=STEADY, atol=STEADY * _largest(a), equal_nan=True)
            for a, b in zip(first, second, strict=True)
        ):
            return first
        changed = [name for name, buffer in self.module.named_buffers() if before.get(name) != buffer._version]
        what = (
            f"it changes the buffer{'s' * (len(changed) > 1)} {', '.join(changed[:4])}"
            if changed
            else "it draws random numbers or keeps state"
        )
        raise InputError(
            f"Cannot export {self.how.label}: a second run on the same inputs gives other outputs, for {what}. An ONNX "
            "file computes from its inputs alone: make what changes an input and an output of forward."
        )

    def sample(self, tensors: Sequence[Any]) -> Arrays:
        """Tensors by their names, as arrays."""
        return {name: _array(t) for name, t in zip(self.call.names, tensors, strict=True)}


def _array(tensor: Any) -> np.ndarray:
    torch = torch_here()
    tensor = tensor.detach().cpu()
    found: np.ndarray = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return found


def _largest(values: np.ndarray) -> float:
    finite = np.abs(values[np.isfinite(values)]) if values.dtype.kind == "f" else np.zeros(0)
    return float(finite.max(initial=0.0))


def called_with(module: Any, example: Mapping[str, np.ndarray]) -> None:
    """Run a module at rest on arrays by name; raises whatever it raises."""
    torch = torch_here()
    with at_rest(module):
        names = list(example)
        tensors = placed(module, [torch.from_numpy(np.array(example[name])) for name in names])
        module(**dict(zip(names, tensors, strict=True)))
