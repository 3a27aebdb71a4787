"""The machine and the packages of a run, as far as they shape its results. Must not tell whose machine it is."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from importlib import metadata

from engines.backends.doctor import driver_version, gpus
from engines.core.documents import Part
from qdq.core.errors import InputError

EPOCH = "SOURCE_DATE_EPOCH"  # reproducible-builds.org: seconds since 1970 that stand for the time of a build


class HostGpu(Part, frozen=True, kw_only=True):
    """A GPU of the machine, by the driver's name."""

    name: str
    target: str
    memory_bytes: int


class Host(Part, frozen=True, kw_only=True):
    """A machine.

    Attributes:
        system: and its release, like 'Linux 6.8.0'.
        machine: like 'x86_64'.
        cpus: that the system shows.
        python: version and implementation.
        gpus: NVIDIA's.
        gpu_driver: its version; "" where there is none, or it does not say.
    """

    system: str
    machine: str
    cpus: int
    python: str
    gpus: tuple[HostGpu, ...] = ()
    gpu_driver: str = ""

    @classmethod
    def here(cls) -> Host:
        """This machine."""
        found = tuple(HostGpu(name=g.name, target=g.target, memory_bytes=g.memory_bytes) for g in gpus())
        return cls(
            system=f"{platform.system()} {platform.release()}",
            machine=platform.machine(),
            cpus=os.cpu_count() or 1,
            python=f"{platform.python_version()} ({platform.python_implementation()})",
            gpus=found,
            gpu_driver=driver_version() if found else "",
        )


def loaded_packages() -> dict[str, str]:
    """Name -> version of every distribution of which this process has loaded a module."""
    loaded = {name.partition(".")[0] for name in list(sys.modules)}
    names = {name for module, some in metadata.packages_distributions().items() if module in loaded for name in some}
    return {name: metadata.version(name) for name in sorted(names, key=str.lower)}


def moment() -> str:
    """Now in UTC, as ISO 8601 to the second; or the time that SOURCE_DATE_EPOCH says.

    Raises:
        InputError: that is no whole number of seconds.
    """
    said = os.environ.get(EPOCH, "")
    try:
        found = datetime.fromtimestamp(int(said), UTC) if said else datetime.now(UTC)
    except (ValueError, OverflowError, OSError):
        raise InputError(f"{EPOCH} is {said!r}: it must be whole seconds since 1970-01-01, or not set.") from None
    return found.strftime("%Y-%m-%dT%H:%M:%SZ")
