"""Crystals to try a potential on: a few structure types with lattice constants in A, rattled and strained.

name -> `crystal` (pymatgen) -> `disturbed`: another cell and other places, from a generator.
Source of the constants: R. W. G. Wyckoff, Crystal Structures, rounded; LiMnO2 (Pmmn) as in Materials Project mp-18767.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Place = tuple[str, tuple[float, float, float]]

_FCC = ((0.0, 0.0, 0.0), (0.0, 0.5, 0.5), (0.5, 0.0, 0.5), (0.5, 0.5, 0.0))


def _on_fcc(*kinds: tuple[str, float]) -> list[Place]:
    """One element at each place of a face-centred lattice, and others moved along the diagonal."""
    return [(name, (x + by, y + by, z + by)) for name, by in kinds for x, y, z in _FCC]


def _perovskite(large: str, small: str, anion: str) -> list[Place]:
    faces = ((0.5, 0.5, 0.0), (0.5, 0.0, 0.5), (0.0, 0.5, 0.5))
    return [(large, (0.0, 0.0, 0.0)), (small, (0.5, 0.5, 0.5)), *((anion, place) for place in faces)]


_LIMNO2: list[Place] = [
    ("Li", (0.5, 0.5, 0.380)),
    ("Li", (0.0, 0.0, 0.620)),
    ("Mn", (0.5, 0.5, 0.863)),
    ("Mn", (0.0, 0.0, 0.137)),
    ("O", (0.5, 0.0, 0.361)),
    ("O", (0.0, 0.5, 0.099)),
    ("O", (0.5, 0.0, 0.901)),
    ("O", (0.0, 0.5, 0.639)),
]
_RUTILE = ((0.305, 0.305, 0.0), (0.695, 0.695, 0.0), (0.195, 0.805, 0.5), (0.805, 0.195, 0.5))
_TIO2: list[Place] = [("Ti", (0, 0, 0)), ("Ti", (0.5, 0.5, 0.5)), *(("O", place) for place in _RUTILE)]

# name -> lattice constants a, b, c of a right-angled cell, how often it is repeated, places
CRYSTALS: dict[str, tuple[tuple[float, float, float], tuple[int, int, int], list[Place]]] = {
    "LiMnO2": ((2.87, 4.63, 5.83), (2, 1, 1), _LIMNO2),
    "NaCl": ((5.64, 5.64, 5.64), (1, 1, 1), _on_fcc(("Na", 0.0), ("Cl", 0.5))),
    "Si": ((5.43, 5.43, 5.43), (1, 1, 1), _on_fcc(("Si", 0.0), ("Si", 0.25))),
    "SrTiO3": ((3.905, 3.905, 3.905), (2, 1, 1), _perovskite("Sr", "Ti", "O")),
    "MgO": ((4.21, 4.21, 4.21), (1, 1, 1), _on_fcc(("Mg", 0.0), ("O", 0.5))),
    "TiO2": ((4.59, 4.59, 2.96), (1, 1, 2), _TIO2),
    "CaF2": ((5.46, 5.46, 5.46), (1, 1, 1), _on_fcc(("Ca", 0.0), ("F", 0.25), ("F", 0.75))),
    "GaAs": ((5.65, 5.65, 5.65), (1, 1, 1), _on_fcc(("Ga", 0.0), ("As", 0.25))),
    "LiF": ((4.03, 4.03, 4.03), (1, 1, 1), _on_fcc(("Li", 0.0), ("F", 0.5))),
    "BaTiO3": ((4.00, 4.00, 4.00), (1, 2, 1), _perovskite("Ba", "Ti", "O")),
    "ZnS": ((5.41, 5.41, 5.41), (1, 1, 1), _on_fcc(("Zn", 0.0), ("S", 0.25))),
    "MnO": ((4.44, 4.44, 4.44), (1, 1, 1), _on_fcc(("Mn", 0.0), ("O", 0.5))),
}


def crystal(name: str) -> Any:
    """A pymatgen structure of the list.

    Raises:
        SystemExit: it is not in the list.
    """
    from pymatgen.core import Lattice, Structure

    if name not in CRYSTALS:
        raise SystemExit(f"Error: no crystal {name!r}: choose of {', '.join(CRYSTALS)}")
    sizes, repeated, places = CRYSTALS[name]
    made = Structure(Lattice.orthorhombic(*sizes), [p[0] for p in places], [p[1] for p in places])
    return made * repeated


def disturbed(structure: Any, rng: np.random.Generator, *, rattle: float, strain: float) -> Any:
    """The structure with another cell and other places.

    Args:
        rattle: standard deviation of each coordinate, in A.
        strain: largest part by which the cell is stretched or sheared.
    """
    made = structure.copy()
    cell = np.eye(3) + rng.uniform(-strain, strain, (3, 3))
    lattice = type(made.lattice)(made.lattice.matrix @ (cell + cell.T) / 2)
    places = made.frac_coords + lattice.get_fractional_coords(rng.normal(0, rattle, made.frac_coords.shape))
    return type(made)(lattice, made.species, places)
