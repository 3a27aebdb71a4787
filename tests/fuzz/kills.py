"""Kill runs at random moments, and look for what they leave: processes, files, results that are not whole.

    python tests/fuzz/kills.py [KILLS] [--seed N]

Each round starts one of `deploy`, `quantize`, `calibrate` and `calibrate --workers 2` on a small network, in the folder
that the rounds before have left, and sends SIGKILL, SIGTERM or SIGINT at a random moment. Then, 5 seconds after the end
of the run at most, no process of it may live, its exit code must be that of the signal (before Python has come to qdq,
the system's own), and every result in the folder must be that of an undisturbed run. At the end each command runs to
its end: its table is the undisturbed one byte by byte, and nothing else lies in its folder or in that for temporary
files.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a program

from fuzz.mutate import valid

GONE_S, ENDED_S = 5.0, 30.0  # of what a run leaves behind, and of the run itself, however busy the machine is
SIGNALS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
STARTING = {signal.SIGINT: {1}}  # how Python ends before `main`, besides by the signal: its own modules are not loaded
OTHERS = {".ses"}  # which ONNX Runtime writes when it is imported
RESULTS = {
    "deploy": {"out"},
    "quantize": {"q.onnx"},
    "calibrate": {"table.json"},
    "workers": {"table2.json"},
}


def commands(inputs: Path) -> dict[str, list[str]]:
    """The command line of each kind of run."""
    model, data = str(inputs / "model.onnx"), str(inputs / "samples")
    calibrate = ["calibrate", model, "--data", data, "-o"]
    lines = {
        "deploy": ["deploy", model, "--data", data, "--tune", "off", "--out", "out"],
        "quantize": ["quantize", model, "--data", data, "-o", "q.onnx"],
        "calibrate": [*calibrate, "table.json"],
        "workers": [*calibrate, "table2.json", "--workers", "2"],
    }
    return {name: [sys.executable, "-m", "qdq", *line] for name, line in lines.items()}


def started(command: list[str], folder: Path, temporary: Path) -> subprocess.Popen[bytes]:
    """The run, in a session of its own, by which its processes are found."""
    environment = {**os.environ, "TMPDIR": str(temporary)}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def alive(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def begun(pid: int) -> bool:
    """Whether qdq's handlers stand in a process, or stood: SIGTERM is caught, or ignored at the end."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    masks = [int(line.split()[1], 16) for line in text.splitlines() if line.startswith(("SigCgt:", "SigIgn:"))]
    return any(mask >> (signal.SIGTERM - 1) & 1 for mask in masks)


def results(folder: Path) -> dict[str, str]:
    """The results that lie in a folder with their hashes; engines, whose bytes differ from run to run, by name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            differs = name.startswith("out/") and path.suffix in (".engine", ".json")
            found[name] = "" if differs else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def main() -> None:
    """Run the rounds; ends with 1 at the first fault."""
    parser = ArgumentParser(description="Kill runs at random moments and look for what they leave.")
    parser.add_argument("kills", type=int, nargs="?", default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    moments, counted, slowest = random.Random(given.seed), Counter[str](), 0.0
    with tempfile.TemporaryDirectory() as place:
        data, whole, folder, temporary = (Path(place) / name for name in ("data", "whole", "run", "tmp"))
        for path in (data, whole, folder, temporary):
            path.mkdir()
        valid(data, samples=12)
        lines, durations = commands(data), {}
        for name, line in lines.items():
            began = time.monotonic()
            if started(line, whole, temporary).wait():
                sys.exit(f"{name} does not run undisturbed")
            durations[name] = time.monotonic() - began
        expected = results(whole)
        if left := {p.name for p in temporary.iterdir()} - OTHERS:
            sys.exit(f"undisturbed runs left {left}")
        for number in range(given.kills):
            name, kind = moments.choice(list(lines)), moments.choice(list(SIGNALS))
            process = started(lines[name], folder, temporary)
            try:
                code = process.wait(moments.uniform(0, durations[name]))
                counted["ended before"] += 1
            except subprocess.TimeoutExpired:
                codes = {SIGNALS[kind], 0}
                codes |= set() if begun(process.pid) else {-kind, *STARTING.get(kind, ())}
                process.send_signal(kind) if kind == signal.SIGKILL else os.killpg(process.pid, kind)
                began = time.monotonic()
                try:
                    code = process.wait(ENDED_S)
                except subprocess.TimeoutExpired:
                    sys.exit(f"kill {number} ({name}, {kind.name}): the run goes on after {ENDED_S} s")
                ended = time.monotonic()
                slowest = max(slowest, ended - began)
                while (living := alive(process.pid)) and time.monotonic() < ended + GONE_S:
                    time.sleep(0.05)
                if living:
                    sys.exit(f"kill {number} ({name}, {kind.name}): {len(living)} processes live {GONE_S} s after it")
                if code not in codes:
                    sys.exit(f"kill {number} ({name}, {kind.name}): exit code {code}")
                counted[kind.name] += 1
            found = results(folder)
            deployed = {n for n in found if n.startswith("out/")}
            odd = {n for n, digest in found.items() if expected.get(n) != digest}
            if odd or deployed not in (set(), {n for n in expected if n.startswith("out/")}):
                sys.exit(f"kill {number} ({name}, {kind.name}): not whole: {sorted(odd or deployed)}")
        time.sleep(3)  # what is younger than that may be of a run that has just begun
        for name, line in lines.items():
            if started(line, folder, temporary).wait():
                sys.exit(f"{name} does not go on")
        names = {path.name for path in folder.iterdir()}
        litter = names - set().union(*RESULTS.values()) | {path.name for path in temporary.iterdir()} - OTHERS
        if litter or results(folder) != expected:
            sys.exit(f"the next runs left {sorted(litter)}, or other results")
    print(
        f"{given.kills} rounds ({dict(counted)}): no process lives, every result is whole, nothing is left; "
        f"the slowest ended {slowest:.1f} s after its signal"
    )


if __name__ == "__main__":
    main()
