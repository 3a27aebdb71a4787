"""Memory and time of a whole-volume run with a network that costs nothing, so that what is left is the sliding window.

    python tools/bench_volumes.py [--shape 512x512x600] [--classes 105] [--window 96x96x96:overlap=0.25] [--memory 4G]

Prints the largest resident memory of the process in its whole life, the windows that ran, and how many of these ran
once more because a slab did not fit. Run it in a fresh process for each number of classes.
"""

from __future__ import annotations

import argparse
import resource
import time
from typing import Any

import numpy as np

from qdq.build.keys.window import Window
from qdq.core.resources import parse_bytes, within
from qdq.deploy.volumes.decode import Classes
from qdq.deploy.volumes.sliding import Sliding


def main() -> None:
    """Make labels of one random volume."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="512x512x600")
    parser.add_argument("--classes", type=int, default=105)
    parser.add_argument("--window", default="96x96x96:overlap=0.25")
    parser.add_argument("--memory", default="4G")
    args = parser.parse_args()
    shape = tuple(int(n) for n in args.shape.split("x"))
    volume = np.random.default_rng(0).random((1, *shape), np.float32)
    slopes = np.linspace(-1, 1, args.classes, dtype=np.float32)

    def run(patches: np.ndarray) -> Any:
        made = np.empty((len(patches), args.classes, *patches.shape[2:]), np.float32)
        for channel, slope in enumerate(slopes):
            np.multiply(patches[:, 0] - np.float32(0.5), slope, out=made[:, channel])
        return made

    decoder = Classes(channels=args.classes)
    labels = np.zeros(shape, decoder.dtype)
    sliding, begin = Sliding(run=run, window=Window.parse(args.window)), time.monotonic()
    with within(parse_bytes(args.memory)):
        for part in sliding.parts(volume):
            labels[part.place] = decoder.labels(part.values)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    expected = np.where(volume[0] > 0.5, args.classes - 1, 0)
    wrong = int(np.count_nonzero((labels != expected) & (np.abs(volume[0] - 0.5) > 1e-5)))
    print(
        f"{args.shape}, {args.classes} classes, {args.window}, --memory {args.memory}: {used / 1e9:.2f} GB resident, "
        f"{time.monotonic() - begin:.0f} s, {sliding.runs} windows, {sliding.repeated} of them repeated, {wrong} wrong"
    )


if __name__ == "__main__":
    main()
