"""CHGNet (Deng et al. 2023, doi:10.1038/s42256-023-00716-3): energy in eV/atom and forces in eV/A, in one graph.

    python tools/export/chgnet_potential.py chgnet.onnx [--samples FOLDER --structures FOLDER --count 32]

Needs `pip install --no-deps chgnet==0.4.2` and pymatgen, ase. The weights are in that package, under its own licence.
The sizes stay open: atoms, edges (directed, within 6 A), bonds (undirected), angles (of two bonds within 3 A).

    positions (atoms, 3), offsets (edges, 3): A; offsets are those of the neighbour's periodic image
    numbers (atoms,): of the elements; edges (edges, 2): atoms; undirected (edges,): bond of each edge
    directed (bonds,): an edge of each bond; angles (angles, 5): atom, bond, edge, bond, edge
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import BadInput, Kind, Rng, Sample, library, main
from crystals import CRYSTALS, crystal, disturbed
from forces import Energies, with_forces

ENERGY, FORCE = 1e-6, 1e-4  # eV/atom and eV/A: how near the file is to the package
OPEN = {
    "positions": {0: "atoms"},
    "numbers": {0: "atoms"},
    "offsets": {0: "edges"},
    "edges": {0: "edges"},
    "undirected": {0: "edges"},
    "directed": {0: "bonds"},
    "angles": {0: "angles"},
}
_CONVERTERS: dict[str, Any] = {}


def inputs_of(structure: Any) -> Sample:
    """The inputs of the file for a pymatgen structure.

    Raises:
        BadInput: no two bonds within 3 A meet, so that there is no angle.
    """
    if "" not in _CONVERTERS:
        _CONVERTERS[""] = library("chgnet.graph").CrystalGraphConverter(atom_graph_cutoff=6, bond_graph_cutoff=3)
    graph = _CONVERTERS[""](structure)
    if not len(graph.bond_graph):
        raise BadInput(f"{structure.formula}: no two bonds within 3 A meet at an atom. Give a denser structure")
    lattice = graph.lattice.detach()
    found = {
        "positions": graph.atom_frac_coord.detach() @ lattice,
        "numbers": graph.atomic_number.long(),
        "offsets": graph.neighbor_image @ lattice,
        "edges": graph.atom_graph.long(),
        "undirected": graph.directed2undirected.long(),
        "directed": graph.undirected2directed.long(),
        "angles": graph.bond_graph.long(),
    }
    return {name: value.numpy() for name, value in found.items()}


def draw(rng: Rng, given: argparse.Namespace) -> Sample:
    """A crystal of the list, the next at each call, rattled and strained."""
    names = given.crystals or list(CRYSTALS)
    name = names[getattr(given, "drawn", 0) % len(names)]
    given.drawn = getattr(given, "drawn", 0) + 1
    return inputs_of(disturbed(crystal(name), rng, rattle=given.rattle, strain=given.strain))


def read(path: Path, rng: Rng, given: argparse.Namespace) -> Iterator[Sample]:
    """Structures of a file or folder, in any form that pymatgen reads (CIF, POSCAR, JSON)."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        yield inputs_of(library("pymatgen.core").Structure.from_file(str(file)))


KIND = Kind(
    options={"crystals": (), "rattle": 0.08, "strain": 0.03},
    draw=draw,
    drawn="crystals of tools/export/crystals.py, rattled and strained",
    source=("structures", "file or folder of structures that pymatgen reads, such as CIF"),
    read=read,
    dynamic=OPEN,
)


