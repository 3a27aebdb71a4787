"""The largest magnitude of every float tensor: of inputs, in bodies, beside infinities and NaN; and what it costs."""

from __future__ import annotations

from pathlib import Path

import graphs
import numpy as np
import onnx
import pytest
from graphs import build, node, normal
from onnx import TensorProto, helper, numpy_helper

from qdq.measure.collect import collect
from qdq.measure.inference import session as measured_session
from qdq.measure.inference.magnitudes import WatchedSession
from qdq.measure.inference.session import Session
from qdq.measure.table import CalibrationTable, merged
from qdq.model.model import Model
from qdq.passes.prepare import prepare
from qdq.plan import placement
from qdq.plan.settings import Settings


def ranges(model: Model, data: list[dict[str, np.ndarray]], **options: object) -> CalibrationTable:
    return collect(model, placement.plan(model), data, **options)  # type: ignore[arg-type]


def direct(model: Model, data: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """The largest magnitude of every float tensor of the main graph, from the arrays themselves."""
    names = [i.name for i in model.inputs] + [name for n in model.graph.node for name in n.output if name]
    floats = [name for name in names if (info := model.info(name)) is not None and info.dtype == "float32"]
    session = Session(model, floats, threads=1)
    values = [session(sample) for sample in data]
    return {name: max(float(np.abs(found[name]).max()) for found in values) for name in floats}


@pytest.mark.parametrize("make", [graphs.conv, graphs.residual, graphs.branches, graphs.attention, graphs.product])
def test_every_float_tensor_is_measured_as_its_values_say(make: type[Model]) -> None:
    model = make()
    data = graphs.samples(model, 3)
    want, table = direct(model, data), ranges(model, data)
    assert table.ranges.keys() == want.keys() and not table.not_finite
    for name, amax in want.items():  # a sum may be made in another order where a tensor is an output
        assert table.ranges[name] == pytest.approx(amax, rel=1e-6)


def test_a_plan_that_quantizes_nothing_has_a_table() -> None:
    model = graphs.conv()
    plan = placement.plan(model, Settings(exclude=("*",)))
    data = graphs.samples(model, 2)
    table = collect(model, plan, data)
    assert not plan.points and not table.tensors and table.count == 2
    assert table.ranges == ranges(model, data).ranges and table.ranges.keys() == {"x", "a", "y"}


def test_shards_orders_and_passes_give_the_same_ranges() -> None:
    model = graphs.branches()
    data = graphs.samples(model, 5)
    whole = ranges(model, data)
    assert ranges(model, data[::-1], threads=3).to_json() == whole.to_json()
    assert merged([ranges(model, data[i::2]) for i in (1, 0)]).to_json() == whole.to_json()
    assert ranges(model, data, memory=1).ranges == whole.ranges


def masked() -> Model:
    nodes = [
        node("Log", "x", "logs"),  # minus infinity at 0, NaN below
        node("IsNaN", "logs", "lost"),
        node("Where", "lost zero logs", "held"),
        node("Exp", "held", "e"),
        node("Conv", "e w", "y"),
    ]
    return build(nodes, {"x": (1, 4, 5, 5)}, {"w": normal(4, 4, 1, 1), "zero": np.array(0, np.float32)})


def test_infinities_and_nan_are_said_and_the_finite_values_count() -> None:
    model = masked()
    quiet = {"x": np.full((1, 4, 5, 5), np.exp(2), np.float32)}
    odd = {"x": np.full((1, 4, 5, 5), np.exp(3), np.float32)}
    odd["x"][0, 0, 0, :2] = 0, -1
    for data in ([quiet, odd], [odd, quiet], [odd, quiet, odd]):
        table = ranges(model, data)
        assert table.not_finite == {"logs", "held"}
        assert table.ranges["logs"] == pytest.approx(3) and table.ranges["held"] == pytest.approx(3)
        assert table.ranges["e"] == pytest.approx(np.exp(3))
    assert not ranges(model, [quiet]).not_finite
    nan = {"x": np.full((1, 4, 5, 5), -1, np.float32)}
    assert ranges(model, [nan]).ranges["logs"] == 0 and "logs" in ranges(model, [nan]).not_finite


def test_squares_that_overflow_are_no_infinities() -> None:
    model = build(
        [node("Mul", "x c", "a"), node("Sigmoid", "a", "y")], {"x": (2, 8)}, {"c": np.array(1e30, np.float32)}
    )
    table = ranges(model, [{"x": np.full((2, 8), 2, np.float32)}])
    assert table.ranges["a"] == pytest.approx(2e30) and not table.not_finite


def body(name: str, nodes: list[onnx.NodeProto], inputs: dict[str, object], outputs: dict[str, object]) -> object:
    kinds = {"f": TensorProto.FLOAT, "i": TensorProto.INT64, "b": TensorProto.BOOL}
    ends = [
        [helper.make_tensor_value_info(n, kinds[str(k)[0]], None if len(str(k)) == 1 else []) for n, k in part.items()]
        for part in (inputs, outputs)
    ]
    return helper.make_graph(nodes, name, *ends)


def nested() -> Model:
    """A Loop over n rounds: x is multiplied by c each round; inside, an If takes a square only above 1."""
    then = body("then", [node("Mul", "t t", "square", "sq")], {}, {"square": "f"})
    other = body("other", [node("Neg", "t", "minus", "neg")], {}, {"minus": "f"})
    rounds = [
        node("Mul", "state c", "t", "grow"),
        node("ReduceMax", "t", "top", "top", keepdims=0),
        node("Greater", "top one", "large", "large"),
        helper.make_node("If", ["large"], ["picked"], "choose", then_branch=then, else_branch=other),
        node("Identity", "cond", "again", "again"),
        node("Identity", "t", "next", "next"),
    ]
    loop = body("rounds", rounds, {"i": "i0", "cond": "b0", "state": "f"}, {"again": "b0", "next": "f", "picked": "f"})
    nodes = [helper.make_node("Loop", ["n", "yes", "x"], ["last", "all"], "loop", body=loop), node("Relu", "all", "y")]
    tensors = {"c": np.array(2, np.float32), "one": np.array(1, np.float32), "yes": np.array(True)}
    starts = [helper.make_tensor_value_info("x", 1, [4]), helper.make_tensor_value_info("n", TensorProto.INT64, [])]
    graph = helper.make_graph(
        nodes,
        "nested",
        starts,
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(v, k) for k, v in tensors.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return prepare(Model(proto=proto, directory=Path(), sha256="n"))


def test_tensors_in_bodies_are_measured_over_all_rounds() -> None:
    model = nested()
    x = np.array([0.1, -0.3, 0.2, 0.25], np.float32)
    table = ranges(model, [{"x": x, "n": np.array(4)}])
    want = {
        "last": 4.8,
        "x": 0.3,
        "state": 2.4,
        "t": 4.8,
        "top": 4.0,
        "square": 4.8**2,
        "minus": 1.2,
        "all": 4.8**2,
        "y": 4.8**2,
    }
    assert table.ranges == pytest.approx(want | {"next": 4.8, "picked": 4.8**2}, rel=1e-6)
    short = ranges(model, [{"x": x, "n": np.array(1)}])
    assert "square" not in short.ranges and short.ranges["minus"] == pytest.approx(0.6)
    none = ranges(model, [{"x": x, "n": np.array(0)}])
    assert none.ranges.keys() == {"x", "last"}
    assert merged([none, short, table]).ranges == merged([table, none]).ranges | {"minus": table.ranges["minus"]}


def test_scan_with_its_own_axes_keeps_its_outputs() -> None:
    step = body(
        "step",
        [node("Add", "s v", "sum", "add"), node("Neg", "sum", "out", "neg")],
        {"s": "f", "v": "f"},
        {"sum": "f", "out": "f"},
    )
    nodes = [
        helper.make_node(
            "Scan", ["s0", "x"], ["sum_of_all", "z"], "scan", body=step, num_scan_inputs=1, scan_output_axes=[1]
        ),
        node("Relu", "z", "y"),
    ]
    model = build(nodes, {"x": (5, 3)}, {"s0": np.zeros(3, np.float32)})
    x = normal(5, 3)
    session = WatchedSession(model, ["z"], threads=1)
    values, seen = session({"x": x})
    np.testing.assert_allclose(values["z"], -np.cumsum(x, 0).T, rtol=1e-5)
    assert seen["sum"].amax == pytest.approx(np.abs(np.cumsum(x, 0)).max(), rel=1e-5)


def test_a_table_from_before_is_refused_with_the_command(tmp_path: Path) -> None:
    model = graphs.conv()
    text = ranges(model, graphs.samples(model, 1)).to_json()
    (tmp_path / "t.json").write_text(text)
    back = CalibrationTable.load(tmp_path / "t.json")
    assert back.to_json() == text and back.ranges
    (tmp_path / "t.json").write_text(text.replace("qdq.table/3", "qdq.table/2"))
    with pytest.raises(Exception, match=r"'qdq\.table/2' and 'qdq\.table/3' is needed.*qdq calibrate MODEL"):
        CalibrationTable.load(tmp_path / "t.json")


def test_tensors_do_not_outlive_their_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 40 tensors of 4 MB is dropped once it was measured; ONNX Runtime's own order would keep them all."""
    nodes = [node(op, f"t{i}", f"t{i + 1}", f"n{i}") for i, op in enumerate(["Sigmoid", "Tanh"] * 20)]
    model = build(nodes, {"t0": (1024, 1024)}, outputs=("t40",))
    import onnxruntime as ort

    orders = []
    real = measured_session.session_options

    def options(**given: object) -> object:
        orders.append(real(**given))
        return orders[-1]

    monkeypatch.setattr(measured_session, "session_options", options)
    session = WatchedSession(model, [], threads=1)
    assert [each.execution_order for each in orders] == [ort.ExecutionOrder.PRIORITY_BASED]
    _, seen = session({"t0": np.ones((1024, 1024), np.float32)})
    assert len(seen) == 41
