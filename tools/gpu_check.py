"""Everything that needs a GPU, in one run of at most 9 minutes: one page, then a line of JSON.

    python tools/gpu_check.py                                the whole check, on this machine's first GPU
    python tools/gpu_check.py --models DIR -o gpu.yaml       with real networks; keep what was measured as a recipe
    python tools/gpu_check.py model.onnx another.int8.onnx   these networks too, as they are

Environment -> the GPU measured (starts, bandwidths, rates, how FP16 accumulates) -> networks in FP32, FP16, INT8 and
tuned: against ONNX Runtime, predicted and measured. Without a compiler for the GPU, torch measures it. Each part says
whether it ran, or why not; none stops another. Needs what `pip install '.[cpu]'` or '.[gpu]' installs.
Exit codes: 0 all ran, 1 a part failed, 3 no GPU, or nothing to run on it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Timer
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    import gpu_networks as nets
    import gpu_torch

    from engines.backends.doctor import diagnose
    from engines.backends.profile import profile_named
    from engines.core.errors import EngineError, MissingRuntimeError
    from engines.core.files import write_atomic
    from engines.cost.gpus import Gpu
    from engines.timing.driver import Card, Driver
    from engines.timing.events import EventTimer
    from engines.timing.gpu_file import MeasuredGpu, measured_gpu, row_of
    from engines.timing.machine import Monitor
    from engines.timing.measure import backend_for
    from engines.verify.manifest import package_versions
except ImportError as missing:
    print(
        f"Cannot import {missing.name}: install what qdq needs with `pip install .`, also beside torch.",
        file=sys.stderr,
    )
    sys.exit(3)

MINUTES, MEASURING_S, NETWORK_S, SECONDS = 9.0, 170.0, 70.0, 3.0
PARTS = ("measured by engines", "measured by torch", "networks", "clocks and power")
LEAST_DB = 20.0  # against the same file in ONNX Runtime; below it an engine computes something else


@dataclass(slots=True, kw_only=True)
class Part:
    """One part of the check: 'ran', 'not run' or 'failed', and why; lines for the page, values for the JSON."""

    name: str
    state: str = "not run"
    why: str = ""
    seconds: float = 0.0
    lines: list[str] = field(default_factory=list)
    values: Any = None


class Check:
    """The parts so far, and how long the whole may take."""

    def __init__(self, minutes: float) -> None:
        """Begins now."""
        self.parts: list[Part] = []
        self.ends_s = time.monotonic() + 60 * minutes

    def part(self, name: str, work: Callable[[Part], None]) -> Part:
        """Does one part, whatever becomes of it."""
        part = Part(name=name, state="running")
        self.parts.append(part)
        began = time.monotonic()
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            if began > self.ends_s:
                raise MissingRuntimeError("no time left")
            work(part)
            part.state = "ran" if part.state == "running" else part.state
        except MissingRuntimeError as error:
            part.state, part.why = "not run", str(error)
        except Exception as error:  # a part that fails stops no other
            part.state, part.why = "failed", f"{type(error).__name__}: {error}"
        part.why, part.seconds = " ".join(part.why.split())[:400], time.monotonic() - began
        return part

    @property
    def exit_code(self) -> int:
        """As the module says."""
        states = {part.name: part.state for part in self.parts}
        if states.get("GPU") != "ran" or set(list(states.values())[2:]) == {"not run"}:
            return 3
        return 1 if {"failed", "running"} & set(states.values()) else 0

    def page(self) -> Iterator[str]:
        """What is printed; the last line is the JSON."""
        for part in self.parts:
            why = f": {part.why}" if part.why else ""
            yield f"== {part.name}: {part.state}{why} ({part.seconds:.0f} s)"
            yield from (f"   {line}" for line in part.lines)
        yield json.dumps({"exit_code": self.exit_code, "parts": [_plain(asdict(p)) for p in self.parts]})

    def finish_late(self) -> None:
        """Prints what there is and ends the process: a part does not come back."""
        print("\n".join(self.page()), flush=True)
        os._exit(self.exit_code or 1)


def _plain(value: Any) -> Any:
    """A value for JSON, numbers that are not finite as text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def environment(part: Part) -> None:
    """The machine and what is installed."""
    versions = package_versions()
    found = diagnose()
    part.lines = [
        f"Python {platform.python_version()} on {platform.platform()}",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        *(f"-- {f.name}: {f.detail}: {f.fix}" for f in found if not f.ok),
    ]
    part.values = {"python": platform.python_version(), "platform": platform.platform(), "packages": versions}


