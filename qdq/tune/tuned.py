"""What the search found: the variant, its price, and the steps to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from textwrap import shorten
from typing import Any, ClassVar, Literal, cast, get_type_hints

import msgspec

from engines.core.documents import Document, Part, replace
from qdq.build.cost import Price, PricedGpu
from qdq.build.measured.bench import Run
from qdq.build.measured.forms import Timings
from qdq.plan.plan import Plan
from qdq.tune.decision import Decision
from qdq.tune.variant_builder import Variant

ENDED = {
    "": "",
    "compiles": ", until --tune-compiles was reached: more may find a faster form",
    "seconds": ", until --time-limit was reached: on another machine the plan may be another",
}


class OnGpu(Part, frozen=True, kw_only=True):
    """Predicted microseconds on one of several GPUs: of what was chosen, and of the fastest float form."""

    gpu: str
    predicted_us: float
    unquantized_us: float

    @property
    def gain(self) -> str:
        """The one beside the other, for a person."""
        share = self.predicted_us / self.unquantized_us
        return f"{self.predicted_us:.1f} us on {self.gpu}, {share:.2f} of the float form ({self.unquantized_us:.1f})"


class TuningOutcome(Document, frozen=True, kw_only=True):
    """What a report says of the search; a time is None where nothing compiles.

    Attributes:
        gpus: that times are predicted for.
        predicted_us: microseconds of what was chosen.
        unquantized_us: of the model with nothing quantized or rewritten.
        untuned_us: of everything quantized that the rules want.
        fp32_us: of the model in FP32, nothing quantized or rewritten, if that was looked at.
        operands: what quantized nodes hold and read.
        quantized_nodes: how many.
        rewrites: rewrite -> nodes.
        variants: how many were priced.
        ended_by: what ended the search before it was through: 'compiles', 'seconds', or '' for nothing.
        refused: float type -> what the compiler said of the model in it, where it does not compile.
        decision: how sure the choice between quantized and float is, as predicted.
        measured: the forms that were timed on this machine's GPU, which decided; None where predicted times did.
        said: the same, and what else a person must know, one sentence each.
        steps: what was kept and given back, one line each.
        elsewhere: what the other compiler is predicted to make of the model.
        each: the times on each GPU, where the others are means over several.
    """

    FORMAT: ClassVar[str] = "qdq.tuning/4"
    MAKE: ClassVar[str] = "qdq tune --json"
    COMPUTED: ClassVar[Mapping[str, str]] = {"complete": "complete"}

    gpus: tuple[str, ...]
    predicted_us: float | None
    unquantized_us: float | None
    untuned_us: float | None
    fp32_us: float | None
    operands: str
    quantized_nodes: int
    rewrites: dict[str, tuple[str, ...]]
    variants: int
    ended_by: Literal["", "compiles", "seconds"]
    refused: dict[str, str]
    decision: Decision
    measured: Timings | None = None
    said: tuple[str, ...]
    steps: tuple[str, ...]
    elsewhere: str
    each: tuple[OnGpu, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether the search was through."""
        return not self.ended_by

    @property
    def lines(self) -> str:
        """A line of JSON for each form that was timed or left out; '' where none was to be."""
        return "".join(f"{form.line}\n" for form in self.measured.forms) if self.measured else ""

    @property
    def label(self) -> str:
        """What times are predicted for: of several GPUs they are means."""
        return predicted_on(self.gpus)

    @property
    def gain(self) -> str:
        """What was chosen, beside the float forms that a person would have without it."""
        if self.predicted_us is None:
            return "nothing compiles"
        others = {"FP32": self.fp32_us, "the fastest float form": self.decision.unquantized_us}
        others = others if self.quantized_nodes else {"FP32": self.fp32_us}
        shares = [f"{self._share(us)} {name} ({us:.1f})" for name, us in others.items() if us is not None]
        return ", ".join([f"{self.predicted_us:.1f} us", *shares]) + f"; {self._error}"

    @property
    def gains(self) -> list[str]:
        """What was chosen beside the fastest float form, on each of several GPUs."""
        return [one.gain if self.quantized_nodes else f"{one.predicted_us:.1f} us on {one.gpu}" for one in self.each]

    def _share(self, us: float) -> str:
        """Of a time, or that a prediction cannot tell the two apart."""
        alike = us == self.decision.unquantized_us and self.decision.verdict == "within the error"
        return "equal within the error to" if alike else f"{(self.predicted_us or 0.0) / us:.2f} of"

    @property
    def times(self) -> str:
        """The predicted times, for a person."""
        found = (self.predicted_us, self.unquantized_us, self.untuned_us)
        chosen, plain, most = ("nothing compiles" if us is None else f"{us:.1f}" for us in found)
        others = f"{plain} without quantization, {most} with {self.operands} wherever it is possible"
        return f"{chosen} us; {others}; {self._error}"

    @property
    def _error(self) -> str:
        return said_error(self.decision.time_error)


def predicted_on(gpus: Sequence[str]) -> str:
    """What times are predicted for: of several GPUs they are means."""
    return f"predicted on {', '.join(gpus)}{', the mean' if len(gpus) > 1 else ''}"


