"""Molecular dynamics at constant energy with a potential's float and quantized forces: does the energy stay?

Usage: md_stability.py FLOAT.onnx [QUANTIZED.onnx ...] [--structure NAME|FILE] [--steps N] [--png rdf.png]

The files are of tools/export/chgnet_potential.py (crystals by name, or files that pymatgen reads) or ani_potential.py.
Velocity Verlet from the same random velocities; each file computed in its own arithmetic, in FP16 where that says so.
Prints for each: drift of the total energy (the slope of a straight line, and between the ends), its scatter around it,
temperature, and how far the radial distribution is from the float model's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "export"))
from results import record

from engines.core import arithmetic, onnx_runtime as ort

ACCELERATION = 9.648533e-3  # of 1 eV/A on 1 dalton, in A/fs^2
BOLTZMANN = 8.617333e-5  # eV/K
HARTREE = 27.211386  # eV
BINS, END = 120, 6.0  # of the radial distribution, A


@dataclass(frozen=True, kw_only=True)
class System:
    """What moves.

    Attributes:
        positions: (atoms, 3), A.
        masses: (atoms, 1), dalton.
        inputs: positions -> inputs of the file.
        unit: eV in one unit of the file's energy.
        per_atom: the file gives the energy per atom.
        volume: of the cell, A^3; that of a sphere for a molecule.
    """

    positions: np.ndarray
    masses: np.ndarray
    inputs: Callable[[np.ndarray], dict[str, np.ndarray]]
    unit: float
    per_atom: bool
    volume: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """What was seen: total energy and temperature after every step, distances' histogram, the first forces."""

    energies: np.ndarray  # (steps + 1,), eV/atom
    temperatures: np.ndarray  # (steps + 1,), K
    distribution: np.ndarray  # (BINS,), g(r)

    def line(self, step_fs: float) -> tuple[float, float]:
        """Slope in meV/atom/ps, and the scatter around it in meV/atom."""
        times = np.arange(len(self.energies)) * step_fs / 1000
        slope, level = np.polyfit(times, 1000 * self.energies, 1)
        return float(slope), float(np.std(1000 * self.energies - (slope * times + level)))


def system(session: Any, structure: str) -> System:
    """The system that a file's inputs fit."""
    names = [i.name for i in session.get_inputs()]
    if names == ["positions"]:
        return _molecule()
    return _crystal(structure)


def _molecule() -> System:
    from ani_potential import MOLECULE

    weights = {"H": 1.008, "C": 12.011, "N": 14.007, "O": 15.999}
    return System(
        positions=np.array([place for _, place in MOLECULE]),
        masses=np.array([[weights[name]] for name, _ in MOLECULE]),
        inputs=lambda positions: {"positions": positions.astype(np.float32)},
        unit=HARTREE,
        per_atom=False,
        volume=4 / 3 * np.pi * END**3,
    )


def _crystal(structure: str) -> System:
    from chgnet_potential import inputs_of
    from crystals import CRYSTALS, crystal
    from pymatgen.core import Structure

    made = crystal(structure) if structure in CRYSTALS else Structure.from_file(structure)

    def inputs(positions: np.ndarray) -> dict[str, np.ndarray]:
        moved = Structure(made.lattice, made.species, positions, coords_are_cartesian=True)
        return {name: np.asarray(value) for name, value in inputs_of(moved).items()}

    return System(
        positions=np.array(made.cart_coords),
        masses=np.array([[float(site.specie.atomic_mass)] for site in made]),
        inputs=inputs,
        unit=1.0,
        per_atom=True,
        volume=float(made.volume),
    )


def velocities(moving: System, temperature: float, rng: np.random.Generator) -> np.ndarray:
    """(atoms, 3) of Maxwell and Boltzmann in A/fs, without drift, at twice the temperature: half becomes potential."""
    scale = np.sqrt(2 * BOLTZMANN * temperature / moving.masses * ACCELERATION)
    drawn = rng.normal(size=moving.positions.shape) * scale
    return drawn - (moving.masses * drawn).sum(0) / moving.masses.sum()


