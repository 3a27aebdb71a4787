"""Clocks, power and temperature of a GPU while something runs on it, through NVIDIA's management library.

PCI address -> `Monitor` (a context manager with a thread) -> `Watched`: before, during, after.
Must not fail a measurement: without the library there are no figures, and a reason.

Source: NVML API reference (nvmlDeviceGetClockInfo, nvmlDeviceGetPowerUsage, ..), libnvidia-ml.so.1.
"""

from __future__ import annotations

import ctypes
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from statistics import median
from threading import Event, Thread
from types import TracebackType
from typing import Any

from engines.backends.doctor import NVML

LIBRARY = NVML
_SM, _MEMORY = 1, 2  # nvmlClockType_t
EVERY_S = 0.1
# nvmlClocksThrottleReasons, what an owner can change
REASONS = {0x4: "power cap", 0x8: "hardware slowdown", 0x20: "temperature", 0x40: "hardware temperature", 0x80: "brake"}


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """One look: MHz, watts, degrees Celsius, and why the clock is held down; None where NVML does not say."""

    at_s: float
    sm_mhz: int | None
    memory_mhz: int | None
    watts: float | None
    celsius: int | None
    held: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What was seen of a GPU; `why_not` says why nothing was."""

    driver: str = ""
    limit_watts: float | None = None
    states: tuple[State, ...] = ()
    why_not: str = ""

    def summary(self) -> str:
        """One line: clocks and power before, during (median, and lowest clock) and after."""
        if not self.states:
            return f"not known: {self.why_not}"
        first, last = self.states[0], self.states[-1]
        busy = [s for s in self.states[1:-1] if s.watts is not None and s.sm_mhz] or [last]
        clocks, power = [s.sm_mhz or 0 for s in busy], [s.watts or 0.0 for s in busy]
        held = sorted({reason for s in self.states for reason in s.held})
        limit = "" if self.limit_watts is None else f" of {self.limit_watts:.0f}"
        return (
            f"SM clock {first.sm_mhz} before, {median(clocks):.0f} during (lowest {min(clocks)}), {last.sm_mhz} after "
            f"MHz; power {first.watts or 0:.0f}, {median(power):.0f} (most {max(power):.0f}{limit}), "
            f"{last.watts or 0:.0f} W; {last.celsius} C" + (f"; held down by {', '.join(held)}" if held else "")
        )

    def to_mapping(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


class Monitor(AbstractContextManager["Monitor"]):
    """Looks at a GPU every 0.1 s from a thread of its own, before the first and after the last thing inside too."""

    def __init__(self, bus: str) -> None:
        """The GPU of that PCI address."""
        self._bus, self._over, self._states = bus, Event(), list[State]()
        self._nvml: Any = None
        self._handle, self._why, self._driver, self._limit = ctypes.c_void_p(), "", "", list[float]()
        self._began, self._thread = time.monotonic(), Thread(target=self._look_on, daemon=True, name="gpu monitor")

    def __enter__(self) -> Monitor:
        """Looks once, then goes on."""
        try:
            self._nvml = ctypes.CDLL(LIBRARY)
            handle = ctypes.byref(self._handle)
            if self._nvml.nvmlInit_v2() or self._nvml.nvmlDeviceGetHandleByPciBusId_v2(self._bus.encode(), handle):
                self._nvml, self._why = None, "the management library does not show this GPU"
                return self
        except (OSError, AttributeError) as error:  # not there, or another library of that name
            self._nvml, self._why = None, f"no management library ({error})"
            return self
        text, limit = ctypes.create_string_buffer(80), ctypes.c_uint()
        if not self._nvml.nvmlSystemGetDriverVersion(text, len(text)):
            self._driver = text.value.decode()
        if not self._nvml.nvmlDeviceGetEnforcedPowerLimit(self._handle, ctypes.byref(limit)):
            self._limit.append(limit.value / 1e3)
        self._states.append(self._look())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Looks a last time."""
        self._over.set()
        if self._nvml is not None:
            self._thread.join()
            self._states.append(self._look())
            self._nvml.nvmlShutdown()

    def watched(self) -> Watched:
        """What was seen so far."""
        limit = self._limit[0] if self._limit else None
        return Watched(driver=self._driver, limit_watts=limit, states=tuple(self._states), why_not=self._why)

    def _look_on(self) -> None:
        while not self._over.wait(EVERY_S):
            self._states.append(self._look())

    def _look(self) -> State:
        milliwatts = self._figure("nvmlDeviceGetPowerUsage")
        reasons = ctypes.c_ulonglong()
        with suppress(AttributeError):  # a newer library may have only its new name
            self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle, ctypes.byref(reasons))
        return State(
            at_s=time.monotonic() - self._began,
            sm_mhz=self._figure("nvmlDeviceGetClockInfo", _SM),
            memory_mhz=self._figure("nvmlDeviceGetClockInfo", _MEMORY),
            watts=None if milliwatts is None else milliwatts / 1e3,
            celsius=self._figure("nvmlDeviceGetTemperature", 0),
            held=tuple(text for bit, text in REASONS.items() if reasons.value & bit),
        )

    def _figure(self, name: str, *arguments: int) -> int | None:
        value = ctypes.c_uint()
        return None if getattr(self._nvml, name)(self._handle, *arguments, ctypes.byref(value)) else value.value
