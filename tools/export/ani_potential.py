"""A molecular potential like ANI (Smith et al. 2017, doi:10.1039/C6SC05720A): energy in Hartree, forces in Hartree/A.

    python tools/export/ani_potential.py ani.onnx [--checkpoint weights.pt] [--samples FOLDER]

Atomic environment vectors (radial and angular symmetry functions) of a molecule whose elements are fixed, then one
perceptron with CELU for each element, summed; fresh weights without a checkpoint. Input: positions (atoms, 3) in A.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import BadInput, Kind, Rng, Sample, library, main
from forces import Energies, with_forces

ELEMENTS = "HCNO"
# Ethanol, in A.
MOLECULE = (
    ("C", (1.165, -0.403, 0.000)),
    ("C", (0.000, 0.553, 0.000)),
    ("O", (-1.190, -0.199, 0.000)),
    ("H", (-1.943, 0.398, 0.000)),
    ("H", (2.109, 0.152, 0.000)),
    ("H", (1.126, -1.045, 0.885)),
    ("H", (1.126, -1.045, -0.885)),
    ("H", (0.051, 1.197, 0.888)),
    ("H", (0.051, 1.197, -0.888)),
)
RADIAL, ANGULAR = 5.2, 3.5  # A: where the symmetry functions end
SHIFTS, WIDTH = np.linspace(0.9, 4.9, 16), 16.0
PAIR_SHIFTS, PAIR_WIDTH, ANGLES, SHARPNESS = np.linspace(0.9, 2.85, 4), 8.0, (np.arange(8) + 0.5) * math.pi / 8, 32


def draw(rng: Rng, given: argparse.Namespace) -> Sample:
    """The molecule, rattled."""
    places = np.array([place for _, place in MOLECULE])
    return {"positions": (places + rng.normal(0, given.rattle, places.shape)).astype(np.float32)}


def read(path: Path, rng: Rng, given: argparse.Namespace) -> Iterator[Sample]:
    """Frames of an XYZ file with the molecule's elements, in their order."""
    lines, count = path.read_text(encoding="utf-8").splitlines(), len(MOLECULE)
    for start in range(0, len(lines) - count - 1, count + 2):
        rows = [line.split()[:4] for line in lines[start + 2 : start + 2 + count]]
        if [row[0] for row in rows] != [name for name, _ in MOLECULE]:
            raise BadInput(f"{path}: line {start + 3}: the atoms are not {' '.join(name for name, _ in MOLECULE)}")
        yield {"positions": np.array([row[1:] for row in rows], np.float32)}


KIND = Kind(
    options={"rattle": 0.05},
    draw=draw,
    drawn="ethanol, rattled",
    source=("frames", "XYZ file of the molecule in other places"),
    read=read,
)


def build(widths: tuple[int, ...] = (160, 128, 96)) -> Any:
    """The energy; `widths` are those of the perceptrons' hidden layers."""
    torch = library("torch")
    kinds = [ELEMENTS.index(name) for name, _ in MOLECULE]
    there = sorted(set(kinds))
    count = len(kinds)
    others = torch.tensor([[j for j in range(count) if j != i] for i in range(count)])
    pairs = torch.triu_indices(count - 1, count - 1, 1)
    belongs = torch.tensor([[there.index(kinds[j]) for j in row] for row in others.tolist()])
    radial_of = torch.nn.functional.one_hot(belongs, len(there)).float()  # (atoms, neighbours, elements)
    low, high = (torch.sort(belongs[:, pairs].transpose(1, 2), dim=2).values[..., k] for k in (0, 1))
    angular_of = torch.nn.functional.one_hot(low * len(there) + high, len(there) ** 2).float()
    inputs = len(there) * len(SHIFTS) + len(there) ** 2 * len(PAIR_SHIFTS) * len(ANGLES)

    def perceptron() -> Any:
        sizes = (inputs, *widths, 1)
        layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        steps = [step for layer in layers[:-1] for step in (layer, torch.nn.CELU(0.1))]
        return torch.nn.Sequential(*steps, layers[-1])

    def cutoff(distance: Any, end: float) -> Any:
        return torch.where(distance < end, 0.5 * torch.cos(distance * (math.pi / end)) + 0.5, 0.0)

    def column(values: np.ndarray) -> Any:
        return torch.from_numpy(np.asarray(values, np.float32))

    class Energy(torch.nn.Module):
        """Environment vectors and perceptrons."""

        def __init__(self) -> None:
            super().__init__()
            self.networks = torch.nn.ModuleDict({ELEMENTS[kind]: perceptron() for kind in there})

        def forward(self, positions: Any) -> Energies:
            """The energy, twice."""
            apart = positions[others] - positions[:, None]
            length = (apart * apart).sum(-1).sqrt()
            vectors = torch.cat([self.radial(length), self.angular(apart, length)], dim=1)
            rows = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in there}
            energy = sum(self.networks[ELEMENTS[kind]](vectors[rows[kind]]).sum() for kind in there)
            return energy, energy

        def radial(self, length: Any) -> Any:
            """(atoms, elements x shifts)"""
            terms = 0.25 * torch.exp(-WIDTH * (length[..., None] - column(SHIFTS)) ** 2)
            terms = terms * cutoff(length, RADIAL)[..., None]
            return (radial_of[..., None] * terms[:, :, None]).sum(1).flatten(1)

        def angular(self, apart: Any, length: Any) -> Any:
            """(atoms, pairs of elements x shifts x angles)"""
            first, second = (length[:, pairs[k]] for k in (0, 1))
            dots = (apart[:, pairs[0]] * apart[:, pairs[1]]).sum(-1)
            angle = torch.acos(0.95 * dots / (first * second))  # the derivative of acos stays finite
            near = torch.exp(-PAIR_WIDTH * (((first + second) / 2)[..., None] - column(PAIR_SHIFTS)) ** 2)
            turned = ((1 + torch.cos(angle[..., None] - column(ANGLES))) / 2) ** SHARPNESS
            terms = 2 * (near[..., :, None] * turned[..., None, :]).flatten(2)
            terms = terms * (cutoff(first, ANGULAR) * cutoff(second, ANGULAR))[..., None]
            return (angular_of[..., None] * terms[:, :, None]).sum(1).flatten(1)

    return Energy()


if __name__ == "__main__":
    raise SystemExit(main(build, KIND, with_forces))
