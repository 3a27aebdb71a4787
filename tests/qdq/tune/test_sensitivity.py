"""Sensitivity: what saves time changes no rank, and who computes it changes no byte."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import graphs
import numpy as np
import onnx
import pytest
import transformer_graphs
from graphs import build, node, normal

from calib_data import Samples, open_samples
from qdq.assemble.quantize import quantize
from qdq.core.arrays import spearman
from qdq.core.errors import InputError, StaleFileError
from qdq.core.resources import within
from qdq.measure.collect import collect
from qdq.measure.inference.inputs import input_specs
from qdq.measure.inference.samples import Sample, sample_sha256
from qdq.measure.shards import Pool, dask_pool, local_pool
from qdq.model.model import Model
from qdq.passes.prepare import load_float
from qdq.plan.settings import Settings
from qdq.tune.sensitivity import measure
from qdq.tune.sensitivity.candidates import Candidates
from qdq.tune.sensitivity.find import Workers, beside, find, possible
from qdq.tune.sensitivity.measure import sensitivity
from qdq.tune.sensitivity.mixed.choices import Choices
from qdq.tune.sensitivity.run import Runner, here
from qdq.tune.sensitivity.table import Sensitivity
from qdq.tune.sensitivity.unit import Seen, Task

TEXTS = ("int8", "int8:shift=off", "fp8", "float")
# Samples 0 to 3; the first process that reads one while a file `armed...` is there is killed, once for each of them.
DEADLY = """
import os, signal
from pathlib import Path
import numpy as np

def samples():
    for i in range(4):
        for armed in sorted(Path({folder!r}).glob("armed*")) if os.getpid() != {spared} else ():
            try:
                armed.rename(armed.with_name("fired" + armed.name))
            except FileNotFoundError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        yield {{"x": np.random.default_rng(i).normal(size=(1, 4, 12, 12)).astype(np.float32)}}
