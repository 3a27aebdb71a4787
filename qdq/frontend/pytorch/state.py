"""A module while it is exported: in eval mode, on its device, and as it was before when that is over.

module -> `unwrapped` -> `at_rest`. Must not copy weights, but for a module in BF16.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from qdq.core.errors import InputError
from qdq.frontend.pytorch.libraries import quiet, torch_here


def unwrapped(module: Any, label: str) -> Any:
    """The module that was wrapped for several devices or compiled.

    Raises:
        InputError: it is no module, or its weights are on no device or not made yet.
    """
    torch = torch_here()
    if not isinstance(module, torch.nn.Module):
        raise InputError(
            f"{label} is a {type(module).__name__}; a torch.nn.Module or a torch.export.ExportedProgram is needed. "
            "Load a checkpoint into its module first: module.load_state_dict(...)."
        )
    while True:
        inner = getattr(module, "_orig_mod", None)  # of torch.compile
        if inner is None and type(module).__name__ in ("DataParallel", "DistributedDataParallel"):
            inner = module.module
        if inner is None:
            break
        module = inner
    if any(torch.nn.parameter.is_lazy(p) for p in (*module.parameters(), *module.buffers())):
        raise InputError(
            f"{label} has lazy layers, whose weights are made when they first run, of random numbers. Run it once, and "
            "load its checkpoint."
        )
    if any(p.is_meta for p in (*module.parameters(), *module.buffers())):
        raise InputError(f"{label} has weights on the device meta, which hold no values. Load its checkpoint first.")
    return module


def in_fp32(module: Any) -> tuple[Any, list[str]]:
    """The module, or of one in BF16, which ONNX Runtime hardly computes on a CPU, a copy in FP32, with a note."""
    torch = torch_here()
    if not any(p.dtype == torch.bfloat16 for p in (*module.parameters(), *module.buffers())):
        return module, []
    return copy.deepcopy(module).float(), ["The module is in BF16: the file holds the same weights in FP32."]


@contextmanager
def at_rest(module: Any) -> Iterator[list[str]]:
    """In eval mode and without gradients; gives notes. After that modes, buffers and random numbers are as before."""
    torch = torch_here()
    modes = [(part, part.training) for part in module.modules()]
    kept = [(buffer, buffer.detach().clone(), buffer._version) for buffer in module.buffers()]
    held = [(part, dict(part._buffers)) for part in module.modules() if hasattr(part, "_buffers")]
    notes = ["The module was in training mode: it is exported in eval mode."] if module.training else []
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng(devices=[]), quiet():
        torch.backends.mha.set_fastpath_enabled(False)  # one operator that no exporter knows
        try:
            with suppress(NotImplementedError):  # of a module that was captured: it has no modes
                module.eval()
            with torch.no_grad():
                yield notes
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for part, mode in modes:
                part.training = mode
            for part, buffers in held:  # a forward may put other tensors in their places
                if isinstance(part._buffers, dict):
                    part._buffers.update(buffers)
            with torch.no_grad():
                for buffer, before, version in kept:
                    if buffer._version != version:
                        buffer.copy_(before)


def placed(module: Any, tensors: Sequence[Any]) -> tuple[Any, ...]:
    """The tensors on the module's device; floats in the type of its weights, as a Linear or Conv wants them."""
    torch = torch_here()
    weights = [*module.parameters(), *module.buffers()]
    device = weights[0].device if weights else None
    kind = next((w.dtype for w in weights if w.is_floating_point()), torch.float32)
    return tuple(
        t.to(device=device or t.device, dtype=kind if t.is_floating_point() else t.dtype).contiguous() for t in tensors
    )
