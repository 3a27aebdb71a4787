"""What works on this machine: runtimes, versions, GPUs, and what to install for the rest.

Package metadata and the CUDA driver -> `Finding` rows -> printed by `qdq doctor`.
Must not import a heavy runtime: metadata and the driver library say enough.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU: its name, its target (like 'sm89') and its memory in bytes."""

    name: str
    target: str
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that works here or does not; `fix` is '' where nothing is to be done."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Runtime:
    module: str
    packages: tuple[str, ...]
    purpose: str
    extra: str


_RUNTIMES = (
    _Runtime(
        module="onnxruntime", packages=("onnxruntime", "onnxruntime-gpu"), purpose="calibrate and check", extra="cpu"
    ),
    _Runtime(
        module="tensorrt_rtx",
        packages=("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt_rtx"),
        purpose="compile engines without a GPU",
        extra="cpu",
    ),
    _Runtime(module="polygraphy", packages=("polygraphy",), purpose="compare and run engines", extra="cpu"),
    _Runtime(
        module="tensorrt",
        packages=("tensorrt-cu13", "tensorrt-cu12", "tensorrt"),
        purpose="compile on the GPU",
        extra="gpu",
    ),
)

_DRIVERS = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1",)
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*, cuda.h


def gpus() -> list[Gpu]:
    """The GPUs that the CUDA driver sees; empty without a driver.

    Source: CUDA driver API (cuInit, cuDeviceGet*, cuDeviceTotalMem_v2).
    """
    for name in _DRIVERS:
        try:
            cuda = ctypes.CDLL(name)
            break
        except OSError:
            continue
    else:
        return []
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found = []
    for index in range(count.value):
        device, text, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
        capability = [ctypes.c_int(), ctypes.c_int()]
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetName(text, len(text), device)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        for value, attribute in zip(capability, (_MAJOR, _MINOR), strict=True):
            cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        target = f"sm{capability[0].value}{capability[1].value}"
        found.append(Gpu(name=text.value.decode(), target=target, memory_bytes=memory.value))
    return found


def _version(runtime: _Runtime) -> str:
    """The installed version of a runtime, or ''."""
    from importlib import metadata  # takes 20 ms

    for package in runtime.packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "unknown version" if find_spec(runtime.module) else ""


def diagnose() -> list[Finding]:
    """Which runtimes and GPUs are here, and which verbs will work.

    Returns:
        One row per runtime, then the GPUs, then what can be done. A row that is not ok says how to fix it.
    """
    versions = {r.module: _version(r) for r in _RUNTIMES}
    rows = [
        Finding(
            name=r.module,
            ok=bool(versions[r.module]),
            detail=f"{versions[r.module] or 'not installed'} ({r.purpose})",
            fix="" if versions[r.module] else f"pip install 'qdq[{r.extra}]'",
        )
        for r in _RUNTIMES
    ]
    cards = gpus()
    rows += [
        Finding(name="GPU", ok=True, detail=f"{g.name}, {g.target}, {g.memory_bytes / 2**30:.0f} GiB") for g in cards
    ]
    if not cards:
        rows.append(
            Finding(
                name="GPU",
                ok=False,
                detail="no NVIDIA GPU or driver found",
                fix="not needed to quantize, compile (--backend rtx) or audit; run engines on a machine with a GPU",
            )
        )
    rtx, trt, ort = (bool(versions[m]) for m in ("tensorrt_rtx", "tensorrt", "onnxruntime"))
    return [
        *rows,
        _ability("compile with TensorRT-RTX", rtx, "pip install 'qdq[cpu]'"),
        _ability(
            "compile with TensorRT", trt and bool(cards), "pip install 'qdq[gpu]' on a machine with an NVIDIA GPU"
        ),
        _ability(
            "run engines",
            (rtx or trt) and bool(cards),
            "a machine with an NVIDIA GPU; until then the Q/DQ model stands in",
        ),
        _ability("check accuracy", ort and bool(versions["polygraphy"]), "pip install 'qdq[cpu]'"),
    ]


def _ability(name: str, ok: bool, fix: str) -> Finding:
    """One row about what can be done."""
    return Finding(name=name, ok=ok, detail="works here" if ok else "does not work here", fix="" if ok else fix)
