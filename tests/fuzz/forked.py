"""A server that has everything imported and forks for each command line, so that one takes milliseconds.

`Server.run` -> Outcome. A forked process has limits: CPU seconds, memory above what the server has, and a wall clock.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

CPU_S, WALL_S = 10, 90  # the issue is with time that is used: the machine may be busy
MEMORY = 2 << 30  # bytes above what the imports take


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a command line ended; `said` is what it printed on both streams."""

    code: int
    said: str
    seconds: float
    bytes: int


class Server:
    """A process that answers command lines; a context manager."""

    def __init__(self) -> None:
        """Start it."""
        command = [sys.executable, str(Path(__file__)), *map(str, sys.path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Server:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """End it."""
        self._process.communicate()

    def run(self, folder: Path, *arguments: str) -> Outcome:
        """`qdq` with these arguments in a folder; `python PROGRAM` runs a program in its place."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([str(folder), list(arguments)]) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))


def serve() -> None:
    """Answer until the input ends."""
    import numpy.random
    import onnxruntime

    import calib_data
    import engines
    import qdq
    from qdq.cli import entry

    assert numpy.random
    for package in (calib_data, engines, qdq):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    onnxruntime.set_default_logger_severity(4)
    gc.freeze()  # else a collection in a child touches, and thus copies, all of this
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    for line in sys.stdin:
        folder, arguments = json.loads(line)
        output = Path(folder).with_suffix(".said")
        began = time.monotonic()
        child = os.fork()
        if not child:
            os.setsid()
            os.chdir(folder)
            with output.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 2 * MEMORY,) * 2)
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 1))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            code = 70
            try:
                if arguments[0] == "python":
                    exec(arguments[1], {})
                    code = 0
                else:
                    sys.argv = ["qdq", *arguments]
                    entry.main()
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code, peak = _waited(child)
        said = output.read_text(encoding="utf-8", errors="replace")
        output.unlink()
        answer = {"code": code, "said": said, "seconds": time.monotonic() - began, "bytes": max(peak - held, 0)}
        print(json.dumps(answer), flush=True)


def _waited(child: int) -> tuple[int, int]:
    """The exit code of a child, negative for a signal, and its peak of memory; a child that hangs is killed."""
    until = time.monotonic() + WALL_S
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss << 10
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.002)


if __name__ == "__main__":
    sys.path[:] = sys.argv[1:]
    serve()
