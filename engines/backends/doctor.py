"""What works on this machine: runtimes, versions, GPUs, and what to install for the rest.

Package metadata and the CUDA driver -> `Diagnosis` rows, and `lacking` for a purpose -> printed by `qdq doctor`.
`diagnose` imports no heavy runtime: metadata and the driver library say enough. `lacking` does, for a library that is
missing shows only then.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar, NamedTuple

from engines.backends.backend import Backend, backends
from engines.backends.profile import profiles
from engines.core.documents import Document, Part
from engines.core.errors import MissingRuntimeError, how_to_install, import_runtime


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledGpu:
    """One NVIDIA GPU: its name, its target (like 'sm89') and its memory in bytes."""

    name: str
    target: str
    memory_bytes: int


class Diagnosis(Part, frozen=True, kw_only=True):
    """One thing that works here or does not; `fix` is '' where nothing is to be done."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


class Doctor(Document, frozen=True, kw_only=True):
    """What `qdq doctor` says.

    Attributes:
        version: of qdq, "" where it is not installed.
        python: its version.
        findings: runtimes, GPUs, and which verbs work.
        purpose: that was asked for, "" for none.
        lacking: what is missing for it, one sentence each; empty where it works here.
    """

    FORMAT: ClassVar[str] = "qdq.doctor/1"
    MAKE: ClassVar[str] = "qdq doctor --json"

    version: str
    python: str
    findings: tuple[Diagnosis, ...]
    purpose: str
    lacking: tuple[str, ...]


class _Runtime(NamedTuple):
    module: str
    packages: tuple[str, ...]
    purpose: str


_QDQ = _Runtime("qdq", ("qdq",), "this program")
_ONNX_RUNTIME = _Runtime("onnxruntime", ("onnxruntime", "onnxruntime-gpu"), "calibrate and check")
_POLYGRAPHY = _Runtime("polygraphy", ("polygraphy",), "compare and run engines")

DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
NVML = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*, cuda.h


def gpus() -> list[InstalledGpu]:
    """The GPUs that the CUDA driver sees; empty without a driver.

    Source: CUDA driver API (cuInit, cuDeviceGet*, cuDeviceTotalMem_v2).
    """
    try:
        cuda = ctypes.CDLL(DRIVER)
    except OSError:
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
        found.append(InstalledGpu(name=text.value.decode(), target=target, memory_bytes=memory.value))
    return found


def driver_version() -> str:
    """The version of the GPU's driver, like '580.95.05'; "" where the management library does not say.

    Source: NVML API reference, nvmlSystemGetDriverVersion.
    """
    text = ctypes.create_string_buffer(80)
    try:
        nvml = ctypes.CDLL(NVML)
        if nvml.nvmlInit_v2():
            return ""
        failed = nvml.nvmlSystemGetDriverVersion(text, len(text))
        nvml.nvmlShutdown()
    except (OSError, AttributeError):  # not there, or another library of that name
        return ""
    return "" if failed else text.value.decode(errors="replace")


def _version(runtime: _Runtime) -> str:
    """The installed version of a runtime, or ''."""
    from importlib import metadata  # takes 20 ms

    for package in runtime.packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "unknown version" if find_spec(runtime.module) else ""


