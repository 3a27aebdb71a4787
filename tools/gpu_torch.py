"""Section 6 of the measurements through PyTorch, for a GPU that no compiler of engines here has a target for.

Probes by the names of `engines.timing.probes` -> torch's own kernels in captured CUDA graphs -> times between
`torch.cuda.Event`s -> `Reading`s for the same fit. PyTorch is imported inside functions: nobody else needs it.
What kernels torch takes is not held to a layer table; that is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from engines.core.errors import MissingRuntimeError
from engines.timing import probes as probe_sizes
from engines.timing.driver import Card
from engines.timing.events import WARM_UP, Work, timings
from engines.timing.fit import Reading, fit
from engines.timing.gpu_file import MeasuredGpu, gpu_values, row_of
from engines.timing.measure import PERIOD, REST_S, SMALL, accumulation_pattern
from engines.timing.probes import Probe, probes
from engines.timing.timer import TimingError

_DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16", "int8": "int8", "fp8": "float8_e4m3fn"}


def torch_gpu() -> Any:
    """The torch module, with a GPU.

    Raises:
        MissingRuntimeError: it is not installed, or sees no GPU.
    """
    try:
        import torch
    except (ImportError, OSError) as error:
        raise MissingRuntimeError(f"Cannot import torch ({error}): pip install torch.") from error
    if not torch.cuda.is_available():
        raise MissingRuntimeError(f"torch {torch.__version__} sees no GPU here.")
    return torch


def card_of(torch: Any) -> Card:
    """The first GPU as torch describes it."""
    held = torch.cuda.get_device_properties(0)
    place = [getattr(held, f"pci_{part}_id", 0) for part in ("domain", "bus", "device")]
    clocks = 2e3 * getattr(held, "memory_clock_rate", 0) * getattr(held, "memory_bus_width", 0)
    return Card(
        name=held.name,
        target=f"sm{held.major}{held.minor}",
        sms=held.multi_processor_count,
        boost_mhz=getattr(held, "clock_rate", 0) / 1e3,
        l2_bytes=getattr(held, "L2_cache_size", 0) or 4 << 20,
        bandwidth_gb_s=clocks / 8 / 1e9,
        memory_bytes=held.total_memory,
        bus="{:08x}:{:02x}:{:02x}.0".format(*place),
        cuda=str(torch.version.cuda),
    )


class TorchStream:
    """torch's current stream with what `engines.timing.events.timings` needs; numbers stand for its objects."""

    def __init__(self, torch: Any) -> None:
        """On the first GPU."""
        self._torch, self._held, self._next = torch, dict[int, Any](), 0

    def _keep(self, thing: Any) -> int:
        self._next += 1
        self._held[self._next] = thing
        return self._next

    def event(self) -> int:
        """A new event with a time."""
        return self._keep(self._torch.cuda.Event(enable_timing=True))

    def record(self, event: int) -> None:
        """Puts an event into the stream."""
        self._held[event].record()

    def reached(self, event: int) -> bool:
        """Whether the GPU has come to an event."""
        return bool(self._held[event].query())

    def elapsed_us(self, first: int, second: int) -> float:
        """Microseconds of the GPU between two events."""
        return float(self._held[first].elapsed_time(self._held[second]) * 1e3)

    def destroy_event(self, event: int) -> None:
        """Lets an event go."""
        del self._held[event]

    def synchronize(self) -> None:
        """Waits for the stream."""
        self._torch.cuda.synchronize()

    def free_bytes(self) -> int:
        """Memory that is free now."""
        return int(self._torch.cuda.mem_get_info()[0])

    def allocate(self, nbytes: int) -> int:
        """New memory."""
        return self._keep(self._torch.empty(nbytes, dtype=self._torch.uint8, device="cuda"))

    def free(self, address: int) -> None:
        """Lets memory go."""
        del self._held[address]

    def fill(self, address: int, nbytes: int) -> None:
        """Writes zeros, in the stream."""
        self._held[address][:nbytes].zero_()


def readings(found: Sequence[Probe], torch: Any, *, device: str = "cuda") -> Iterator[Reading]:
    """One reading for each probe; what this torch cannot do is said. Another device computes and times nothing."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as TensorRT does
    torch.backends.cudnn.benchmark = True
    for probe in found:
        try:
            steps = [step_of(probe, torch, count, device) for count in probe.steps]
            stream = TorchStream(torch)
            works = [_captured(step, probe, torch) for step in steps]
            rest_s = REST_S if probe.rate else 0.0
            timed = timings(stream, works, seconds=probe.seconds, rest_s=rest_s)
            kept = kept_share(torch, probe, device)
        except (RuntimeError, TypeError, AttributeError, NotImplementedError, TimingError) as error:
            yield Reading(probe=probe, failure=f"torch {torch.__version__}: {' '.join(str(error).split())[:200]}")
            continue
        yield Reading(probe=probe, timings=tuple(timed), kept=kept)
        works, steps = [], []
        torch.cuda.empty_cache()


def _captured(step: Callable[[], Any], probe: Probe, torch: Any) -> Work:
    """A graph of as many repeats as the probe asks for, warm."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside), torch.no_grad():
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        for _ in range(probe.repeats):
            step()
    return Work(enqueue=graph.replay, inferences=probe.repeats)


