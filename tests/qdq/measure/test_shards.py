"""Shards on processes and on a Dask cluster give the table of one process, also when a worker dies."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from models import images, save_samples, segmenter

from calib_data import Samples, open_samples
from qdq.core.errors import InputError, MissingRuntimeError, StaleFileError
from qdq.measure.checkpoint import Checkpoint
from qdq.measure.collect import collect, key
from qdq.measure.inference.inputs import input_specs
from qdq.measure.shards import Pool, collect_shards, dask_pool, local_pool
from qdq.model.model import Model
from qdq.passes.prepare import load_float
from qdq.plan import placement
from qdq.plan.plan import Plan

# Samples 0 to 9; whoever reads sample 5 first is killed.
DEADLY = """
import os, signal
from pathlib import Path
import numpy as np

def samples():
    for i in range(10):
        if i == 5 and os.getpid() != {spared}:
            try:
                Path({mark!r}).touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        yield {{"image": np.random.default_rng(i).normal(size=(1, 1, 8, 8)).astype(np.float32)}}
"""

# Ctrl-C, as a terminal sends it to all, when workers only start whose jobs no pipe holds at once.
INTERRUPTED = """
import os, signal, sys, time
from functools import partial
import qdq.measure.shards as shards
from qdq.passes.prepare import load_float
from qdq.plan import placement

def source(ballast):
    return []

