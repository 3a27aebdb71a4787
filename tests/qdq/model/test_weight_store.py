"""Large models: weights on disk one at a time, sessions in parts; the same codes as in memory."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdq.assemble.finish import finish
from qdq.assemble.held_out import HeldOutScore, split
from qdq.assemble.quantize import quantize
from qdq.core.errors import InputError
from qdq.core.qtensor import QTensor
from qdq.deploy.check import evaluate
from qdq.measure.collect import collect
from qdq.measure.inference import partitioned
from qdq.measure.inference.inputs import as_samples
from qdq.measure.inference.session import Session
from qdq.model import external, weight_store
from qdq.model.external import is_stored
from qdq.model.model import Model
from qdq.model.storage import load, save
from qdq.passes.prepare import load_float
from qdq.plan.settings import Settings
from qdq.solve import solve, spread, weights
from qdq.solve.weights import quantize_weight

SIZES = (48, 96, 48, 32)
SCHEMES = [
    Settings(rounding="nearest", calibrator="mse"),
    Settings(calibrator="mse"),
    Settings(scheme="int4", block=16),
    Settings(scheme="w4a8", block=16, calibrator="mse"),  # without samples none is chosen
    Settings(scheme="fptq", block=16, v1=0.5, v0=0.1, calibrator="mse"),
    Settings(scheme="fp8"),
    Settings(scheme="nvfp4"),
    Settings(scheme="nvfp4-weight"),
]


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """MatMul, Relu, MatMul, Add, MatMul, with external data."""
    rng = np.random.default_rng(0)
    tensors = [
        numpy_helper.from_array((rng.normal(size=shape) / 7).astype(np.float32), f"w{i}")
        for i, shape in enumerate(itertools.pairwise(SIZES))
    ]
    tensors.append(numpy_helper.from_array(rng.normal(size=SIZES[2]).astype(np.float32), "b"))
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["t0"], name="first"),
        helper.make_node("Relu", ["t0"], ["t1"], name="relu"),
        helper.make_node("MatMul", ["t1", "w1"], ["t2"], name="second"),
        helper.make_node("Add", ["t2", "b"], ["t3"], name="add"),
        helper.make_node("MatMul", ["t3", "w2"], ["y"], name="third"),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", s]) for n, s in (("x", 48), ("y", 32)))
    model = helper.make_model(
        helper.make_graph(nodes, "chain", [x], [y], tensors), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    path = tmp_path / "chain.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="chain.data", size_threshold=0)
    return path


@pytest.fixture
def samples() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(5, SIZES[0])).astype(np.float32)} for _ in range(3)]


@pytest.fixture
def tiny_is_large(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every limit so low that the chain passes for a large model, in several parts."""
    for module, name, value in (
        (external, "LARGE", 1),
        (external, "MAPPED", 1),
        (partitioned, "MAPPED", 1),
        (partitioned, "PART_BYTES", 1),
        (weight_store, "LEAST", 1),
    ):
        monkeypatch.setattr(module, name, value)
    yield


def values(path: Path) -> dict[str, tuple[str, bytes]]:
    """Every stored tensor of a model, and its graph."""
    model = load(path)
    found = {n: (str(model.array(n).dtype), model.array(n).tobytes()) for n in model.initializers}
    return found | {"": ("", b"".join(n.SerializeToString() for n in model.graph.node))}


