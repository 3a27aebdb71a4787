"""The machine and the packages of a run, as far as they shape its results. Must not tell whose machine it is."""

from __future__ import annotations

import os
import platform
import re
from datetime import UTC, datetime
from importlib import metadata

from engines.backends.doctor import driver_version, gpus
from engines.core.documents import Part
from qdq.core.errors import InputError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # at the start of a requirement (PEP 508)
_EXTRA, _TOOLS = re.compile("extra =="), re.compile("extra == .(dev|test)")
_REPEATED = re.compile(r"[-_.]+")  # of a name in its one form (PEP 503)

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


def packages() -> dict[str, str]:
    """Name -> version, where installed, of qdq, of what it and its extras but those of developers need, and so on."""
    found: dict[str, str] = {}
    waiting = [("qdq", True)]
    while waiting:
        name, with_extras = waiting.pop()
        key = _REPEATED.sub("-", name).lower()
        if key in found:
            continue
        try:
            held = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        found[key] = held.version
        needs = [need for need in held.requires or () if not (_TOOLS if with_extras else _EXTRA).search(need)]
        waiting += [(match[0], False) for need in needs if (match := _NAME.match(need))]
    return dict(sorted(found.items()))


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