def end(number, frame):
    raise SystemExit(130)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, end)
    shards.wait = lambda futures, return_when: [time.sleep(0.1), os.killpg(0, signal.SIGINT)]
    plan = placement.plan(load_float(sys.argv[1]))
    pool = shards.local_pool(2)
    shards.collect_shards(sys.argv[1], plan, partial(source, bytes(1 << 20)), pool, total=None)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(segmenter(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def model(path: Path) -> Model:
    return load_float(path)


@pytest.fixture
def plan(model: Model) -> Plan:
    return placement.plan(model)


@pytest.fixture
def deadly(tmp_path: Path, model: Model) -> Callable[[], Samples]:
    code = DEADLY.format(mark=str(tmp_path / "killed"), spared=os.getpid())
    (tmp_path / "source.py").write_text(code)
    return partial(open_samples, f"{tmp_path / 'source.py'}:samples", input_specs(model))


def threads(workers: int = 2) -> Pool:
    """An executor without processes, for what does not need them."""
    return Pool(open=lambda: ThreadPoolExecutor(workers), workers=workers, threads=1)


def test_a_killed_local_worker_is_retried(
    tmp_path: Path, path: Path, model: Model, plan: Plan, deadly: Callable[[], Samples]
) -> None:
    told: list[tuple[int, int | None, str]] = []
    found = collect_shards(path, plan, deadly, local_pool(2), total=None, on_progress=lambda *step: told.append(step))
    assert (tmp_path / "killed").exists()
    assert found.to_json() == collect(model, plan, deadly()).to_json()
    assert told[-1] == (8, 8, "calibrating, shards")


def test_ctrl_c_ends_workers_that_have_not_read_their_jobs(tmp_path: Path, path: Path) -> None:
    (tmp_path / "run.py").write_text(INTERRUPTED)
    found = subprocess.run(
        [sys.executable, "run.py", str(path)],
        cwd=tmp_path,
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "")


def test_a_killed_dask_worker_is_retried(
    tmp_path: Path, path: Path, model: Model, plan: Plan, deadly: Callable[[], Samples]
) -> None:
    distributed = pytest.importorskip("distributed", reason="Dask is not installed: pip install qdq[distributed]")
    with distributed.LocalCluster(
        n_workers=3, threads_per_worker=1, host="127.0.0.1", dashboard_address=None, silence_logs=50
    ) as cluster:
        found = collect_shards(path, plan, deadly, dask_pool(cluster.scheduler_address), total=None)
    assert (tmp_path / "killed").exists()
    assert found.to_json() == collect(model, plan, deadly()).to_json()


def test_a_missing_scheduler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdq.measure.shards.CONNECT_S", 0.2)
    pytest.importorskip("distributed", reason="Dask is not installed: pip install qdq[distributed]")
    with pytest.raises(InputError, match=r"No Dask scheduler answers at tcp://127\.0\.0\.1:9"):
        dask_pool("tcp://127.0.0.1:9")


def test_missing_dask_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with pytest.raises(MissingRuntimeError, match=r"pip install 'qdq\[distributed\]'"):
        dask_pool("tcp://127.0.0.1:9")


def test_more_shards_than_samples_and_none_at_all(tmp_path: Path, path: Path, model: Model, plan: Plan) -> None:
    (tmp_path / "two.py").write_text(
        "import numpy as np\ndef two():\n"
        "    yield from [{'image': np.full((1, 1, 8, 8), i, np.float32)} for i in (1, 2)]"
    )
    two = partial(open_samples, f"{tmp_path / 'two.py'}:two", input_specs(model))
    assert collect_shards(path, plan, two, threads(), total=None).to_json() == collect(model, plan, two()).to_json()

    class Nothing:
        def shard(self, i: int, n: int) -> list[dict[str, np.ndarray]]:
            return []

    with pytest.raises(InputError, match="no samples"):
        collect_shards(path, plan, Nothing, threads(), total=None)


def test_shards_that_are_done_are_kept(tmp_path: Path, path: Path, model: Model, plan: Plan) -> None:
    source = partial(open_samples, save_samples(tmp_path / "data", images(6)), input_specs(model))
    whole = collect(model, plan, source())
    made_of = key(model, plan)

    def stop(done: int, total: int | None, text: str) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_shards(
            path, plan, source, threads(), total=6, checkpoint=Checkpoint(tmp_path / "c", made_of), on_progress=stop
        )
    told: list[int] = []
    found = collect_shards(
        path,
        plan,
        source,
        threads(5),  # another number of workers: the shards stay the same
        total=6,
        checkpoint=Checkpoint(tmp_path / "c", made_of),
        on_progress=lambda done, total, text: told.append(done),
    )
    assert told == [5, 6] and found.to_json() == whole.to_json()


def test_samples_that_changed_their_order_behind_a_checkpoint_are_refused(
    tmp_path: Path, path: Path, model: Model, plan: Plan
) -> None:
    kept = images(4)
    checkpoint = Checkpoint(tmp_path / "c", {})
    done = collect(model, plan, [kept[0]])
    checkpoint.write([done], {"shards": 4, "done": [0]})
    source = partial(open_samples, save_samples(tmp_path / "data", kept[::-1]), input_specs(model))
    with pytest.raises(StaleFileError, match="changed their order"):
        collect_shards(path, plan, source, threads(), total=4, checkpoint=checkpoint)
    other = partial(open_samples, save_samples(tmp_path / "other", images(4, seed=8)), input_specs(model))
    with pytest.raises(StaleFileError, match="holds 4 samples that are not among those given"):
        collect_shards(path, plan, other, threads(), total=4, checkpoint=checkpoint)


def test_a_checkpoint_of_one_process_is_not_taken_for_shards(
    tmp_path: Path, path: Path, model: Model, plan: Plan
) -> None:
    checkpoint = Checkpoint(tmp_path / "c", {})
    checkpoint.write([collect(model, plan, images(1))])
    with pytest.raises(StaleFileError, match="begun without workers"):
        collect_shards(path, plan, lambda: pytest.fail("read"), threads(), total=2, checkpoint=checkpoint)


def test_a_bad_sample_is_numbered_as_in_the_whole(tmp_path: Path, path: Path, model: Model, plan: Plan) -> None:
    samples = images(5)
    samples[3]["image"] *= 3e38 / np.abs(samples[3]["image"]).max()  # finite, but not after the convolution
    source = partial(open_samples, save_samples(tmp_path / "data", samples), input_specs(model))
    with pytest.raises(InputError, match="Sample 3 makes tensor"):
        collect_shards(path, plan, source, threads(), total=5)


def test_workers_that_always_die_end_the_calibration(
    path: Path, model: Model, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concurrent.futures import BrokenExecutor

    def die(*_: object) -> None:
        raise BrokenExecutor

    monkeypatch.setattr("qdq.measure.shards._measure", die)
    with pytest.raises(InputError, match="died 4 times in a row"):
        collect_shards(path, plan, lambda: images(2), threads(), total=2)
    with pytest.raises(InputError, match="at least 1"):
        local_pool(0)
