"""Measures a GPU: compiles the probes, holds them to their claims, times them, and says what came of each.

Card, backend, Timer -> `readings` -> `engines.timing.fit.fit`. One probe that fails does not stop the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from engines.backends.backend import Backend, backend_named, backends
from engines.backends.compiler import Engine
from engines.core.errors import EngineError, MissingRuntimeError, how_to_install, import_runtime
from engines.timing.driver import Card
from engines.timing.fit import Reading
from engines.timing.probes import CHANNELS, IMAGE, ONES, SIZE, Probe, claim_failure
from engines.timing.timer import Load, Timer

LARGE, SMALL, PERIOD = 2048.0, 1 / 64, 256
REST_S = 0.5  # before a product: the clock recovers
OnProbe = Callable[[int, int, str], None]


def backend_for(card: Card, name: str | None = None) -> Backend:
    """The backend of that name, else the first that has the GPU's target and whose runtime is installed.

    Raises:
        MissingRuntimeError: there is none; says what to install.
        EngineError: an unknown name, or a backend without this target.
    """
    if name is not None:
        found = backend_named(name)
        found.target(card.target)
        import_runtime(found.runtime)
        return found
    able = [b for b in backends().values() if card.target in b.targets]
    for found in able:
        try:
            import_runtime(found.runtime)
        except MissingRuntimeError:
            continue
        return found
    fix = " or ".join(f"{b.title} ({how_to_install(b.runtime)})" for b in able)
    what = f"No compiler for {card.name} ({card.target}) is installed here"
    raise MissingRuntimeError(f"{what}. Install {fix}." if fix else f"{what}, and none is known for that target.")


def readings(
    found: Sequence[Probe],
    card: Card,
    backend: Backend,
    timer: Timer,
    *,
    budget_s: float = float("inf"),
    on_probe: OnProbe | None = None,
) -> Iterator[Reading]:
    """One reading for each probe, as they come.

    Args:
        found: what to measure.
        card: the GPU that the timer runs on.
        backend: compiles for it.
        timer: measures.
        budget_s: seconds of everything; probes that come later are left out, with that reason.
        on_probe: called with the number of probes done, their number in all, and what is done.
    """
    began = time.monotonic()
    for number, probe in enumerate(found):
        if on_probe:
            on_probe(number, len(found), "measure")
        if time.monotonic() - began > budget_s:
            yield Reading(probe=probe, failure=f"no time left of {budget_s:.0f} s")
            continue
        yield _reading(probe, card, backend, timer)


def _reading(probe: Probe, card: Card, backend: Backend, timer: Timer) -> Reading:
    try:
        engines = [compiled(probe.make(steps), card, backend) for steps in probe.steps]
        if failure := claim_failure(probe, [engine.table for engine in engines]):
            return Reading(probe=probe, failure=f"{backend.title} compiled it to something else: {failure}")
        loads = [Load(engine=engine, repeats=probe.repeats) for engine in engines]
        rest_s = REST_S if probe.rate else 0.0
        timings = tuple(timer.times(loads, seconds=probe.seconds, rest_s=rest_s))
        kept = kept_share(probe, engines[0], timer)
    except (EngineError, RuntimeError) as error:  # the runtimes' own errors are RuntimeErrors
        return Reading(probe=probe, failure=" ".join(str(error).split())[:300])
    return Reading(probe=probe, timings=timings, kept=kept)


def compiled(model: ModelProto, card: Card, backend: Backend) -> Engine:
    """The engine of a model of fixed shapes for a GPU.

    Raises:
        EngineError: see `build` of the backend.
    """
    return backend.build(model, targets=(card.target,), shapes=None, options=None, directory=None, on_progress=None)


def kept_share(probe: Probe, engine: Engine, timer: Timer) -> float | None:
    """How much of the small values beside large ones a product of FP16 keeps; None for other probes.

    Along what is summed, each 256 values are 2048, then 254 of 1/64, then -2048, all times one. 2048 and the sum of the
    16 or 32 values that a tensor core adds at once, 1/4 or 1/2, is 2048 again in FP16, whose step is 2 there: FP16
    keeps hardly any of the small values, FP32 all. However a kernel divides the sum among its threads, in whole periods
    or not, large values stand at both ends of what it adds up in order.
    """
    if probe.dtype != "float16" or not probe.rate:
        return None
    pattern = accumulation_pattern()
    if probe.kind == "single":
        x = np.zeros((SIZE, SIZE), np.float16)
        x[0] = np.resize(pattern, SIZE)
        sums = timer.outputs(engine, {"x": x})
        got, exact = next(iter(sums.values()))[0, :ONES], SIZE / PERIOD
    else:
        x = np.zeros(IMAGE, np.float16)
        x[0] = np.resize(pattern, CHANNELS)[:, None, None]
        sums = timer.outputs(engine, {"x": x})
        got, exact = next(iter(sums.values()))[0, :ONES, IMAGE[2] // 2, IMAGE[3] // 2], 9 * CHANNELS / PERIOD
    return float(np.median(got.astype(np.float64))) / (exact * (PERIOD - 2) * SMALL)


def accumulation_pattern() -> npt.NDArray[np.float16]:
    """(256) float16: 2048, 254 times 1/64, -2048. Their sum is 254/64.

    >>> float(accumulation_pattern().astype("float64").sum()) * 64
    254.0
    """
    return np.concatenate([[LARGE], np.full(PERIOD - 2, SMALL), [-LARGE]]).astype(np.float16)
