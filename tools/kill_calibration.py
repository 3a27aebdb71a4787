"""Kill a calibration at random moments and compare what it ends with to an undisturbed one.

    python tools/kill_calibration.py MODEL.onnx DATA [KILLS]

Each round starts `qdq calibrate`, sends SIGKILL at a random moment of its run, repeats the same command until it ends,
and compares the table byte by byte. Files other than the table, its checkpoint and their temporary names are a failure.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ALLOWED = {"table.json", ".table.json.part", ".table.json.checkpoint", ".table.json.checkpoint.part"}


def main(model: str, data: str, kills: int = 50) -> None:
    """Run the rounds; exits with 1 at the first difference."""
    moments = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.json"
        command = [sys.executable, "-m", "qdq", "calibrate", model, "--data", data, "-o", str(table)]
        began = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        duration_s, expected = time.monotonic() - began, table.read_bytes()
        table.unlink()
        killed = continued = complete = 0
        while killed < kills:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                process.wait(moments.uniform(0, duration_s))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                killed += 1
                continued += (table.parent / ".table.json.checkpoint").exists()
            odd = {path.name for path in table.parent.iterdir()} - ALLOWED
            if odd or (table.exists() and table.read_bytes() != expected):
                sys.exit(f"after kill {killed}: {sorted(odd) or 'another table'}")
            if process.returncode == 0:
                complete += 1
                table.unlink()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if table.read_bytes() != expected or [p.name for p in table.parent.iterdir()] != ["table.json"]:
            sys.exit("the last run ended differently")
    print(f"{killed} kills, {continued} left a checkpoint, {complete + 1} runs ended: every table identical")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4]))