def describe(part: Part, card: Card) -> None:
    """Lines about a GPU."""
    row = row_of(card)
    part.lines = [
        f"{card.name}, {card.target}, {card.sms} SMs, boost {card.boost_mhz:.0f} MHz, L2 {card.l2_bytes / 2**20:.0f} "
        f"MiB, {card.memory_bytes / 2**30:.0f} GiB at {card.bandwidth_gb_s:.0f} GB/s, CUDA {card.cuda}",
        f"datasheet: {row.name}" if row else "datasheet: none is known by that name",
    ]
    part.values = asdict(card)


def measuring(part: Part, made: MeasuredGpu, output: Path | None) -> None:
    """Lines about a measured GPU, and its recipe."""
    part.lines += ["  ".join(cell for cell in row if cell) for row in made.rows()]
    steps = (f"{name} {us:.2f}" for name, us in made.fit.step_us.items() if name not in made.fit.rates)
    part.lines.append(f"us of a step: {', '.join(steps)}")
    boost = made.fit.boost_rates
    rates = (f"{n} {r:.3g} ({boost.get(n, math.nan):.3g})" for n, r in made.fit.rates.items())
    part.lines.append(f"T/s sustained (in 50 ms): {', '.join(rates)}")
    part.values = made.to_mapping()
    if output:
        write_atomic(output, made.text())
        part.lines.append(f"recipe: {output}")


def with_torch(part: Part, output: Path | None) -> None:
    """The GPU measured by torch's own kernels."""
    made = gpu_torch.measured(gpu_torch.torch_gpu(), SECONDS)
    part.lines.append(f"{made.card.name} by {made.backend}: its kernels are not held to a layer table")
    measuring(part, made, output)


def networks(check: Check, bench: nets.Bench, options: argparse.Namespace) -> None:
    """A part for each network, then one about the worst kernels of all."""
    everything: list[nets.Ran] = []
    own = [lambda path=path: nets.user_case(path.name, path) for path in options.model]
    makers = [*nets.cases(options.models, bench.folder), *own]
    for number, make in enumerate(makers):

        def run(part: Part, make: Callable[[], nets.Case] = make) -> None:
            case = make()
            part.name = f"network {case.name}"
            for ran in nets.ran(case, bench, min(check.ends_s, time.monotonic() + NETWORK_S)):
                everything.append(ran)
                part.lines.append(line(ran))
                part.values = [*(part.values or []), asdict(ran)]
            failed = [r for r in everything if r.network == case.name and (r.why or r.of_file < LEAST_DB)]
            if failed:
                part.state, part.why = "failed", f"{', '.join(r.form for r in failed)}; see below"

        check.part(f"network {number + 1}", run)
    check.part("worst predicted kernels", lambda part: worst(part, everything))


def line(ran: nets.Ran) -> str:
    """One engine."""
    if ran.why:
        return f"{ran.form:6} not run: {ran.why}"
    ratio = ran.measured_us / ran.predicted_us
    graph = "" if ran.graph else ", no graph"
    return (
        f"{ran.form:6} {ran.kernels:4} kernels, measured {ran.measured_us:.1f} us (quartiles {ran.spread_us:.1f} apart"
        f"{graph}), predicted {ran.predicted_us:.1f}, ratio {ratio:.2f}; {ran.of_file:.1f} dB against the file, "
        f"{ran.of_float:.1f} against the float model in ONNX Runtime; {ran.activation_mib:.1f} MiB of activations"
    )