def step_of(probe: Probe, torch: Any, steps: int, device: str) -> Callable[[], Any]:
    """What a probe's graph of so many steps does, in torch's words; it keeps its tensors.

    Raises:
        TimingError: torch has no such product.
    """
    if probe.name == "start":
        return _chain(torch.nn.functional.max_pool2d, _random(torch, (1, 32, 14, 14), "float16", device), steps)
    if probe.name in ("dram", "l2"):
        size = steps * probe.nbytes // 6
        x, y = (_random(torch, (size,), "float16", device) for _ in range(2))
        out = torch.empty_like(x)
        return lambda: torch.add(x, y, out=out)
    if probe.name.startswith("matmul_"):
        return product(torch, probe.dtype, device)
    if probe.dtype in ("int8", "fp8"):
        raise TimingError(f"torch has no {probe.dtype} convolution")
    return _convolutions(probe, torch, steps, device)


def _random(torch: Any, shape: Sequence[int], dtype: str, device: str) -> Any:
    kind = getattr(torch, _DTYPES[dtype])
    if dtype == "int8":
        return torch.randint(-127, 128, tuple(shape), dtype=kind, device=device)
    return torch.randn(tuple(shape), device=device).to(kind)


def _chain(pool: Callable[..., Any], x: Any, steps: int) -> Callable[[], Any]:
    def run() -> Any:
        y = x
        for _ in range(steps):
            y = pool(y, 3, stride=1, padding=1)
        return y

    return run


def product(torch: Any, dtype: str, device: str) -> Callable[[], Any]:
    """A product of the probes' matrices; FP8 with scales of one, INT8 to INT32."""
    size = probe_sizes.SIZE
    a, b = (_random(torch, (size, size), dtype, device) for _ in range(2))
    if dtype == "int8":
        return lambda: torch._int_mm(a, b)
    if dtype == "fp8":
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    return lambda: torch.mm(a, b)


def _convolutions(probe: Probe, torch: Any, steps: int, device: str) -> Callable[[], Any]:
    """Convolutions that keep the shape, one after the other, channels last."""
    kernels = {"product_start_3x3": 3, "product_start_5x5": 5}
    shapes: dict[str, tuple[int, ...]] = {
        "product_start_3x3": (1, 64, 14, 14),
        "product_start_5x5": (1, 64, 14, 14),
        "depthwise_float16": (8, 256, 56, 56),
        "conv3d_float16": (1, 32, 48, 48, 48),
    }
    shape = shapes.get(probe.name, probe_sizes.IMAGE)
    groups, axes = (shape[1] if probe.name.startswith("depthwise") else 1), len(shape) - 2
    kernel = kernels.get(probe.name, 3)
    layout = torch.channels_last if axes == 2 else torch.channels_last_3d
    x = _random(torch, shape, probe.dtype, device).to(memory_format=layout)
    sizes = (shape[1], shape[1] // groups, *[kernel] * axes)
    weights = [
        (_random(torch, sizes, "float32", device) / math.sqrt(math.prod(sizes[1:])))
        .to(x.dtype)
        .to(memory_format=layout)
        for _ in range(steps)
    ]
    convolve = torch.nn.functional.conv2d if axes == 2 else torch.nn.functional.conv3d

    def run() -> Any:
        y = x
        for weight in weights:
            y = convolve(y, weight, padding=kernel // 2, groups=groups)
        return y

    return run


def kept_share(torch: Any, probe: Probe, device: str) -> float | None:
    """As `engines.timing.measure.kept_share`, of cuBLAS as torch calls it; None for other probes."""
    if probe.name != "matmul_float16":
        return None
    size = probe_sizes.SIZE
    x = torch.zeros((size, size), dtype=torch.float16, device=device)
    x[0] = torch.from_numpy(np.resize(accumulation_pattern(), size)).to(device)
    with nullcontext() if device == "cpu" else torch.cuda.device(0):
        got = torch.mm(x, torch.ones((size, size), dtype=torch.float16, device=device))[0, :8]
    return float(got.float().median().item()) / (size / PERIOD * (PERIOD - 2) * SMALL)


def accumulating_rate(torch: Any, probe: Probe) -> tuple[float, str]:
    """10^12 operations a second of FP16 products with FP16 accumulation allowed, sustained; 0 and why where it is not.

    Only torch 2.7 and newer can ask for it.
    """
    setting = torch.backends.cuda.matmul
    if not hasattr(setting, "allow_fp16_accumulation"):
        return 0.0, f"torch {torch.__version__} cannot ask for it"
    setting.allow_fp16_accumulation = True
    try:
        work = _captured(product(torch, "float16", "cuda"), probe, torch)
        (timing,) = timings(TorchStream(torch), [work], seconds=probe.seconds, rest_s=REST_S)
    finally:
        setting.allow_fp16_accumulation = False
    late = timing.between(timing.at_s[-1] / 2, timing.at_s[-1])
    return 2 * probe.macs / 1e6 / late.median_us, ""


def measured(torch: Any, seconds: float) -> MeasuredGpu:
    """The GPU by torch's own kernels.

    How cuBLAS accumulates says nothing of TensorRT, so that is left open; what FP16 would gain is measured.
    """
    card = card_of(torch)
    found = probes(card, seconds)
    read = tuple(readings(found, torch))
    said = fit(read, row_of(card), card.sms)
    rate, why = accumulating_rate(torch, next(p for p in found if p.name == "matmul_float16"))
    rates = {**said.measured.tera_ops, **({"float16_accumulating": rate} if rate else {})}
    asked = why or f"{rate:.1f} T/s sustained"
    said = replace(
        said,
        accumulation=None,
        measured=replace(said.measured, tera_ops=rates),
        evidence=(*(f"torch: {e}" for e in said.evidence), f"FP16 products that may accumulate in FP16: {asked}"),
    )
    name = f"torch {torch.__version__}"
    values = gpu_values(card, said)
    return MeasuredGpu(card=card, backend=name, version="", readings=read, fit=said, points=(), gpu=values)
