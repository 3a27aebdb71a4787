"""Forms of one model built and timed on this machine's GPU, by the compiler of a recipe.

recipe -> the GPU that it is for, or why times are predicted -> `Bench` (a context manager)
forms -> engines at the usual shapes -> each alone: does it run, and its kernels -> all in turn -> `Run` each
Both backends go through `engines.timing.timer.Timer`. Must not choose a form.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from engines.backends.backend import backend_named
from engines.backends.compiler import Engine, ShapeRange
from engines.backends.doctor import gpus
from engines.core.documents import replace
from engines.core.errors import EngineError, MissingRuntimeError, import_runtime
from engines.core.files import Scratch
from engines.cost.gpus import gpu_named
from engines.timing.driver import Card, Driver
from engines.timing.events import EventTimer
from engines.timing.gpu_file import row_of
from engines.timing.timer import KernelTime, Load, Timer, Timing
from qdq.build.cost import TIE
from qdq.build.engine import compile_engine
from qdq.build.recipe import Recipe
from qdq.core.progress import Progress
from qdq.model.model import Model
from qdq.model.storage import save

SECONDS = 0.5  # of GPU time for each form: hundreds of inferences of most networks
FEWEST = 20  # inferences of a form that are timed: fewer say little of their spread
LEAST_GAIN = 0.02
"""Of the time of the fastest float form: what a quantized one must gain beyond the spread of both, or nothing is
quantized. Latencies of one engine vary by 1 % from run to run, and Q/DQ cost accuracy, calibration and care."""
PROFILED = 20  # inferences whose kernels are timed one by one

Forms = Mapping[str, Callable[[], Model]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What came of one form: its times, its kernels by the profiler and its engine; or why there are none."""

    why: str = ""
    timing: Timing | None = None
    kernels: tuple[KernelTime, ...] = ()
    engine: Engine | None = field(default=None, repr=False)

    @property
    def us(self) -> float:
        """Median microseconds; infinite where it was not timed."""
        return math.inf if self.timing is None else self.timing.median_us

    @property
    def spread_us(self) -> float:
        """Distance of the quartiles; 0 where it was not timed."""
        return 0.0 if self.timing is None else self.timing.spread_us

    def pays_on(self, unquantized: Run) -> bool:
        """Whether a quantized form is faster than a float one by `LEAST_GAIN` and the spread of both."""
        gain = unquantized.us - self.us
        return gain - max(self.spread_us, unquantized.spread_us) >= LEAST_GAIN * unquantized.us

    def ties(self, other: Run) -> bool:
        """Whether the times cannot be told apart: by the larger spread, or by 1 % of the larger time."""
        spread = max(self.spread_us, other.spread_us)
        return abs(self.us - other.us) <= max(spread, TIE * max(self.us, other.us))

    def __str__(self) -> str:
        """Like '102.3 us (quartiles 0.4 apart)'."""
        return f"{self.us:.1f} us (quartiles {self.spread_us:.1f} apart)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A GPU of this machine, and the compiler that builds for it.

    Attributes:
        card: the GPU.
        timer: on it.
        recipe: its backend and targets.
        shapes: of each input; the usual one is built and timed.
    """

    card: Card
    timer: Timer
    recipe: Recipe
    shapes: Mapping[str, ShapeRange]

    @property
    def compiler(self) -> str:
        """Its name."""
        return backend_named(self.recipe.backend).title

    @property
    def version(self) -> str:
        """Of the compiler."""
        return str(import_runtime(backend_named(self.recipe.backend).runtime).__version__)

    def runs(
        self, forms: Forms, *, beside: Mapping[str, Run] | None = None, on_progress: Progress | None = None
    ) -> tuple[dict[str, Run], bool]:
        """The times of several forms, and whether they took turns; what fails to build or to run says why.

        Args:
            forms: name -> what makes the model. Of those that come when the recipe's time limit is over, none is built.
            beside: what ran before, whose engines take turns with them.

        Raises:
            MissingRuntimeError: the compiler's runtime is missing.
        """
        found = dict(beside or {})
        ends = time.monotonic() + self.recipe.time_limit_s
        with Scratch() as folder:
            for number, (name, make) in enumerate(forms.items()):
                if on_progress:
                    on_progress(number, len(forms), "Measure")
                if time.monotonic() > ends:
                    found[name] = Run(why=f"no time was left of {self.recipe.time_limit_s:g} s (--time-limit)")
                    continue
                found[name] = self._built(make, folder)
        return self._timed(found)

    def _built(self, make: Callable[[], Model], folder: Path) -> Run:
        """A form built, and run alone; the cache of what the compiler timed is shared by all of them."""
        path = folder / "model.onnx"
        try:
            save(make(), path)
            fixed = {name: ShapeRange.fixed(shape.opt) for name, shape in self.shapes.items()}
            cached = self.recipe.with_tensorrt(timing_cache=str(folder / "timing.cache"), profiles=())
            engine = compile_engine(path, recipe=cached, shapes=fixed, locate=False)
        except MissingRuntimeError:
            raise
        except (EngineError, RuntimeError) as error:  # the runtimes' own errors are RuntimeErrors
            return Run(why=f"it is not built: {_short(error)}")
        return self._alone(engine)

    def _alone(self, engine: Engine) -> Run:
        try:
            return Run(engine=engine, kernels=tuple(self.timer.kernel_times(engine, PROFILED)))
        except MissingRuntimeError:
            raise
        except (EngineError, RuntimeError):  # of the engine, or of the profiler alone
            return self._timed_alone(Run(engine=engine), SECONDS / 10)

    def _timed(self, runs: Mapping[str, Run]) -> tuple[dict[str, Run], bool]:
        """The runs with their times: all in turn, or each alone where that fails, for lack of memory above all."""
        loads = {name: Load(engine=run.engine) for name, run in runs.items() if run.engine is not None}
        if not loads:
            return dict(runs), True
        try:
            timings = self.timer.times(list(loads.values()), seconds=sum(_seconds(runs[name]) for name in loads))
            done = {name: _with(runs[name], timing) for name, timing in zip(loads, timings, strict=True)}
            return {name: done.get(name, run) for name, run in runs.items()}, True
        except (EngineError, RuntimeError):
            return {name: self._timed_alone(run, _seconds(run)) for name, run in runs.items()}, False

    def _timed_alone(self, run: Run, seconds: float) -> Run:
        if run.engine is None:
            return run
        try:
            (timing,) = self.timer.times([Load(engine=run.engine)], seconds=seconds)
        except (EngineError, RuntimeError) as error:
            return Run(why=f"it does not run: {_short(error)}")
        return _with(run, timing)


def _seconds(run: Run) -> float:
    """Of GPU time for a form: `SECONDS`, or `FEWEST` inferences where that is longer."""
    us = sum(kernel.us for kernel in run.kernels) or (run.timing.median_us if run.timing else 0.0)
    return max(SECONDS, FEWEST * us / 1e6)


def _with(run: Run, timing: Timing) -> Run:
    return Run(engine=run.engine, kernels=run.kernels, timing=timing)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


@contextmanager
def bench_of(recipe: Recipe, shapes: Mapping[str, ShapeRange]) -> Iterator[Bench | None]:
    """The GPU of this machine that a recipe's engine is for, while something is timed on it; None: times are predicted.

    Raises:
        MissingRuntimeError: `judge` is 'measured', and there is no such GPU or no runtime for it.
    """
    index, why = _gpu(recipe)
    if index is None:
        if recipe.judge == "measured" and recipe.tune != "off":
            raise MissingRuntimeError(
                f"--judge measured times engines on a GPU of this machine, and {why}. Do it on a machine with such a "
                "GPU, or let times be predicted (--judge predicted)."
            )
        yield None
        return
    with Driver(index) as driver:
        yield Bench(card=driver.card(), timer=EventTimer(driver, recipe.running), recipe=recipe, shapes=shapes)


def why_predicted(recipe: Recipe) -> str:
    """Why times are predicted though this machine has a GPU and nobody asked for that; '' where this is not so."""
    index, why = _gpu(recipe)
    if recipe.judge or recipe.tune == "off" or index is not None or not gpus():
        return ""
    return f"times are predicted, though a GPU is here: {why}"


def _gpu(recipe: Recipe) -> tuple[int | None, str]:
    """The number of the GPU that forms are timed on, or None and why there is none, a clause."""
    if recipe.judge == "predicted" or recipe.tune == "off":
        return None, "nothing is to be measured"
    backend = backend_named(recipe.backend)
    here = gpus()[:1] if backend.needs_gpu else gpus()  # it compiles for the first
    targets = tuple(dict.fromkeys(map(backend.target, recipe.targets)))
    if not here:
        return None, "no NVIDIA GPU or driver was found here"
    if len(targets) > 1:
        return None, f"the engine is for several generations ({', '.join(targets)}), of which one can be measured"
    index = next((i for i, gpu in enumerate(here) if gpu.target in targets), None)
    if index is None:
        some = ", ".join(f"{gpu.name} ({gpu.target})" for gpu in here)
        return None, f"the engine is for {targets[0]}, and here is {some}"
    try:
        version = str(import_runtime(backend.runtime).__version__)
    except MissingRuntimeError as error:
        return None, str(error).rstrip(".")
    if not recipe.profile.same_compiler(backend.name, version):
        return None, f"{backend.title} {version} is installed, and the engine is for {recipe.profile.title}"
    if not recipe.judge and (others := _others(recipe, index)):
        return None, f"it is not the {' or '.join(others)} that --gpu names; --judge measured times it all the same"
    return index, ""


def _others(recipe: Recipe, index: int) -> list[str]:
    """The GPUs that a recipe names, where all of them are others than this machine's."""
    names = [gpu_named(gpu).name for gpu in recipe.gpus if isinstance(gpu, str)]
    if not names or len(names) < len(recipe.gpus):
        return []
    with Driver(index) as driver:
        row = row_of(driver.card())
    return [] if row is None or row.name in names else names


def priced_here(recipe: Recipe, bench: Bench | None) -> Recipe:
    """The recipe for predicted times: where it names no GPU, they are of the one that is measured."""
    row = row_of(bench.card) if bench and not recipe.gpus else None
    return replace(recipe, gpus=(row.name,)) if row else recipe
