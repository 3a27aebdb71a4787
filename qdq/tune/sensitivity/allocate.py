"""Which candidate each group gets: the least error at the outputs within a size, where both are sums over groups.

noise and bytes of each group in each candidate -> mixed-integer program (HiGHS) -> a candidate for each group
It must not run or compile anything: what the sums leave out, `repair` finds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from qdq.core.errors import InputError, MissingRuntimeError

Costs = Sequence[Mapping[str, float]]  # of each group, candidate -> cost
MIB = 1 << 20
PAIRED = 128  # changes of one group, of either kind, that are tried two together


def least_error(noise: Costs, size: Costs, most: float, *, base: float = 0.0) -> tuple[str, ...]:
    """A candidate for each group, with the least sum of noise whose sum of bytes is not above `most`.

    `base` are the bytes beside the groups, for the message.

    Candidates whose noise is not finite are not taken.

    Raises:
        InputError: no choice is as small; says how small the smallest is.
        MissingRuntimeError: SciPy is not installed.
    """
    options = [[name for name in own if math.isfinite(own[name])] for own in noise]
    smallest = math.fsum(min(own[name] for name in names) for own, names in zip(size, options, strict=True))
    if smallest > most:
        raise InputError(
            f"No choice among these candidates is as small as was asked for: the engine's weights take "
            f"{(base + smallest) / MIB:.3f} MiB at least, {base / MIB:.3f} of them beside the groups, and "
            f"{(base + most) / MIB:.3f} MiB are allowed. Give a larger --max-size-mib, or smaller --candidates such as "
            "int4."
        )
    chosen = _solved(noise, size, most, options)
    if (bound := total(noise, chosen)) > 0:  # HiGHS stops within 1e-6 of the sum in the unit that it is given
        within = [[name for name in names if noise[g][name] <= bound] for g, names in enumerate(options)]
        again = _solved(noise, size, most, within, unit=bound)
        chosen = min(chosen, again, key=lambda each: total(noise, each))
    return chosen


def _solved(
    noise: Costs, size: Costs, most: float, options: Sequence[Sequence[str]], *, unit: float = 0.0
) -> tuple[str, ...]:
    optimize = require_scipy()
    places = [(g, name) for g, names in enumerate(options) for name in names]
    scale = unit or max((noise[g][name] for g, name in places), default=0.0) or 1.0
    cost = np.array([noise[g][name] / scale for g, name in places])
    one = np.zeros((len(options), len(places)))
    for column, (g, _) in enumerate(places):
        one[g, column] = 1.0
    bytes_ = np.array([[size[g][name] / max(most, 1.0) for g, name in places]])
    found = optimize.milp(
        cost,
        constraints=[optimize.LinearConstraint(one, 1.0, 1.0), optimize.LinearConstraint(bytes_, -np.inf, 1.0)],
        integrality=np.ones(len(places)),
        bounds=optimize.Bounds(0.0, 1.0),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise InputError(f"HiGHS finds no choice for these groups: {found.message}")
    chosen = {g: name for (g, name), x in zip(places, found.x, strict=True) if x > 0.5}
    return tuple(chosen[g] for g in range(len(options)))


def total(costs: Costs, chosen: Sequence[str]) -> float:
    """The sum of a choice."""
    return math.fsum(own[name] for own, name in zip(costs, chosen, strict=True))


def require_scipy() -> Any:
    """SciPy's optimizers.

    Raises:
        MissingRuntimeError: it is not installed.
    """
    try:
        return import_module("scipy.optimize")
    except ImportError:
        raise MissingRuntimeError(
            "--minimize error chooses by SciPy's HiGHS, and SciPy is not installed. Install it with: "
            "pip install 'qdq[mixed]'"
        ) from None


def neighbours(noise: Costs, size: Costs, chosen: Sequence[str], most: float) -> list[tuple[str, ...]]:
    """Choices that differ from one in a group or two and are not larger than `most`, the least sum of noise first."""
    singles = [
        (g, name) for g, own in enumerate(noise) for name in own if name != chosen[g] and math.isfinite(own[name])
    ]
    noises = {move: noise[move[0]][move[1]] - noise[move[0]][chosen[move[0]]] for move in singles}
    sizes = {move: size[move[0]][move[1]] - size[move[0]][chosen[move[0]]] for move in singles}
    room, found = most - total(size, chosen), list[tuple[float, tuple[tuple[int, str], ...]]]()
    found += [(noises[move], (move,)) for move in singles if sizes[move] <= room]
    finer = sorted((move for move in singles if noises[move] < 0), key=noises.__getitem__)[:PAIRED]
    coarser = sorted((m for m in singles if noises[m] >= 0 and sizes[m] < 0), key=noises.__getitem__)[:PAIRED]
    found += [
        (noises[a] + noises[b], (a, b))
        for a in finer
        for b in coarser
        if a[0] != b[0] and room < sizes[a] <= room - sizes[b]
    ]
    ordered = sorted(found)
    return [tuple(dict(moves).get(g, name) for g, name in enumerate(chosen)) for _, moves in ordered]
