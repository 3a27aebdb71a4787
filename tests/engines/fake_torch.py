"""What `gpu_torch.py` uses of PyTorch, by its real names, on the clocks of a fake GPU."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
from fake_gpu import FakeCuda, FakeKernel


class Tensor:
    """A shape and a type; values only where sums are looked at."""

    def __init__(self, shape: tuple[int, ...], dtype: str, values: np.ndarray | None = None) -> None:
        self.shape, self.dtype, self.values = shape, dtype, values

    def to(self, kind: Any = None, *, memory_format: str = "") -> Tensor:
        kept = kind if isinstance(kind, str) and kind != "cuda" else self.dtype
        return Tensor(self.shape, kept, self.values)

    def t(self) -> Tensor:
        return self

    def __truediv__(self, by: float) -> Tensor:
        return self

    def __getitem__(self, key: Any) -> Tensor:
        return self if self.values is None else Tensor((), self.dtype, self.values[key])

    def __setitem__(self, key: Any, value: Tensor) -> None:
        assert self.values is not None
        self.values[key] = value.values

    def float(self) -> Tensor:
        return self

    def median(self) -> Tensor:
        return self

    def item(self) -> float:
        assert self.values is not None
        return float(np.median(self.values))


def fake_torch(cuda: FakeCuda, rates: dict[str, float], *, start_us: float, product_us: float, gb_s: float) -> Any:
    """The module; 10^12 operations a second by type, 'float16_accumulating' where that is allowed."""
    matmul = SimpleNamespace(allow_tf32=False, allow_fp16_accumulation=False)

    def multiply(a: Tensor, macs: float) -> None:
        kind = "float16_accumulating" if a.dtype == "float16" and matmul.allow_fp16_accumulation else a.dtype
        us = start_us + product_us + 2 * macs / rates[kind] / 1e6
        cuda.tick("launch")
        cuda.work(FakeKernel("product", lambda _: us))

    def move(shape: tuple[int, ...], count: int) -> None:
        us = start_us + 2 * count * math.prod(shape) / gb_s / 1e3
        cuda.tick("launch")
        cuda.work(FakeKernel("moved", lambda _: us))

    def mm(a: Tensor, b: Tensor, **_: Any) -> Tensor:
        multiply(a, a.shape[0] * a.shape[1] * b.shape[1])
        exact = None if a.values is None else np.full(a.shape, a.values[0].astype(np.float64).sum())
        return Tensor(a.shape, a.dtype, exact)

    def conv(x: Tensor, w: Tensor, *, padding: int, groups: int) -> Tensor:
        multiply(x, math.prod(x.shape) * math.prod(w.shape[1:]))
        return x

    def max_pool2d(x: Tensor, kernel: int, *, stride: int, padding: int) -> Tensor:
        move(x.shape, 0)
        return x

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing
            self.number = SimpleNamespace(value=cuda.number())

        def record(self) -> None:
            cuda.cuEventRecord(self.number, None)

        def query(self) -> bool:
            return cuda.cuEventQuery(self.number) == 0

        def elapsed_time(self, other: Event) -> float:
            passed = SimpleNamespace(_obj=SimpleNamespace(value=0.0))
            cuda.cuEventElapsedTime(passed, self.number, other.number)
            return float(passed._obj.value)

    class CUDAGraph:
        kernels: list[FakeKernel]

        def replay(self) -> None:
            cuda.tick("replay")
            for kernel in self.kernels:
                cuda.work(kernel)

    @contextlib.contextmanager
    def graph(made: CUDAGraph) -> Iterator[None]:
        cuda.captured = []
        yield
        made.kernels, cuda.captured = cuda.captured, None

    stream = SimpleNamespace(wait_stream=lambda other: None)
    props = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=141 << 30,
        L2_cache_size=50 << 20, clock_rate=1_980_000,
    )  # fmt: skip
    return SimpleNamespace(
        __version__="2.13.0",
        version=SimpleNamespace(cuda="13.0"),
        float16="float16", float32="float32", bfloat16="bfloat16", int8="int8", float8_e4m3fn="fp8", uint8="uint8",
        channels_last="last", channels_last_3d="last3",
        backends=SimpleNamespace(
            cuda=SimpleNamespace(matmul=matmul), cudnn=SimpleNamespace(allow_tf32=False, benchmark=False)
        ),
        nn=SimpleNamespace(functional=SimpleNamespace(max_pool2d=max_pool2d, conv2d=conv, conv3d=conv)),
        randn=lambda shape, device: Tensor(shape, "float32"),
        randint=lambda low, high, shape, dtype, device: Tensor(shape, dtype),
        zeros=lambda shape, dtype, device: Tensor(shape, dtype, np.zeros(shape, np.float16)),
        ones=lambda shape, device, dtype="float32": Tensor(shape, dtype),
        empty=lambda size, dtype, device: Filled(cuda, size),
        empty_like=lambda x: x,
        from_numpy=lambda array: Tensor(array.shape, "float16", array),
        add=lambda x, y, out: move(x.shape, 3),
        mm=mm,
        _int_mm=mm,
        _scaled_mm=lambda a, b, scale_a, scale_b, out_dtype: mm(a, b),
        no_grad=contextlib.nullcontext,
        cuda=SimpleNamespace(
            is_available=lambda: True, get_device_properties=lambda index: props, Event=Event, CUDAGraph=CUDAGraph,
            graph=graph, Stream=lambda: stream, current_stream=lambda: stream, empty_cache=lambda: None,
            stream=lambda aside: contextlib.nullcontext(), device=lambda index: contextlib.nullcontext(),
            synchronize=lambda: cuda.cuStreamSynchronize(None), mem_get_info=lambda: (100 << 30, 141 << 30),
        ),
    )  # fmt: skip


class Filled:
    """Memory that only zeros are written to."""

    def __init__(self, cuda: FakeCuda, size: int) -> None:
        self.cuda, self.size = cuda, size

    def __getitem__(self, part: slice) -> Filled:
        return Filled(self.cuda, int(part.stop))

    def zero_(self) -> None:
        self.cuda.tick("fill")
        self.cuda.work(FakeKernel("fill", lambda _: self.size / 1e6))