def worst(part: Part, everything: list[nets.Ran]) -> None:
    """The kernels whose prediction is furthest off, in microseconds."""
    pairs = [(ran, pair) for ran in everything for pair in ran.pairs]
    if not pairs:
        raise MissingRuntimeError("no kernel was both predicted and measured")
    for ran, p in sorted(pairs, key=lambda x: -abs(x[1].measured_us - x[1].predicted_us))[: nets.WORST]:
        times = f"predicted {p.predicted_us:8.1f}, measured {p.measured_us:8.1f} us"
        part.lines.append(f"{times}  {ran.network} {ran.form} {p.kernel[:80]}")
    unmatched = sum(ran.unmatched for ran in everything)
    part.lines.append(f"kernels of the profiler without a prediction: {unmatched}")


def on_gpu(check: Check, options: argparse.Namespace, folder: Path) -> None:
    """All parts that need the driver."""
    with ExitStack() as held:
        opened: list[tuple[Driver, Card]] = []

        def find(part: Part) -> None:
            driver = held.enter_context(Driver())
            opened.append((driver, driver.card()))
            describe(part, opened[0][1])

        if (none := check.part("GPU", find)).state != "ran":
            check.parts += [Part(name=name, why=f"no GPU: {none.why}") for name in PARTS]
            return
        driver, card = opened[0]
        made: list[MeasuredGpu] = []
        with Monitor(card.bus) as monitor:

            def measure(part: Part) -> None:
                backend = backend_for(card, options.compiler and profile_named(options.compiler).backend)
                budget_s = min(MEASURING_S, check.ends_s - time.monotonic())
                made.append(measured_gpu(card, backend, EventTimer(driver), seconds=SECONDS, budget_s=budget_s))
                measuring(part, made[0], options.output)

            if check.part("measured by engines", measure).state == "ran":
                check.part("measured by torch", _not_needed)
            else:
                check.part("measured by torch", lambda part: with_torch(part, options.output))
            try:
                backend = backend_for(card, options.compiler and profile_named(options.compiler).backend)
            except EngineError as error:
                check.parts.append(Part(name="networks", why=str(error)))
            else:
                gpu = made[0].gpu if made else {}
                bench = nets.Bench(driver=driver, card=card, backend=backend, gpu=gpu or _row(card), folder=folder)
                networks(check, bench, options)

        def clocks(part: Part) -> None:
            part.lines, part.values = [monitor.watched().summary()], monitor.watched().to_mapping()
            if monitor.watched().why_not:
                raise MissingRuntimeError(monitor.watched().why_not)

        check.part("clocks and power", clocks)


def _not_needed(part: Part) -> None:
    raise MissingRuntimeError("engines measured it")


def _row(card: Card) -> dict[str, object]:
    """The datasheet of a GPU that was not measured, {} without one."""
    row = row_of(card)
    return Gpu.to_mapping(row) if row else {}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="*", help="float ONNX files to check too, with random inputs")
    parser.add_argument("--models", type=Path, help="folder with resnet20*.onnx, hippodeep_head.onnx, *minilm*.onnx")
    parser.add_argument("--compiler", help="rtx or tensorrt; default: the first that is installed and has the GPU")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of the whole run, at most")
    parser.add_argument("-o", "--output", type=Path, help="write what was measured as a recipe")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Does the check; returns the exit code."""
    options = arguments(argv)
    check = Check(options.minutes - 0.25)
    watchdog = Timer(60 * options.minutes, check.finish_late)
    watchdog.daemon = True
    watchdog.start()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        check.part("environment", environment)
        on_gpu(check, options, Path(folder))
    watchdog.cancel()
    print("\n".join(check.page()))
    return check.exit_code


if __name__ == "__main__":
    sys.exit(main())
