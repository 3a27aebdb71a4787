"""A calibration that is killed goes on from its checkpoint and ends with the identical table."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings, strategies as st
from models import images, segmenter
from places import ROOT

from engines.core.documents import replace
from qdq.core.errors import InputError, StaleFileError
from qdq.core.files import write_text
from qdq.measure.checkpoint import Checkpoint
from qdq.measure.collect import collect, key
from qdq.measure.inference.memory import OVERHEAD, held_bytes, passes
from qdq.measure.inference.samples import sample_sha256
from qdq.measure.inference.session import Session
from qdq.measure.table import CalibrationTable, merged, samples_digest
from qdq.model.model import Model
from qdq.model.storage import load
from qdq.passes.prepare import prepare
from qdq.passes.rewrites.edit import Rewrite
from qdq.plan import placement
from qdq.plan.plan import Plan

WORKER = """
import sys, time
from pathlib import Path
sys.path[:0] = {path!r}
from models import images
from qdq.plan import placement
from qdq.measure.collect import collect, key
from qdq.measure.checkpoint import Checkpoint
from qdq.model.storage import load
from qdq.passes.prepare import prepare

class Slow(list):
    def __iter__(self):
        for sample in list.__iter__(self):
            time.sleep(0.01)
            yield sample

model = prepare(load(sys.argv[1]))
plan = placement.plan(model)
out = Path(sys.argv[2])
checkpoint = Checkpoint(out.with_name(".table.checkpoint"), key(model, plan), every_s=0)
print("begun", flush=True)
table = collect(model, plan, Slow(images(40)), threads=2, memory=int(sys.argv[3]), checkpoint=checkpoint)
table.save(out)
checkpoint.remove()
"""


@pytest.fixture
def model(tmp_path: Path) -> Model:
    onnx.save(segmenter(), tmp_path / "model.onnx")
    return prepare(load(tmp_path / "model.onnx"))


@pytest.fixture
def plan(model: Model) -> Plan:
    return placement.plan(model)


def test_order_split_and_threads_do_not_change_a_byte(model: Model, plan: Plan) -> None:
    samples = images(7)
    whole = collect(model, plan, samples).to_json()
    assert collect(model, plan, samples[::-1], threads=3).to_json() == whole
    assert merged([collect(model, plan, samples[i::3]) for i in (2, 0, 1)]).to_json() == whole
    one_pass_per_tensor = collect(model, plan, samples, memory=1)
    assert one_pass_per_tensor.to_json() == whole


@settings(deadline=None, max_examples=25)
@given(order=st.permutations(range(6)), cut=st.integers(1, 5), batch=st.integers(1, 6))
def test_table_is_a_function_of_the_values_alone(order: list[int], cut: int, batch: int) -> None:
    proto = segmenter(spatial=(4, 4))
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = "n"
    model = prepare(Model(proto=proto, directory=Path(), sha256="m"))
    plan = placement.plan(model)
    samples = [s["image"] for s in images(6, (1, 1, 4, 4))]
    samples[3] = samples[3] * 1000  # an outlier makes the grid grow, early or late
    batches = [np.concatenate([samples[k] for k in order[i : i + batch]]) for i in range(0, 6, batch)]
    whole = collect(model, plan, [{"image": s} for s in samples])
    split = [[{"image": samples[i]} for i in part] for part in (order[:cut], order[cut:])]
    assert merged([collect(model, plan, part) for part in split]).to_json() == whole.to_json()
    assert collect(model, plan, [{"image": b} for b in batches]).to_json() == whole.to_json()


def test_killed_at_random_moments_ends_with_the_same_table(tmp_path: Path, model: Model, plan: Plan) -> None:
    source = WORKER.format(path=[str(ROOT / "tests"), str(ROOT)])
    out = tmp_path / "out" / "table.json"
    out.parent.mkdir()
    # the budget of one byte makes two passes, so that some kills hit the second
    command = [sys.executable, "-c", source, str(tmp_path / "model.onnx"), str(out), "1"]
    moments = random.Random(5)
    began_anew = 0
    for _ in range(4):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        time.sleep(moments.uniform(0.05, 0.5))
        process.kill()
        process.communicate()
        began_anew += not (out.parent / ".table.checkpoint").exists()
    assert began_anew < 4  # at least one kill left something to go on from
    subprocess.run(command, check=True, timeout=60)
    assert out.read_text() == collect(model, plan, images(40)).to_json()
    assert [p.name for p in out.parent.iterdir()] == ["table.json"]


def test_samples_in_the_checkpoint_are_not_run_again(
    tmp_path: Path, model: Model, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = images(5)
    whole = collect(model, plan, samples)
    checkpoint = Checkpoint(tmp_path / "c", key(model, plan))
    checkpoint.write([collect(model, plan, samples[:3])])
    ran = []
    run = Session.__call__
    monkeypatch.setattr(Session, "__call__", lambda session, sample: [ran.append(sample), run(session, sample)][1])
    told = []
    resumed = collect(model, plan, samples, checkpoint=checkpoint, on_progress=lambda *step: told.append(step))
    assert resumed.to_json() == whole.to_json()
    assert sorted(s["image"][0, 0, 0, 0] for s in ran) == sorted(s["image"][0, 0, 0, 0] for s in samples[3:])
    assert told[-1] == (5, 5, "calibrating")


@pytest.mark.parametrize("change", ["model", "plan", "provider"])
def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, model: Model, plan: Plan, change: str) -> None:
    made_of = key(model, plan)
    Checkpoint(tmp_path / "c", {**made_of, change: "other"}).write([collect(model, plan, images(1))])
    with pytest.raises(StaleFileError, match=f"of another {change}"):
        collect(model, plan, images(2), checkpoint=Checkpoint(tmp_path / "c", made_of))


def test_a_checkpoint_serves_every_plan_that_measures_the_same(model: Model, plan: Plan) -> None:
    other = replace(plan.settings, calibrator="entropy", rounding="nearest", shift=False, bias_correction="off")
    assert key(model, placement.plan(model, other)) == key(model, plan)
    fewer = replace(plan, points=tuple(p for p in plan.points if p != plan.activations[0]))
    rewritten = replace(plan, rewrites=(Rewrite(name="flatten", nodes=("a",)),))
    assert key(model, plan)["plan"] not in (key(model, fewer)["plan"], key(model, rewritten)["plan"])


def test_a_checkpoint_with_foreign_samples_is_refused(tmp_path: Path, model: Model, plan: Plan) -> None:
    checkpoint = Checkpoint(tmp_path / "c", {})
    checkpoint.write([collect(model, plan, images(2, seed=9))])
    with pytest.raises(StaleFileError, match="holds 2 samples that are not among"):
        collect(model, plan, images(2), checkpoint=checkpoint)


def test_more_samples_than_in_the_checkpoint_are_added(tmp_path: Path, model: Model, plan: Plan) -> None:
    checkpoint = Checkpoint(tmp_path / "c", {})
    checkpoint.write([collect(model, plan, images(2))])
    assert collect(model, plan, images(4), checkpoint=checkpoint).to_json() == collect(model, plan, images(4)).to_json()


def test_complete_passes_are_refused_for_other_samples_at_once(
    tmp_path: Path, model: Model, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = collect(model, plan, images(2))
    first, second = ({name: h} for name, h in table.tensors.items())
    checkpoint = Checkpoint(tmp_path / "c", {})
    checkpoint.write([replace(table, tensors=first), replace(table, tensors=second)])
    monkeypatch.setattr(Session, "__call__", lambda *_: pytest.fail("ran"))
    with pytest.raises(StaleFileError, match="passes over 2 samples, but 3 are given"):
        collect(model, plan, images(3), memory=1, checkpoint=checkpoint)


def test_samples_that_change_behind_a_checkpoint_are_refused(tmp_path: Path, model: Model, plan: Plan) -> None:
    checkpoint = Checkpoint(tmp_path / "c", {})
    checkpoint.write([collect(model, plan, images(2))])

    class Moody:
        read = 0

        def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
            self.read += 1
            return iter(images(2, seed=1 if self.read < 4 else 7))

    with pytest.raises(StaleFileError, match="differ from one reading to the next"):
        collect(model, plan, Moody(), checkpoint=checkpoint)


def test_batches_that_were_cut_otherwise_are_refused(tmp_path: Path) -> None:
    proto = segmenter(spatial=(4, 4))
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = "n"
    model = prepare(Model(proto=proto, directory=Path(), sha256="m"))
    plan = placement.plan(model)
    samples = [s["image"] for s in images(4, (1, 1, 4, 4))]
    checkpoint = Checkpoint(tmp_path / "c", {})
    checkpoint.write([collect(model, plan, [{"image": s} for s in samples[:3]])])
    pairs = [{"image": np.concatenate(samples[i : i + 2])} for i in (0, 2)]
    with pytest.raises(StaleFileError, match="some samples of a batch but not all"):
        collect(model, plan, pairs, checkpoint=checkpoint)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, model: Model, plan: Plan) -> None:
    write_text(tmp_path / "c", '{"schema": "qdq.checkpoint/2"}', resumed=True)
    with pytest.raises(InputError, match=r"missing required field `key`.*Delete it"):
        Checkpoint(tmp_path / "c", {}).load()
    with pytest.raises(InputError, match="Cannot write"):
        write_text(tmp_path / "no" / "folder", "", resumed=True)


def test_samples_that_change_between_passes_are_refused(model: Model, plan: Plan) -> None:
    class Restless:
        seed = 0

        def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
            self.seed += 1
            return iter(images(2, seed=self.seed))

    with pytest.raises(InputError, match="differ from one reading to the next"):
        collect(model, plan, Restless(), memory=1)


def test_merging_refuses_other_models_and_tensors(model: Model, plan: Plan) -> None:
    table = collect(model, plan, images(1))
    other = CalibrationTable(model_sha256="x", samples_sha256="", count=1, tensors=table.tensors)
    with pytest.raises(StaleFileError, match=r"a\.json and b\.json cannot be merged: they were made from different"):
        merged([table, other], ["a.json", "b.json"])
    fewer = CalibrationTable(model_sha256=model.sha256, samples_sha256="", count=1, tensors={})
    with pytest.raises(StaleFileError, match="'b' and 1 more tensors are in one of them only"):
        merged([table, fewer])
    assert merged([table, table]).repeated == 1


def test_sample_hash_is_that_of_calib_data(tmp_path: Path, model: Model) -> None:
    from calib_data import open_samples
    from qdq.measure.inference.inputs import input_specs

    samples = images(3)
    np.savez(tmp_path / "s.npz", image=np.concatenate([s["image"] for s in samples]))
    opened = open_samples(tmp_path / "s.npz", input_specs(model))
    assert samples_digest(map(sample_sha256, samples)) == opened.sha256()


def test_budget_makes_passes_and_threads(model: Model) -> None:
    sample = images(1)[0]
    bytes_of_b = 4 * 8 * 8 * 4  # float32 (1, 4, 8, 8); the Relu's input of the same size lives beside it
    assert passes(model, ["b"], sample, memory=10**9, threads=3).threads == 3
    assert passes(model, ["b"], sample, memory=10**9).bytes_each == 2 * bytes_of_b

    def room(tensors: int) -> int:  # a budget for as many tensors like b, beside the weights
        return held_bytes(model) + math.ceil(OVERHEAD * tensors * bytes_of_b)

    assert passes(model, ["b"], sample, memory=room(4), threads=3).threads == 2
    both = passes(model, ["a", "b", "logits"], sample, memory=room(2), threads=3)
    # the first pass runs the whole model, to see every magnitude: with a and b kept, logits would be too much
    assert both.groups == (("a",), ("b", "logits")) and both.threads == 1