"""


def network() -> Model:
    """Two levels of a U-Net: a shortcut joins the first level to the last, a residual Add inside."""
    nodes = [
        node("Conv", "x w0", "a", name="enter", pads=[1, 1, 1, 1]),
        node("Relu", "a", "b", name="relu0"),
        node("Conv", "b w1", "c", name="down", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Relu", "c", "d", name="relu1"),
        node("Conv", "d w2", "e", name="deep", pads=[1, 1, 1, 1]),
        node("Add", "e d", "f", name="residual"),
        node("Relu", "f", "g", name="relu2"),
        node("ConvTranspose", "g w3", "h", name="up", strides=[2, 2]),
        node("Concat", "h b", "i", name="joined", axis=1),
        node("Conv", "i w4", "y", name="exit", pads=[1, 1, 1, 1]),
    ]
    weights = {"w0": normal(8, 4, 3, 3) / 6, "w1": normal(8, 8, 3, 3, seed=1) / 8, "w2": normal(8, 8, 3, 3, seed=2) / 9}
    weights |= {"w3": normal(8, 8, 2, 2, seed=3) / 5, "w4": normal(3, 16, 3, 3, seed=4) / 12}
    return load_float(build(nodes, {"x": (1, 4, 12, 12)}, weights).proto)


def made(
    model: Model, data: Sequence[Sample], texts: Sequence[str] = TEXTS, *, scale: bool = True, from_input: bool = False
) -> Sensitivity:
    candidates = Candidates.of(model, Settings(), texts)
    table = collect(candidates.model, candidates.measuring, data)
    runner = Runner(units=here(candidates, table, data, from_input=from_input))
    return sensitivity(candidates, runner, [sample_sha256(s) for s in data], scale=scale)


def noises(table: Sensitivity) -> np.ndarray:
    return np.array([t.noise for row in table.groups for t in row.trials if t.noise is not None])


@pytest.mark.parametrize("make", [network, graphs.attention, graphs.conditional, graphs.branches, graphs.residual])
def test_what_lies_behind_a_group_gives_what_the_whole_model_gives(make: Callable[[], Model]) -> None:
    model = make()
    data = graphs.samples(model, 3)
    short, long = (made(model, data, scale=False, from_input=from_input) for from_input in (False, True))
    assert len(noises(short)) >= 4
    np.testing.assert_allclose(noises(short), noises(long), rtol=1e-5)
    assert not any(t.scaled for row in short.groups for t in row.trials)


def test_noises_in_proportion_rank_as_those_run_to_the_outputs() -> None:
    model = network()
    data = graphs.samples(model, 4)
    scaled, run = made(model, data), made(model, data, scale=False)
    assert spearman(noises(scaled), noises(run)) > 0.95
    marked = [t.scaled for row in scaled.groups for t in row.trials]
    assert 0 < sum(marked) < len(marked)
    assert scaled.check is not None and scaled.check.trials >= 6
    first = [row.trials[0] for row in scaled.groups]
    assert [t.noise for t in first] == [row.trials[0].noise for row in run.groups]
    assert [t.sqnr_db for t in scaled.groups[-1].trials] == [t.sqnr_db for t in run.groups[-1].trials]  # the last


def test_a_candidate_that_scales_badly_is_run_to_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    data = graphs.samples(model, 3)
    monkeypatch.setattr(measure, "MEDIAN_DB", 0.0)
    every = made(model, data)
    assert every.check is not None and set(every.check.run_to_the_end) == {"int8:shift=off", "fp8", "float"}
    assert every.groups == made(model, data, scale=False).groups


def test_a_group_is_alone_and_the_noise_is_that_of_its_own_candidate() -> None:
    """Of one product the noise is computed here by hand."""
    model = build([node("MatMul", "x w", "y", name="only")], {"x": (6, 64)}, {"w": normal(64, 64) / 8})
    data = graphs.samples(model, 2)
    (row,) = made(model, data, ["int8-weight", "float"]).groups
    w = model.array("w")
    scale = np.abs(w).max(axis=0) / 127
    rounded = np.rint(w / scale) * scale
    exact = [np.float64(s["x"]) @ w for s in data]
    noise = sum(((s["x"] @ rounded - y) ** 2).sum() for s, y in zip(data, exact, strict=True))
    assert row.trials[0].noise == pytest.approx(noise / sum((y**2).sum() for y in exact), rel=0.02)
    half = [(s["x"].astype(np.float16).astype(np.float64) @ w.astype(np.float16).astype(np.float64)) for s in data]
    noise = sum(((h.astype(np.float16) - y) ** 2).sum() for h, y in zip(half, exact, strict=True))
    assert row.trials[1].noise == pytest.approx(noise / sum((y**2).sum() for y in exact), rel=0.05)


def test_a_candidate_that_does_the_same_is_not_run_again_and_one_that_does_nothing_says_why() -> None:
    model = network()
    data = graphs.samples(model, 2)
    candidates = Candidates.of(model, Settings(), ("int8", "w4a8", "int4"))
    table = collect(candidates.model, candidates.measuring, data)
    units, asked = here(candidates, table, data), list[Task]()

    def counted(
        tasks: Sequence[Task], numbers: Sequence[int]
    ) -> Iterable[tuple[Task, dict[int, Seen], dict[int, float]]]:
        asked.extend(tasks)
        return units(tasks, numbers)

    found = sensitivity(candidates, Runner(units=counted), [sample_sha256(s) for s in data])
    assert {task.candidate for task in asked} == {0}
    for row in found.groups:
        assert row.trials[0].noise == row.trials[1].noise
        assert "for weights alone" in row.trials[2].why_not and row.trials[2].noise is None
    assert "for weights alone" in "\n".join(found.explain("deep"))


@pytest.fixture
def here_(tmp_path: Path) -> tuple[Path, Model, Samples]:
    onnx.save(network().proto, tmp_path / "net.onnx")
    model = load_float(tmp_path / "net.onnx")
    code = DEADLY.format(folder=str(tmp_path), spared=os.getpid())
    (tmp_path / "deadly.py").write_text(code)
    return tmp_path / "net.onnx", model, open_samples(f"{tmp_path / 'deadly.py'}:samples", input_specs(model))


def on(path: Path, model: Model, samples: Samples, pool: Pool | None) -> str:
    """The table; of a pool one worker is killed as it calibrates, one as it measures groups."""
    # what a process that knows no tests can import
    source = partial(open_samples, f"{path.with_name('deadly.py')}:samples", input_specs(model))
    workers = Workers(pool=pool, source=source) if pool else None
    armed = [path.with_name(f"armed{i}") for i in range(2)]

    def arm(done: int, total: int | None, text: str) -> None:
        if text == "measuring groups" and armed and pool:
            armed.pop().touch()

    if pool:
        armed.pop().touch()
    found = find(path, model, samples, settings=Settings(), texts=TEXTS, workers=workers, on_progress=arm)
    if pool:
        fired = list(path.parent.glob("firedarmed*"))
        assert len(fired) == 2, "no worker was killed"
        for each in fired:
            each.unlink()
    return found.to_json()


def test_one_process_two_of_which_one_is_killed_and_a_cluster_write_the_same_bytes(
    here_: tuple[Path, Model, Samples],
) -> None:
    path, model, samples = here_
    alone = on(path, model, samples, None)
    assert on(path, model, samples, local_pool(2)) == alone
    distributed = pytest.importorskip("distributed", reason="Dask is not installed: pip install 'qdq[distributed]'")
    with distributed.LocalCluster(
        n_workers=3, threads_per_worker=1, host="127.0.0.1", dashboard_address=None, silence_logs=50
    ) as cluster:
        assert on(path, model, samples, dask_pool(cluster.scheduler_address)) == alone


def test_little_memory_changes_no_byte(here_: tuple[Path, Model, Samples]) -> None:
    path, model, samples = here_
    whole = on(path, model, samples, None)
    with within(29_500_000 + 40_000 * 16):
        assert on(path, model, samples, None) == whole


def test_a_table_that_is_killed_goes_on_where_it_was(
    here_: tuple[Path, Model, Samples], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model, samples = here_
    monkeypatch.setattr("qdq.tune.sensitivity.run.EVERY_S", 0.0)
    monkeypatch.setattr("qdq.tune.sensitivity.run.SHARE", 0.0)
    output, done, whole = path.parent / "s.json", list[str](), on(path, model, samples, None)

    def stop(number: int, _: int | None, text: str) -> None:
        if text == "measuring groups":
            done.append(text)
            if len(done) == 5:
                raise KeyboardInterrupt

    def run(on_progress: Callable[[int, int | None, str], None] | None, texts: Sequence[str] = TEXTS) -> Sensitivity:
        return find(path, model, samples, settings=Settings(), texts=texts, output=output, on_progress=on_progress)

    with pytest.raises(KeyboardInterrupt):
        run(stop)
    assert beside(output).exists()
    with pytest.raises(StaleFileError, match="of another settings"):
        run(None, ("int8", "fp8"))
    again = list[int]()
    assert (
        run(lambda number, total, text: again.append(total or 0) if text == "measuring groups" else None).to_json()
        == whole
    )
    everything = 4 * 4 * 5
    assert again[0] < everything
    beside(output).write_text("{}")
    with pytest.raises(InputError, match="Cannot go on with"):
        run(None)


def test_what_cannot_be_measured_is_refused() -> None:
    model = network()
    for texts, message in (
        (("float",), "No candidate quantizes anything"),
        (("int8", "int8"), "has one twice"),
        (("int8", "fp32"), "the float model itself"),
        (("int4",), "Nothing to measure"),
    ):
        with pytest.raises(InputError, match=message):
            made(model, graphs.samples(model, 1), texts)
    with pytest.raises(InputError, match="There are no samples"):
        sensitivity(Candidates.of(model, Settings(), ("int8",)), Runner(units=lambda tasks, numbers: ()), [])


def test_the_usual_candidates_are_those_that_every_target_has() -> None:
    assert possible(Settings(), ["sm89"], ()) == ("int8", "fp8", "w4a8", "int4", "float")
    assert possible(Settings(), ["sm86", "sm89"], ()) == ("int8", "w4a8", "int4", "float")
    with pytest.raises(Exception, match="cannot compile fp8"):
        possible(Settings(), ["sm86"], ("fp8",))


def test_noise_that_is_not_finite_is_infinite_and_comes_back_from_its_file(tmp_path: Path) -> None:
    """FP16 overflows in the product of large values."""
    model = build([node("MatMul", "x w", "y", name="only")], {"x": (4, 64)}, {"w": normal(64, 16) * 1e5})
    found = made(model, graphs.samples(model, 2), ["int8", "float"])
    (row,) = found.groups
    assert row.trials[1].noise == math.inf and row.trials[1].sqnr_db == -math.inf
    found.save(tmp_path / "s.json")
    assert Sensitivity.load(tmp_path / "s.json") == found


def test_a_packed_projection_is_one_group_of_its_parts_and_patterns_for_it_mean_them() -> None:
    model = transformer_graphs.packed("split")
    candidates = Candidates.of(model, Settings(overrides={"proj": "float"}), ("int8", "int4"))
    assert [r.name for r in candidates.rewrites] == ["packed_projection"]
    parts = next(g for g in candidates.groups if len(g.nodes) == 3)
    found = made(model, graphs.samples(model, 2), ("int8", "int4"))
    assert found.row(parts.nodes[1]) is not None
    choices = Choices(candidates=candidates, unquantized_type="auto")
    plan = choices.plan(["int4" if group == parts else "float" for group in candidates.groups])
    assert set(plan.quantized_nodes) == set(parts.nodes)
    whole = quantize(model, graphs.samples(model, 2), plan=plan)
    assert {p.spec.format for p in whole.plan.weights} <= {"int4", "int8"}
    assert any(skip.rule == "float" for skip in plan.skips)
