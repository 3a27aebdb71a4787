"""A measured GPU as a recipe's `gpu:`, from which predictions are corrected.

Card + fit + four engines, predicted and measured -> `MeasuredGpu` -> YAML with units, rows, JSON.
Must not overwrite what was measured with a datasheet, nor name a datasheet of another GPU.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import combinations

from engines.backends.backend import Backend, backend_named, predicting
from engines.core.errors import EngineError, import_runtime
from engines.cost.correction import Factors, factors
from engines.cost.gpus import Gpu, gpu_named, usual_gpu
from engines.cost.predict import predict
from engines.timing.driver import Card
from engines.timing.fit import Fit, Reading, fit
from engines.timing.measure import OnProbe, compiled, readings
from engines.timing.networks import Network, networks
from engines.timing.probes import probes
from engines.timing.timer import Load, Timer, TimingError

# Words in a driver's name that say which variant of a GPU it is; a row may have them or not.
_VARIANT = re.compile(r"sxm\d*|pcie|nvl|hbm\d\w*|\d+gb|generation|workstation|server|max-q|edition|blackwell")
FEWEST = 2  # engines that a factor is taken from
_SAME_MHZ = 0.03  # of the clock: less is the same GPU by another maker

_UNITS = {
    "start_us": "microseconds of a small kernel that waits for the one before it",
    "product_start_us": "microseconds of a small product beyond that",
    "bandwidth_gb_s": "10^9 bytes a second that one kernel reaches from memory",
    "l2_gb_s": "10^9 bytes a second that one kernel reaches from the L2 cache",
    "tera_ops": "10^12 operations a second, sustained for seconds; a multiply-add is two",
    "boost_tera_ops": "the same in the first 50 ms",
    "factor": "measured over predicted time of whole engines, with the figures above, but for starts",
    "start_factor": "the same of starts",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One engine: predicted from what was measured of the GPU, and measured itself; or why not.

    `start_us` is what of the predicted time are starts of kernels and products.
    """

    name: str
    predicted_us: float = 0.0
    start_us: float = 0.0
    measured_us: float = 0.0
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredGpu:
    """A GPU that was measured.

    Attributes:
        card: it.
        backend: name of the compiler of the probes.
        version: of that compiler, '' where none was used.
        readings: of the probes.
        fit: what they say.
        points: whole engines.
        gpu: what a recipe's `gpu` holds.
    """

    card: Card
    backend: str
    version: str
    readings: tuple[Reading, ...]
    fit: Fit
    points: tuple[Point, ...]
    gpu: Mapping[str, object] = field(hash=False)

    def text(self) -> str:
        """The recipe in YAML: `gpu`, and what to compile for."""
        how = f"{backend_named(self.backend).title} {self.version}" if self.version else self.backend
        lines = [
            f"# {self.card.name} ({self.card.target}), measured by `qdq measure-gpu`: {how}, CUDA {self.card.cuda}.",
            "# A recipe: `qdq deploy MODEL --data DATA --recipe FILE` predicts with it. Or copy `gpu` into your own.",
            f"target: [{self.card.target}]",
        ]
        if self.version and not backend_named(self.backend).predicts:
            lines.append(f"compiler: {backend_named(self.backend).compiler}")
        lines += ["gpu:", *_yaml_item(self.gpu)]
        lines += [f"# {sentence}" for sentence in (*self.fit.evidence, *self.fit.missing)]
        return "\n".join(lines) + "\n"

    def rows(self) -> list[tuple[str, ...]]:
        """What was measured, as text."""
        found: list[tuple[str, ...]] = [
            (key, *_value(value), _UNITS[key]) for key, value in self.fit.measured.to_mapping().items()
        ]
        known = self.fit.accumulation
        found.append(("FP16 products", f"accumulate in {known.upper()}" if known else "not clear", ""))
        found += [("", sentence, "") for sentence in self.fit.evidence]
        found += [(p.name, _point(p), "") for p in self.points]
        measured = _mapping(self.gpu.get("measured"))
        found += [(name, f"{measured[name]}", _UNITS[name]) for name in ("factor", "start_factor") if name in measured]
        found += [("not measured", sentence, "") for sentence in self.fit.missing]
        return found

    def to_mapping(self) -> dict[str, object]:
        """All of it as plain values."""
        return {
            "card": asdict(self.card),
            "backend": self.backend,
            "version": self.version,
            "gpu": dict(self.gpu),
            "accumulation": self.fit.accumulation,
            "evidence": list(self.fit.evidence),
            "missing": list(self.fit.missing),
            "probes": {r.probe.name: _plain(r, self.fit) for r in self.readings},
            "points": [asdict(point) for point in self.points],
        }