def diagnose() -> list[Diagnosis]:
    """One row per runtime, then the GPUs, then which verbs will work. A row that is not ok says how to fix it."""
    compilers = backends().values()
    purpose = {True: "compile on the GPU", False: "compile engines without a GPU"}
    needed = [_Runtime(b.runtime, b.packages, purpose[b.needs_gpu]) for b in compilers]
    runtimes = (_ONNX_RUNTIME, *needed, _POLYGRAPHY)
    versions = {r.module: _version(r) for r in runtimes}
    described = {b.runtime: _described(b, versions[b.runtime]) for b in compilers}
    rows = []
    for r in runtimes:
        version, fix = versions[r.module], "" if versions[r.module] else how_to_install(r.module)
        detail = f"{version or 'not installed'} ({r.purpose}{described.get(r.module, '')})"
        rows.append(Diagnosis(name=r.module, ok=bool(version), detail=detail, fix=fix))
    cards = gpus()
    details = [f"{g.name}, {g.target}, {g.memory_bytes / 2**30:.0f} GiB" for g in cards]
    rows += [Diagnosis(name="GPU", ok=True, detail=detail) for detail in details]
    if not cards:
        free = " or ".join(f"--compiler {b.compiler}" for b in compilers if not b.needs_gpu)
        fix = f"not needed to quantize, compile ({free}) or audit; run engines on a machine with a GPU"
        rows.append(Diagnosis(name="GPU", ok=False, detail="no NVIDIA GPU or driver found", fix=fix))
    for b in compilers:
        fix = how_to_install(b.runtime) + (" on a machine with an NVIDIA GPU" if b.needs_gpu else "")
        if b.needs_gpu:
            fix += "; without it `qdq deploy` writes all but the engine, and says how that is built"
        works = bool(versions[b.runtime]) and (bool(cards) or not b.needs_gpu)
        rows.append(_ability(f"compile with {b.title}", works, fix))
    checks = bool(versions["onnxruntime"] and versions["polygraphy"])
    runs = any(versions[b.runtime] for b in compilers) and bool(cards)
    return [
        *rows,
        _ability("run engines", runs, "a machine with an NVIDIA GPU; until then the Q/DQ model stands in"),
        _ability("check accuracy", checks, how_to_install("onnxruntime")),
    ]


def examined(purpose: str = "", backend: Backend | None = None) -> Doctor:
    """This machine, and what it lacks for a purpose, where one is asked for."""
    missing = lacking(purpose, backend) if purpose else []
    return Doctor(
        version=_version(_QDQ),
        python=sys.version.split()[0],
        findings=tuple(diagnose()),
        purpose=purpose,
        lacking=tuple(missing),
    )


PURPOSES = {
    "prepare": "quantize, compile and check without a GPU",
    "build": "build an engine with the compiler",
    "run": "run an engine of the compiler on a GPU",
}


def lacking(purpose: str, backend: Backend | None = None) -> list[str]:
    """What is missing here for one of `PURPOSES`, one sentence each; the runtimes that it needs are imported.

    Args:
        backend: the compiler; None is satisfied by any that does it.
    """
    missing = [] if purpose == "run" else [*filter(None, map(_why_not, ("onnxruntime", "polygraphy")))]
    here, refused = bool(gpus()), list[str]()
    for one in backends().values() if backend is None else (backend,):
        if purpose == "prepare" and backend is None and one.needs_gpu:
            continue
        why = _why_not(one.runtime)
        if not why and not here and (purpose == "run" or (purpose == "build" and one.needs_gpu)):
            why = f"{one.title} needs an NVIDIA GPU and its driver, and none is found."
        if not why:
            return missing
        refused.append(why)
    return list(dict.fromkeys([*missing, *refused]))


def _why_not(module: str) -> str:
    """Why a runtime cannot be imported; "" where it can."""
    try:
        import_runtime(module)
    except MissingRuntimeError as error:
        return str(error)
    return ""


def _described(backend: Backend, version: str) -> str:
    """How `--compiler` names the version that is installed; what it takes where none is, or none is known so."""
    known = [p for p in profiles().values() if p.backend == backend.name]
    own = [p.key for p in known if version and p.same_compiler(backend.name, version)]
    if version and not own:
        return f": no profile is of this version; there are {', '.join(p.key for p in known)}"
    return f": --compiler {' or '.join(own or [p.key for p in known])}"


def _ability(name: str, ok: bool, fix: str) -> Diagnosis:
    return Diagnosis(name=name, ok=ok, detail="works here" if ok else "does not work here", fix="" if ok else fix)
