"""Energy and forces in one graph: the gradient of an energy, traced into a module that an exporter takes.

    energy(positions, *others) -> `with_forces` -> a module of (energy, forces), whose operators are plain ones

PyTorch's exporters refuse `torch.autograd.grad`; `make_fx` writes down what it runs. Sizes that are open stay open,
where the example's sizes differ from each other and from those inside the network: equal ones become one.
"""

from __future__ import annotations

from typing import Any

Energies = tuple[Any, Any]  # what forces are the gradient of; and what is shown, as per atom. Both are scalars


def with_forces(energy: Any, example: tuple[Any, ...]) -> Any:
    """A module that gives the energy to be shown, (1,), and the forces, (atoms, 3), as `energy` and `forces`.

    Args:
        energy: torch.nn.Module of (positions, ...), (atoms, 3) float32 and more tensors, to `Energies`.
        example: its inputs.
    """
    import torch
    from torch._decomp import core_aten_decompositions
    from torch.fx.experimental.proxy_tensor import make_fx

    def both(positions: Any, *others: Any) -> dict[str, Any]:
        at = positions.detach().requires_grad_(True)
        found, shown = energy(at, *others)
        (gradient,) = torch.autograd.grad(found, at)
        return {"energy": shown.detach().reshape(1), "forces": -gradient}

    for weight in energy.parameters():
        weight.requires_grad_(False)
    plain = core_aten_decompositions()  # of derivatives that ONNX has no operator for, as that of SiLU
    made = make_fx(both, plain, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*example)
    _named(made, energy)
    made.graph.eliminate_dead_code()
    made.recompile()
    return made.eval()


def _named(made: Any, energy: Any) -> None:
    """Give the weights of a traced module the names that they have in the network."""
    names = {id(value): name for name, value in (*energy.named_parameters(), *energy.named_buffers())}
    for node in made.graph.find_nodes(op="get_attr"):
        value = getattr(made, node.target)
        if (name := names.get(id(value))) is not None:
            wanted = name.replace(".", "_")
            setattr(made, wanted, value)
            node.target = wanted