def measured_gpu(
    card: Card,
    backend: Backend,
    timer: Timer,
    *,
    seconds: float = 3.0,
    budget_s: float = math.inf,
    on_probe: OnProbe | None = None,
) -> MeasuredGpu:
    """Measures a GPU.

    Args:
        card: the one that the timer runs on.
        backend: compiles for it.
        timer: measures.
        seconds: for each product that shows the sustained clock.
        budget_s: of the probes; those that come later are left out.
        on_probe: as of `engines.timing.measure.readings`.

    Raises:
        TimingError: nothing could be measured.
        EngineError: no GPU of this generation is known, so that nothing can be predicted for it.
    """
    found = tuple(readings(probes(card, seconds), card, backend, timer, budget_s=budget_s, on_probe=on_probe))
    said = fit(found, row_of(card), card.sms)
    if not said.measured.to_mapping():
        raise TimingError(f"Nothing could be measured on {card.name}. The first reason: {said.missing[0]}")
    values = gpu_values(card, said)
    tested = points(card, Gpu.from_mapping(values), backend, timer)
    if (found_factors := factors_of(tested)) is not None:
        both = {"factor": _short(found_factors.work), "start_factor": _short(found_factors.start)}
        values = {**values, "measured": {**_mapping(values["measured"]), **both}}
    return MeasuredGpu(
        card=card,
        backend=backend.name,
        version=str(import_runtime(backend.runtime).__version__),
        readings=found,
        fit=said,
        points=tuple(tested),
        gpu=values,
    )


def row_of(card: Card) -> Gpu | None:
    """The datasheet row of a GPU by the name that its driver gives it; None where none is sure to be it.

    'NVIDIA A100-SXM4-80GB' is 'a100-80gb': words that only say which variant it is may be left out, others not.
    """
    words = re.split(r"[\s_-]+", card.name.lower())
    variants = [i for i, word in enumerate(words) if _VARIANT.fullmatch(word)]
    for count in range(len(variants) + 1):
        for dropped in combinations(variants, count):
            try:
                row = gpu_named(" ".join(word for i, word in enumerate(words) if i not in dropped))
            except EngineError:
                continue
            if row.target == card.target:
                return row
    return None


def gpu_values(card: Card, said: Fit) -> dict[str, object]:
    """What a recipe's `gpu` holds of a measured GPU: its row, or the usual one of its generation, and what differs.

    Raises:
        EngineError: no row of its generation is known.
    """
    row = row_of(card)
    like = row or usual_gpu(card.target)
    if like is None:
        raise EngineError(
            f"No GPU of target {card.target} is known, so that times cannot be predicted for {card.name}."
        )
    name = row.name if row else "-".join(re.findall(r"[a-z0-9]+", card.name.lower()))
    values: dict[str, object] = {"name": f"{name}-measured", "like": like.name}
    if card.sms != like.sms:
        values["sms"] = card.sms
    if row is None:
        values["kind"] = _kind(card.name)
        if card.boost_mhz and abs(card.boost_mhz / like.boost_mhz - 1) > _SAME_MHZ:
            values["boost_mhz"] = _short(card.boost_mhz)
        values["l2_mb"] = _short(card.l2_bytes / 2**20)
        if card.bandwidth_gb_s or said.measured.bandwidth_gb_s:
            values["bandwidth_gb_s"] = _short(card.bandwidth_gb_s or said.measured.bandwidth_gb_s or 0.0)
    if said.accumulation:
        values["accumulation"] = said.accumulation
    measured = said.measured.to_mapping()
    rounded = {
        k: {t: _short(r) for t, r in v.items()} if isinstance(v, dict) else _short(v) for k, v in measured.items()
    }
    return {**values, "measured": rounded}


