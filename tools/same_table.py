"""Calibrate a 3-D network in every way there is and compare the tables byte by byte.

    python tools/same_table.py [--volumes 16]

MONAI's UNet (channels 16 to 256, 96^3, open batch size) on random volumes: forwards and backwards, in batches of 4 and
16, within a small memory budget, on two processes, and on a Dask cluster of two worker processes on loopback, one of
which is killed when the first shard is done. Needs torch, monai and distributed. Exits with 1 at a difference.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from bench_calibration import export
from results import record

from calib_data import open_samples
from qdq.core.resources import parse_bytes
from qdq.measure.collect import collect
from qdq.measure.inference.inputs import input_specs
from qdq.measure.shards import collect_shards, dask_pool, local_pool
from qdq.measure.table import CalibrationTable
from qdq.passes.prepare import load_float
from qdq.plan import placement

SIZE = 96


def write(folder: Path, count: int, batch: int) -> Path:
    """Volumes in files of `batch` each; the same volumes for every batch size, named so that they are read in order."""
    folder.mkdir()
    for start in range(0, count, batch):
        volumes = [
            np.random.default_rng(seed).standard_normal((1, 1, SIZE, SIZE, SIZE), dtype=np.float32)
            for seed in range(start, min(start + batch, count))
        ]
        np.savez(folder / f"{start:04}.npz", image=np.concatenate(volumes))
    return folder


def main() -> None:
    """Run the ways, one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, default=16)
    count = parser.parse_args().volumes
    from distributed import LocalCluster

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "unet.onnx"
        export(path, open_batch=True)
        model = load_float(path)
        plan = placement.plan(model)
        data = {batch: write(folder / f"batch{batch}", count, batch) for batch in (1, 4, 16)}
        opened = {batch: open_samples(data[batch], input_specs(model)) for batch in data}
        source = partial(open_samples, data[1], input_specs(model))

        def on_cluster() -> CalibrationTable:
            with LocalCluster(
                n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None, silence_logs=50
            ) as cluster:
                pids = [nanny.pid for nanny in cluster.workers.values()]

                def kill_one(done: int, total: int | None, label: str) -> None:
                    if pids and done == 1:
                        os.kill(pids.pop(), signal.SIGKILL)
                        pids.clear()

                found = collect_shards(
                    path, plan, source, dask_pool(cluster.scheduler_address), total=count, on_progress=kill_one
                )
                if pids:
                    sys.exit("no worker was killed")
                return found

        ways: dict[str, Callable[[], CalibrationTable]] = {
            "one process": lambda: collect(model, plan, opened[1]),
            "backwards": lambda: collect(model, plan, list(opened[1])[::-1]),
            "batches of 4": lambda: collect(model, plan, opened[4]),
            "batches of 16": lambda: collect(model, plan, opened[16]),
            "several passes": lambda: collect(model, plan, opened[1], memory=parse_bytes("150M")),
            "2 processes": lambda: collect_shards(path, plan, source, local_pool(2), total=count),
            "Dask, one of 2 workers killed": on_cluster,
        }
        first = b""
        for name, way in ways.items():
            began = time.perf_counter()
            table = way().to_json().encode()
            first = first or table
            same = "identical" if table == first else "DIFFERENT"
            print(f"{name:30} {len(table)} bytes, {same}, {time.perf_counter() - began:.0f} s", flush=True)
            if table != first:
                sys.exit(1)


if __name__ == "__main__":
    record(main)
