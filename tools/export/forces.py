"""Energy and forces in one graph: the gradient of an energy, traced into a module that an exporter takes.

    energy(positions, *others) -> `with_forces` -> a module of (energy, forces), whose operators are plain ones

PyTorch's exporters refuse `torch.autograd.grad`; `make_fx` writes down what it runs. Sizes that are open stay open,
where the example's sizes differ from each other and from those inside the network: equal ones become one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

Energies = tuple[Any, Any]  # what forces are the gradient of; and what is shown, as per atom. Both are scalars


def with_forces(energy: Any, example: tuple[Any, ...]) -> Any:
    """A module that gives the energy to be shown, (1,), and the forces, (atoms, 3), as `energy` and `forces`.

    Args:
        energy: torch.nn.Module of (positions, ...), (atoms, 3) float32 and more tensors, to `Energies`.
        example: its inputs.
    """
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    def both(positions: Any, *others: Any) -> dict[str, Any]:
        at = positions.detach().requires_grad_(True)
        found, shown = energy(at, *others)
        (gradient,) = torch.autograd.grad(found, at)
        return {"energy": shown.detach().reshape(1), "forces": -gradient}

    for weight in energy.parameters():
        weight.requires_grad_(False)
    made = make_fx(both, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*example)
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


def name_products(path: Path, names: Mapping[str, str]) -> int:
    """Name the products with weights after these, so that a pattern can choose forward or backward ones; how many.

    A product that reads a weight as it was trained is `/layer/MatMul`; one that reads it the other way round, as the
    gradient does, `/gradient/layer/MatMul`.

    Args:
        path: of an ONNX file, which is written again.
        names: weight -> name of its layer in the network.
    """
    model = onnx.load(str(path))
    counted: Counter[str] = Counter()
    turned = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Transpose"}
    for node in model.graph.node:
        if node.op_type not in ("Gemm", "MatMul"):
            continue
        source = turned.get(node.input[1], node.input[1])
        if source not in names:
            continue
        transposed = (node.input[1] in turned) != any(a.name == "transB" and a.i for a in node.attribute)
        name = f"{'' if transposed else '/gradient'}/{names[source].replace('.', '/')}/{node.op_type}"
        counted[name] += 1
        node.name = name if counted[name] == 1 else f"{name}_{counted[name]}"
    onnx.save(model, str(path))
    return sum(counted.values())


def largest(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference."""
    return float(np.abs(found.astype(np.float64) - expected).max(initial=0.0))
