"""Weights rounded by workers have the bytes that one process gives them, also when a worker dies."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from graphs import build, node, normal
from models import save_samples

import qdq.model.weight_store
import qdq.solve.solve
from qdq.assemble.quantize import quantize
from qdq.cli.main import main
from qdq.core.errors import InputError
from qdq.core.progress import Progress
from qdq.measure.inference.samples import Sample
from qdq.measure.shards import Pool, dask_pool, local_pool
from qdq.model.model import Model
from qdq.passes.prepare import load_float
from qdq.plan.settings import Settings
from qdq.solve import spread as spreading
from qdq.solve.spread import spread

COUNT = 6
SETTINGS = Settings(
    scheme="w4a8",
    rounding="descent",
    equalize="smoothquant",
    calibrator="max",
    block=16,
    shift=False,
    bias_correction="off",
)


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose weights take gigabytes takes the same way."""
    monkeypatch.setattr(qdq.solve.solve, "is_large", lambda tensors: True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    nodes = [node("MatMul", f"{f't{i}' if i else 'x'} w{i}", f"t{i + 1}", name=f"p{i}") for i in range(COUNT)]
    nodes.append(node("Relu", f"t{COUNT}", "y"))
    model = build(nodes, {"x": (8, 32)}, {f"w{i}": normal(32, 32, seed=i) / 6 for i in range(COUNT)})
    onnx.save(model.proto, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def samples() -> list[Sample]:
    return [{"x": normal(8, 32, seed=20 + i)} for i in range(4)]


def made(path: Path, samples: list[Sample], on_progress: Progress | None = None) -> bytes:
    return quantize(
        load_float(path), samples, settings=SETTINGS, on_progress=on_progress
    ).model.proto.SerializeToString()


def test_a_dead_worker_loses_nothing(path: Path, samples: list[Sample]) -> None:
    expected, killed, finished = made(path, samples), list[int](), list[int]()

    def kill(done: int, total: int | None, label: str) -> None:
        if label == "rounding weights":
            finished.append(done)
            if done == 1:
                victim = active_children()[0]
                killed.append(victim.pid or 0)
                victim.kill()

    with spread(local_pool(2), path):
        assert made(path, samples, kill) == expected
    assert killed
    assert finished == list(range(1, COUNT + 1))


def test_a_dask_cluster_gives_the_same_bytes(path: Path, samples: list[Sample]) -> None:
    distributed = pytest.importorskip("distributed", reason="Dask is not installed: pip install qdq[distributed]")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None, silence_logs=50
        ) as cluster,
        spread(dask_pool(cluster.scheduler_address), path),
    ):
        found = made(path, samples)
    assert found == made(path, samples)


def test_a_small_model_says_that_it_needs_no_workers(
    path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qdq.solve.solve, "is_large", lambda tensors: False)
    with spread(local_pool(2), path):
        notes = quantize(load_float(path), samples, settings=SETTINGS).solution.notes
    assert any("rounds its weights alone" in note for note in notes)
    assert not active_children()


@pytest.fixture
def here() -> Pool:
    """A pool of one thread of this process."""
    return Pool(open=lambda: ThreadPoolExecutor(1), workers=1, threads=1)


def test_few_tasks_are_on_their_way_and_finished_weights_of_a_large_model_are_not_asked_for(
    path: Path, samples: list[Sample], here: Pool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked, arrived = list[str](), list[int]()
    most = [0]
    rounded = spreading.rounded

    def count(model: Model, settings: Settings, task: spreading.Task) -> object:
        asked.append(task.reader.name)
        return rounded(model, settings, task)

    monkeypatch.setattr(spreading, "rounded", count)
    told = spreading.Spread.each

    def seen(self: spreading.Spread, model: Model, plan: object, tasks: object) -> Iterator[object]:
        def counted(task: object) -> object:
            def make() -> object:
                most[0] = max(most[0], len(asked) - len(arrived) + 1)
                return task()  # type: ignore[operator]

            return make

        for found in told(self, model, plan, [counted(t) for t in tasks]):  # type: ignore[arg-type, attr-defined]
            arrived.append(0)
            yield found

    monkeypatch.setattr(spreading.Spread, "each", seen)
    with qdq.model.weight_store.kept(tmp_path / "weights"):
        with spread(here, path):
            first = made(path, samples)
        assert sorted(asked) == sorted(f"p{i}" for i in range(COUNT))
        assert most[0] <= 1 + spreading.AHEAD
        with spread(here, path):
            assert made(path, samples) == first
        assert len(asked) == COUNT


def test_a_worker_with_another_version_or_model_is_refused(
    path: Path, samples: list[Sample], here: Pool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = onnx.load(path)
    other.doc_string = "another"
    other.graph.initializer[0].raw_data = np.zeros((32, 32), np.float32).tobytes()
    onnx.save(other, tmp_path / "other.onnx")
    with spread(here, tmp_path / "other.onnx"), pytest.raises(InputError, match="reads another model"):
        made(path, samples)
    monkeypatch.setattr(spreading, "version", _versions())
    with spread(here, path), pytest.raises(InputError, match="install the same version"):
        made(path, samples)


def _versions() -> object:
    """The version of the process that asks, then another one."""
    calls = [0]

    def version(package: str) -> str:
        calls[0] += 1
        return str(calls[0])

    return version


def test_the_command_takes_workers_and_refuses_both(path: Path, samples: list[Sample], tmp_path: Path) -> None:
    data = save_samples(tmp_path / "data", [dict(s) for s in samples])
    command = ["quantize", str(path), "--data", str(data), "-o", str(tmp_path / "q.onnx"), "--workers", "1"]
    done = CliRunner().invoke(main, [*command, "--cluster", "tcp://127.0.0.1:9"])
    assert done.exit_code == 2
    assert "choose one" in done.output