def simulate(session: Any, moving: System, start: np.ndarray, *, steps: int, step_fs: float) -> Run:
    """Velocity Verlet."""
    count, at, speed = len(moving.positions), moving.positions.copy(), start.copy()
    energies, temperatures, counted = [], [], np.zeros(BINS)

    def look() -> tuple[float, np.ndarray]:
        inputs = moving.inputs(at)
        found = next(ort.run(session, [inputs]))
        counted.__iadd__(np.histogram(_distances(inputs), BINS, (0, END))[0])
        energy = float(found["energy"].reshape(-1)[0]) * moving.unit * (count if moving.per_atom else 1)
        return energy, found["forces"].astype(np.float64) * moving.unit

    potential, forces = look()
    for step in range(steps + 1):
        kinetic = float((moving.masses * speed**2).sum() / 2 / ACCELERATION)
        energies.append((potential + kinetic) / count)
        temperatures.append(2 * kinetic / (3 * (count - 1) * BOLTZMANN))
        if step == steps:
            break
        speed = speed + forces / moving.masses * ACCELERATION * step_fs / 2
        at = at + speed * step_fs
        potential, forces = look()
        speed = speed + forces / moving.masses * ACCELERATION * step_fs / 2
    edges = np.linspace(0, END, BINS + 1)
    shells = 4 / 3 * np.pi * (edges[1:] ** 3 - edges[:-1] ** 3)
    distribution = counted / (steps + 1) / count / shells * moving.volume / count
    return Run(energies=np.array(energies), temperatures=np.array(temperatures), distribution=distribution)


def _distances(inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Of all directed pairs that the file sees."""
    at = inputs["positions"]
    if "edges" in inputs:
        first, second = inputs["edges"].T
        return np.linalg.norm(at[first] - at[second] - inputs["offsets"], axis=1)
    apart = np.linalg.norm(at[:, None] - at, axis=2)
    return apart[~np.eye(len(at), dtype=bool)]


def draw(runs: dict[str, Run], step_fs: float, path: Path) -> None:
    """Total energies and radial distributions as a PNG."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, run in runs.items():
        left.plot(np.arange(len(run.energies)) * step_fs, 1000 * (run.energies - run.energies[0]), label=name)
        right.plot((np.arange(BINS) + 0.5) * END / BINS, run.distribution, label=name)
    left.set(xlabel="time, fs", ylabel="total energy less its first value, meV/atom")
    right.set(xlabel="distance, A", ylabel="g(r)")
    left.legend()
    figure.savefig(path, format="png")


def table(runs: dict[str, Run], step_fs: float) -> list[str]:
    """Markdown, the float model first."""
    reference = next(iter(runs.values())).distribution
    rows = [
        "| model | drift, meV/atom/ps | end less start, meV/atom | scatter, meV/atom | temperature, K | g(r) differs |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        slope, scatter = run.line(step_fs)
        ends = 1000 * (run.energies[-1] - run.energies[0])
        apart = float(np.abs(run.distribution - reference).sum() / reference.sum())
        rows.append(
            f"| {name} | {slope:+.3f} | {ends:+.3f} | {scatter:.3f} | {run.temperatures.mean():.0f} | {apart:.2%} |"
        )
    return rows


def main() -> None:
    """Run all files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--structure", default="LiMnO2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--step-fs", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, default=300.0, help="in K")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--png", type=Path, help="draw energies and radial distributions here")
    given = parser.parse_args()
    runs = dict[str, Run]()
    for path in given.models:
        session = arithmetic.session(path)
        moving = system(session, given.structure)
        start = velocities(moving, given.temperature, np.random.default_rng(given.seed))
        runs[path.name] = simulate(session, moving, start, steps=given.steps, step_fs=given.step_fs)
    if given.png:
        draw(runs, given.step_fs, given.png)
    what = given.structure if moving.per_atom else "the molecule"
    print(
        f"{what}, {len(moving.positions)} atoms, {given.temperature:g} K: {given.steps} steps of {given.step_fs:g} fs\n"
    )
    print("\n".join(table(runs, given.step_fs)))


if __name__ == "__main__":
    record(main)