def build(version: str = "0.3.0") -> Any:
    """The energy of CHGNet with the package's weights of a version: 0.3.0, 0.2.0 or r2scan."""
    torch = library("torch")
    network = library("chgnet.model").CHGNet.load(model_name=version, use_device="cpu", verbose=False).eval()
    if network.mlp_first is not True or not network.is_intensive:
        raise BadInput(f"CHGNet {version} pools atoms in another way than this script knows: take 0.3.0")

    def summed(rows: Any, owners: Any, like: Any) -> Any:
        return torch.zeros_like(like).index_add(0, owners, rows)

    class Energy(torch.nn.Module):
        """The network on one structure whose edges are given."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(
            self, positions: Any, numbers: Any, offsets: Any, edges: Any, undirected: Any, directed: Any, angles: Any
        ) -> Energies:
            """The energy whose gradient the forces are, and that per atom with the elements' own."""
            vectors = positions[edges[:, 0]] - (positions[edges[:, 1]] + offsets)
            lengths = (vectors * vectors).sum(1).sqrt()
            vectors = vectors / lengths[:, None]
            basis, apart = network.bond_basis_expansion, lengths[directed]
            on_atoms, on_bonds = basis.rbf_expansion_ag(apart), basis.rbf_expansion_bg(apart)
            cosines = (vectors[angles[:, 2]] * vectors[angles[:, 4]]).sum(1)
            cosines = cosines - 1e-6 * cosines  # exporters take a factor of 1 - 1e-6 for 1: no gradient at 180 degrees
            atoms = network.atom_embedding(numbers - 1)
            bonds, corners = network.bond_embedding(on_atoms), network.angle_embedding(self.fourier(cosines.acos()))
            atom_weights, bond_weights = network.bond_weights_ag(on_atoms), network.bond_weights_bg(on_bonds)
            center, neighbor, middle, one, other = edges[:, 0], edges[:, 1], angles[:, 0], angles[:, 1], angles[:, 3]
            for number, layer in enumerate(network.atom_conv_layers):
                read = layer.twoBody_atom(torch.cat([atoms[center], bonds[undirected], atoms[neighbor]], dim=1))
                atoms = layer.mlp_out(summed(read * atom_weights[undirected], center, atoms)) + atoms
                if number == len(network.bond_conv_layers):
                    break
                layer = network.bond_conv_layers[number]
                read = layer.twoBody_bond(torch.cat([bonds[one], bonds[other], corners, atoms[middle]], dim=1))
                read = read * bond_weights[one] * bond_weights[other]
                bonds = layer.mlp_out(summed(read, one, bonds)) + bonds
                layer = network.angle_layers[number]
                read = layer.twoBody_bond(torch.cat([bonds[one], bonds[other], corners, atoms[middle]], dim=1))
                corners = read + corners
            energy = network.mlp(network.readout_norm(atoms)).sum()
            own = network.composition_model.fc.weight[0]  # of each element; summed in the package's order
            shares = (numbers[:, None] == torch.arange(1, len(own) + 1)).to(own.dtype).sum(0) / positions.shape[0]
            return energy, energy / positions.shape[0] + (shares * own).sum()

        def fourier(self, angle: Any) -> Any:
            """The angles' basis, as one concatenation: the package writes into a tensor of zeros."""
            turned = torch.outer(angle, network.angle_basis_expansion.fourier_expansion.frequencies)
            level = torch.full_like(turned[:, :1], 0.5**0.5)
            return torch.cat([level, turned.sin(), turned.cos()], dim=1) / np.sqrt(np.pi)

    return Energy()


def compare(path: Path, samples: int = 6, seed: int = 0) -> tuple[float, float]:
    """Largest differences of the file from the package on fresh structures: energy in eV/atom, forces in eV/A."""
    runtime, rng = library("onnxruntime"), np.random.default_rng(seed)
    network = library("chgnet.model").CHGNet.load(use_device="cpu", verbose=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = np.zeros(2)
    for name in (list(CRYSTALS) * samples)[:samples]:
        structure = disturbed(crystal(name), rng, rattle=0.08, strain=0.03)
        energy, forces = session.run(["energy", "forces"], inputs_of(structure))
        expected = network.predict_structure(structure, task="ef")
        worst = np.maximum(worst, [abs(float(energy[0] - expected["e"])), np.abs(forces - expected["f"]).max()])
    return float(worst[0]), float(worst[1])


if __name__ == "__main__":
    code = main(build, KIND, with_forces, weights="those of the package")
    if code == 0:
        errors = compare(Path(sys.argv[1]))
        print(f"the package's energy within {errors[0]:.1e} eV/atom, its forces within {errors[1]:.1e} eV/A")
        code = int(errors[0] > ENERGY or errors[1] > FORCE)
    raise SystemExit(code)