def said_error(error: float | None) -> str:
    """How true predicted times are, by their relative error."""
    return "error unknown" if error is None else f"within {error:.0%}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The outcome; `operands`, `refused`, `decision` and `steps` as in `TuningOutcome`.

    Attributes:
        plan: of the variant, with its rewrites; every node left in float for the price's sake says so.
        unquantized: the plan of the fastest variant known with nothing quantized.
        unquantized_price: of that.
        floating: that variant.
        everywhere: the variant of `untuned`.
        listed: the variants that may be taken by who measures, as far as accuracy goes; none where nobody does.
        price: of the variant.
        plain: predicted microseconds of the model in its float type, nothing quantized or rewritten.
        untuned: of everything quantized that the rules want, weight scales hoisted if that is better.
        fp32: of the model in FP32, nothing quantized or rewritten; infinite where that was not looked at.
        tried: how many variants were priced.
        ended: what ended the search, as `ended_by` of `TuningOutcome`.
        refusal: what the compiler said of the first quantized variant that does not compile; "" if all do.
        measured: as of `TuningOutcome`.
        reference: the fastest float form that was timed.
        remarks: what is to be said of the measurement, one sentence each.
    """

    variant: Variant
    plan: Plan
    unquantized: Plan
    unquantized_price: Price
    operands: str
    price: Price
    plain: float
    untuned: float
    fp32: float
    tried: int
    ended: str
    refused: Mapping[str, str]
    refusal: str
    decision: Decision
    steps: tuple[str, ...]
    floating: Variant = field(default_factory=Variant)
    everywhere: Variant = field(default_factory=Variant)
    listed: tuple[Variant, ...] = ()
    measured: Timings | None = None
    reference: Run | None = field(default=None, repr=False)
    remarks: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether the search was through."""
        return not self.ended

    @property
    def summary(self) -> str:
        """One sentence for a person."""
        count, rewrites = len(self.plan.quantized_nodes), ", ".join(sorted({r.name for r in self.plan.rewrites}))
        idle = "does not pay anywhere" if math.isfinite(self.untuned) else "wherever it is possible does not compile"
        if self.untuned < self.price.us:
            idle = "is left out: it gains too little, or costs more accuracy than the bound allows"
        quantized = f"{count} node{'s' * (count > 1)} in {self.operands}" if count else f"{self.operands} {idle}"
        return f"{quantized}; rewrites: {rewrites or 'none'}; {self.tried} variants looked at{ENDED[self.ended]}"

    def left_in_float(self, built: Price) -> Tuned:
        """The same where the plan, as built, gains nothing on float: the float form's plan, price and decision."""
        decision = self.decision.left_in_float(built, self.unquantized_price)
        timings = self.measured and replace(self.measured, chosen=self.measured.unquantized)
        return replace(self, plan=self.unquantized, price=self.unquantized_price, decision=decision, measured=timings)

    def said(self, gpus: Sequence[PricedGpu]) -> list[str]:
        """What a person must know beside the summary, one sentence each, with times predicted for these GPUs."""
        floats = [f"the {kind.upper()} model does not compile: {_short(why)}" for kind, why in self.refused.items()]
        others = [f"some variants do not compile, so they were not chosen: {_short(self.refusal)}"]
        decided = self.decision.sentences(self.operands, gpus) if self.measured is None else []
        return [*self.remarks, *decided, *floats, *(others if self.refusal else [])]

    def packed(self) -> bytes:
        """All of it but what was measured, as MessagePack: data, which reading does not run."""
        return msgspec.msgpack.encode({name: getattr(self, name) for name in _kept()})

    @classmethod
    def unpacked(cls, content: bytes) -> Tuned:
        """What `packed` gave.

        Raises:
            ValueError: it did not.
        """
        held = msgspec.msgpack.decode(content, type=dict[str, msgspec.Raw])
        return cls(**{name: msgspec.msgpack.decode(held[name], type=kind) for name, kind in _kept().items()})

    def outcome(self, gpus: Sequence[PricedGpu], elsewhere: str = "") -> TuningOutcome:
        """What a report says of it, with times predicted for these GPUs, and of the other compiler."""
        times = (self.price.us, self.plain, self.untuned, self.fp32)
        predicted, plain, untuned, fp32 = (us if math.isfinite(us) else None for us in times)
        return TuningOutcome(
            gpus=tuple(gpu.name for gpu in gpus),
            predicted_us=predicted,
            unquantized_us=plain,
            untuned_us=untuned,
            fp32_us=fp32,
            operands=self.operands,
            quantized_nodes=len(self.plan.quantized_nodes),
            rewrites={r.name: r.nodes for r in self.plan.rewrites},
            variants=self.tried,
            ended_by=cast(Literal["", "compiles", "seconds"], self.ended),
            refused=dict(self.refused),
            decision=self.decision,
            measured=self.measured,
            said=tuple(self.said(gpus)),
            steps=self.steps,
            elsewhere=elsewhere,
            each=self._on_each(gpus),
        )

    def _on_each(self, gpus: Sequence[PricedGpu]) -> tuple[OnGpu, ...]:
        """The times on each of several GPUs; none where nothing compiles."""
        chosen, plain = self.price.each, self.unquantized_price.each
        if len(gpus) < 2 or not len(gpus) == len(chosen) == len(plain):
            return ()
        return tuple(
            OnGpu(gpu=gpu.name, predicted_us=us, unquantized_us=other)
            for gpu, us, other in zip(gpus, chosen, plain, strict=True)
        )


def _kept() -> dict[str, Any]:
    """Field -> type of what `packed` holds."""
    types = get_type_hints(Tuned)
    return {f.name: types[f.name] for f in fields(Tuned) if f.name not in ("measured", "reference")}


def _short(words: str) -> str:
    """What a compiler said, on one line, up to a word."""
    return shorten(words, 300, placeholder=" ...")