def _kind(name: str) -> str:
    """What a GPU without a row is sold as, by its driver's name: boards for data centres have nothing but a number."""
    words = re.split(r"[\s_-]+", name.lower())
    if "geforce" in words:
        return "geforce"
    return "workstation" if {"rtx", "quadro", "titan"} & set(words) else "data centre"


def points(card: Card, gpu: Gpu, backend: Backend, timer: Timer) -> list[Point]:
    """Whole engines, predicted for a measured GPU and measured on it."""
    return [_tested(network, card, gpu, backend, timer) for network in networks()]


def _tested(network: Network, card: Card, gpu: Gpu, backend: Backend, timer: Timer) -> Point:
    """One engine; predicted from the tables of the compiler that times are predicted of."""
    try:
        engine, other = compiled(network.model, card, backend), predicting(backend.name)
        table = (engine if other.name == backend.name else compiled(network.model, card, other)).table
        predicted = predict(network.model, table, gpu)
        (timing,) = timer.times([Load(engine=engine)], seconds=0.5)
    except (EngineError, RuntimeError) as error:  # the runtimes' own errors are RuntimeErrors
        return Point(name=network.name, failure=" ".join(str(error).split())[:300])
    whole, starts = predicted.total_us, predicted.start_us
    return Point(name=network.name, predicted_us=whole, start_us=starts, measured_us=timing.median_us)


def factors_of(tested: list[Point]) -> Factors | None:
    """Measured over predicted, of starts and of all else; None of too few engines."""
    known = [p for p in tested if not p.failure and p.predicted_us > 0]
    if len(known) < FEWEST:
        return None
    return factors([p.predicted_us for p in known], [p.start_us for p in known], [p.measured_us for p in known])


def _short(value: float) -> float:
    """A number with four digits.

    >>> _short(1234567.0), _short(0.0123456)
    (1235000.0, 0.01235)
    """
    return float(f"{value:.4g}")


def _mapping(value: object) -> dict[str, object]:
    return dict(value) if isinstance(value, Mapping) else {}


def _yaml_item(gpu: Mapping[str, object]) -> Iterator[str]:
    """The lines of one GPU."""
    lead = "  - "
    for key, value in gpu.items():
        if key != "measured":
            yield f"{lead}{key}: {value}"
            lead = "    "
    yield f"{lead}measured:"
    for key, value in _mapping(gpu["measured"]).items():
        rates = ", ".join(f"{t}: {r}" for t, r in _mapping(value).items())
        yield f"      {key}: {'{' + rates + '}' if rates else value}  # {_UNITS[key]}"


def _value(value: float | Mapping[str, float]) -> tuple[str]:
    if isinstance(value, Mapping):
        return (", ".join(f"{t} {r:.4g}" for t, r in value.items()),)
    return (f"{value:.4g}",)


def _point(point: Point) -> str:
    if point.failure:
        return f"not measured: {point.failure}"
    return f"predicted {point.predicted_us:.1f} us, measured {point.measured_us:.1f} us"


def _plain(reading: Reading, said: Fit) -> dict[str, object]:
    """One reading as plain values: its step, and median and spread of each engine in microseconds."""
    name = reading.probe.name
    return {
        "note": reading.note,
        "step_us": said.step_us.get(name),
        "tera_ops": said.rates.get(name),
        "boost_tera_ops": said.boost_rates.get(name),
        "kept": reading.kept,
        "engines": [
            {"steps": s, "median_us": t.median_us, "spread_us": t.spread_us, "times": len(t.us), "graph": t.graph}
            for s, t in zip(reading.probe.steps, reading.timings, strict=False)
        ],
    }