@pytest.mark.parametrize("settings", SCHEMES, ids=lambda s: f"{s.scheme}-{s.rounding}")
def test_large_models_get_the_codes_of_small_ones(
    chain: Path,
    samples: list[dict[str, np.ndarray]],
    settings: Settings,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    made = quantize(chain, samples, settings=settings)
    save(made.model, tmp_path / "small.onnx")
    assert not any(map(is_stored, made.model.graph.initializer))
    without = quantize(chain, None, settings=settings, table=made.table)
    save(without.model, tmp_path / "small_table.onnx")

    request.getfixturevalue("tiny_is_large")
    large = quantize(chain, None, settings=settings, table=made.table)
    assert any(map(is_stored, large.model.graph.initializer))
    save(large.model, tmp_path / "large.onnx")
    assert not any(map(is_stored, load(tmp_path / "large.onnx").graph.initializer))
    assert values(tmp_path / "large.onnx") == values(tmp_path / "small_table.onnx")

    seen = quantize(chain, samples, settings=settings)
    outputs = [Session(m, ["y"], threads=1)(samples[0])["y"] for m in (made.model, seen.model)]
    assert np.abs(outputs[0] - outputs[1]).max() < 0.02 * np.abs(outputs[0]).max()


@pytest.mark.usefixtures("tiny_is_large")
@pytest.mark.parametrize("settings", SCHEMES[:4], ids=lambda s: f"{s.scheme}-{s.rounding}")
def test_the_number_of_threads_does_not_show(
    chain: Path,
    samples: list[dict[str, np.ndarray]],
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = []
    for threads in (1, 2):
        monkeypatch.setattr(solve, "cores", lambda threads=threads: threads)
        save(quantize(chain, samples, settings=settings).model, tmp_path / f"{threads}.onnx")
        files.append(values(tmp_path / f"{threads}.onnx"))
    assert files[0] == files[1]


def test_parts_compute_what_the_whole_does(
    chain: Path, samples: list[dict[str, np.ndarray]], request: pytest.FixtureRequest
) -> None:
    model = load_float(chain)
    wanted = ["t1", "t2", "x", "y"]
    whole = Session(model, wanted, threads=1)(samples[0])
    request.getfixturevalue("tiny_is_large")
    session = Session(model, wanted, threads=1)
    assert len(session._session._parts) == 4  # the bias counts too
    found = session(samples[0])
    assert found.keys() == whole.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-4, atol=1e-5)


def test_parts_round_as_the_whole_does(
    chain: Path, samples: list[dict[str, np.ndarray]], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """FP16 for the rest: each part casts its own weights up, and the file is checked with its data beside it."""
    settings = Settings(scheme="int8-weight", equalize="none", bias_correction="off")
    scores = []
    for large in (False, True):
        if large:
            request.getfixturevalue("tiny_is_large")
        made = quantize(chain, samples, settings=settings)
        done = finish(made.model, made.plan, unquantized_type="fp16", table=made.table).model
        assert any(t.data_type == TensorProto.FLOAT16 for t in done.graph.initializer)
        scores.append(HeldOutScore(made.prepared, split(samples)).sqnr_db(done))
        save(done, tmp_path / "low.onnx")
        report = evaluate(chain, tmp_path / "low.onnx", as_samples(samples, load(chain)), limits={})
        assert report.sqnr_db == pytest.approx(scores[0], abs=1.0)  # of all samples, not of those held out
    assert scores[1] == pytest.approx(scores[0], abs=0.01)


@pytest.mark.usefixtures("tiny_is_large")
def test_a_killed_run_goes_on(
    chain: Path, samples: list[dict[str, np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(calibrator="mse", rounding="nearest", equalize="none", bias_correction="off", shift=True)
    model = load_float(chain)
    table = quantize(model, samples, settings=settings).table
    folder = tmp_path / ".out.store"
    done: list[tuple[int, ...]] = []

    def counted(array: np.ndarray, *unquantized_type: object, **named: object) -> QTensor:
        if len(done) == 2 and not folder.with_name("again").exists():
            raise KeyboardInterrupt
        done.append(array.shape)
        return quantize_weight(array, *unquantized_type, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(spread, "quantize_weight", counted)
    monkeypatch.setattr(solve, "cores", lambda: 1)
    with pytest.raises(KeyboardInterrupt), weight_store.kept(folder):
        quantize(model, samples, settings=settings, table=table)
    assert len(list(folder.glob("*.npz"))) == 2
    (folder / f"{'0' * 64}.codes.part").write_bytes(b"half")
    folder.with_name("again").touch()
    with weight_store.kept(folder):
        made = quantize(model, samples, settings=settings, table=table)
        save(made.model, tmp_path / "out.onnx")
    assert len(done) == 3  # the third weight only
    assert not folder.exists()
    monkeypatch.undo()
    save(quantize(model, samples, settings=settings, table=table).model, tmp_path / "plain.onnx")
    assert values(tmp_path / "out.onnx") == values(tmp_path / "plain.onnx")


@pytest.mark.usefixtures("tiny_is_large")
def test_the_temporary_folder_goes_with_the_model(
    chain: Path, samples: list[dict[str, np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "spools"
    place.mkdir()
    monkeypatch.setattr(weight_store.tempfile, "tempdir", str(place))
    made = quantize(chain, samples, settings=Settings(rounding="nearest"))
    model: Model | None = made.model
    del made
    assert list(place.iterdir())  # the model still refers to it
    assert model is not None
    save(model, tmp_path / "kept.onnx")
    del model
    gc.collect()
    assert not list(place.iterdir())


@pytest.mark.usefixtures("tiny_is_large")
def test_no_room_is_said(chain: Path, samples: list[dict[str, np.ndarray]], tmp_path: Path) -> None:
    if os.geteuid() == 0:
        missing = tmp_path / "missing" / "folder"
    else:
        missing = tmp_path / "locked" / "folder"
        missing.parent.mkdir(mode=0o500)
    with pytest.raises(InputError, match="Cannot write the weights of a large model"), weight_store.kept(missing):
        quantize(chain, samples, settings=Settings(rounding="nearest"))


def test_a_file_cannot_point_into_a_store(chain: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "chain.data").write_bytes(b"\xff" * (1 << 20))
    proto = onnx.load(chain, load_external_data=False)
    for tensor in proto.graph.initializer:
        tensor.external_data.add(key=external.STORE, value=str(tmp_path / "elsewhere"))
    (tmp_path / "sly.onnx").write_bytes(proto.SerializeToString())
    assert np.array_equal(load(tmp_path / "sly.onnx").array("w0"), load(chain).array("w0"))


@pytest.mark.parametrize("outputs", [0, 1])
def test_nearest_in_pieces_is_nearest(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from qdq.plan.spec import Spec
    from qdq.solve.rounding.nearest import round_rows

    monkeypatch.setattr("qdq.core.qtensor.CHUNK", 64)
    array = np.random.default_rng(0).normal(size=(24, 40, 3)[: 2 + (outputs == 0)]).astype(np.float32)
    found = weights.quantize_weight(array, Spec(format="int8", axis=outputs), outputs=outputs, rounding="nearest")
    rows = np.moveaxis(array, outputs, 0).reshape(array.shape[outputs], -1).astype(np.float64)
    expected = round_rows(rows, found.params.scale[:, None].astype(np.float64), None, low=-127, high=127)
    assert np.array_equal(np.moveaxis(found.codes, outputs, 0).reshape(rows.shape), expected)


def test_collect_is_the_same_in_any_order(
    chain: Path, samples: list[dict[str, np.ndarray]], request: pytest.FixtureRequest
) -> None:
    from qdq.plan.placement import plan

    request.getfixturevalue("tiny_is_large")
    model = load_float(chain)
    chosen = plan(model, Settings())
    assert collect(model, chosen, samples).to_json() == collect(model, chosen, samples[::-1]).to_json()
