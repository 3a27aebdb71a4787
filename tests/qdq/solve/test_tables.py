"""Tables as codes: what the model computes with them, what products share, and what compilers keep of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from decoder_graphs import ROWS, WIDTH, lookup
from graphs import Made, quantized, run
from onnx import numpy_helper

from engines.backends import rtx
from engines.core.documents import replace
from engines.verify.audit import audit
from qdq.assemble.finish import finish
from qdq.assemble.quantize import quantize
from qdq.core.errors import InputError
from qdq.lint.lint import lint
from qdq.model import external, weight_store
from qdq.model.external import is_stored
from qdq.model.model import Model
from qdq.model.storage import load, save
from qdq.plan import placement
from qdq.plan.settings import Settings

Sample = dict[str, np.ndarray]


def ids(count: int = 6, *, more: bool = False) -> list[Sample]:
    """Rows of the table, by negative indices too."""
    rng = np.random.default_rng(5)
    names = ("ids", "more") if more else ("ids",)
    return [{name: rng.integers(-ROWS, ROWS, 4) for name in names} for _ in range(count)]


def made(model: Model, **settings: object) -> Made:
    return quantized(model, ids(more=len(model.inputs) > 1), **{"equalize": "none", "shift": False, **settings})


def held(result: Made, name: str = "table") -> np.ndarray:
    """What a table's codes stand for."""
    return result.solution.tables.codes[name].values()


def db(wanted: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10((wanted.astype(np.float64) ** 2).sum() / ((wanted - found) ** 2).sum()))


@pytest.mark.parametrize("fmt, least", [("int8", 38.0), ("int4", 18.0)])
def test_every_row_is_rounded_by_its_own_scale(fmt: str, least: float) -> None:
    model = lookup()
    values = model.array("table").copy()
    values[7] *= 1000  # an outlier costs no other row anything
    changed = type(model.proto).FromString(model.proto.SerializeToString())
    stored = next(t for t in changed.graph.initializer if t.name == "table")
    stored.CopyFrom(numpy_helper.from_array(values, "table"))
    result = made(model.replace(changed), embeddings=fmt)
    found = held(result)
    assert min(db(values[i], found[i]) for i in range(ROWS)) > least
    names = {t.name for t in result.model.graph.initializer}
    assert "table" not in names and "table_quantized" in names


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_the_model_reads_the_dequantized_rows(fmt: str) -> None:
    model = lookup(second=True)
    result = made(model, embeddings=fmt, scheme="int8", exclude=("layer",))
    data = ids(more=True)
    table, w = held(result), model.array("w")
    for sample, found in zip(data, run(result.model, data), strict=True):
        rows = table[sample["ids"]] + table[sample["more"]]
        rows -= rows.mean(axis=1, keepdims=True)
        wanted = np.maximum(rows / np.sqrt((rows**2).mean(axis=1, keepdims=True) + 1e-5) @ w, 0)
        np.testing.assert_allclose(found["y"], wanted, rtol=1e-4, atol=1e-4)
    assert [n.op_type for n in result.model.graph.node].count("DequantizeLinear") == 1


def test_tied_words_share_one_constant() -> None:
    for head in ("turned", "gemm"):
        result = made(lookup(head=head), embeddings="int8", rounding="nearest")
        assert list(result.solution.tables.shared.values()) == ["table"]
        large = [t for t in result.model.graph.initializer if np.prod(t.dims) == ROWS * WIDTH]
        assert [t.name for t in large] == ["table_quantized"]
        assert "read the same codes" in result.solution.notes[-1]
        apart = made(lookup(head=head), rounding="nearest")
        data = ids()
        for ours, theirs in zip(run(result.model, data), run(apart.model, data), strict=True):
            assert db(theirs["z"], ours["z"]) > 25


def test_tied_words_of_another_form_have_codes_of_their_own() -> None:
    result = made(lookup(head="turned"), embeddings="int8", scheme="int4")
    assert not result.solution.tables.shared
    assert "has codes of its own" in result.solution.notes[-1]


def test_a_table_without_numbers_is_refused() -> None:
    model = lookup()
    values = model.array("table").copy()
    values[3, 3] = np.nan
    stored = next(t for t in model.proto.graph.initializer if t.name == "table")
    stored.CopyFrom(numpy_helper.from_array(values, "table"))
    with pytest.raises(InputError, match="Table 'table' of the float model holds NaN"):
        made(model, embeddings="int8")


@pytest.mark.parametrize("fmt, bits", [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("rest", ["fp16", "fp32"])
def test_the_engine_holds_codes(fmt: str, bits: int, rest: str) -> None:
    model = lookup()
    result = quantize(model, ids(), settings=Settings(embeddings=fmt, rounding="nearest", equalize="none"))
    shipped = finish(result.model, result.plan, unquantized_type=rest, table=result.table).model
    assert not lint(shipped)
    engine = rtx.build(shipped.proto, targets=("sm86",))
    (table,) = audit(shipped.proto, engine.table).tables
    assert (table.node, table.requested, table.stored) == ("read", fmt, fmt)
    assert table.nbytes == ROWS * WIDTH * bits // 8 and not table.missed
    assert engine.table.weight_bytes < ROWS * WIDTH * bits / 8 * 1.4 + 4 * WIDTH * WIDTH


def test_the_engine_holds_one_copy_of_tied_words() -> None:
    model = lookup(head="turned", rows=2048)
    data = [{"ids": np.arange(i, i + 4)} for i in range(4)]
    sizes = []
    for how in ("float", "int8"):
        result = quantize(model, data, settings=Settings(embeddings=how, rounding="nearest"))
        shipped = finish(result.model, result.plan, unquantized_type="fp16", table=result.table).model
        engine = rtx.build(shipped.proto, targets=("sm89",))
        found = audit(shipped.proto, engine.table)
        assert not found.missed and next(n for n in found.nodes if n.node == "head").consumed == "int8"
        sizes.append(engine.table.weight_bytes)
    assert sizes[1] < 0.4 * sizes[0]  # one byte an element in place of three


def test_only_the_table_where_nothing_else_is_quantized() -> None:
    model = lookup()
    result = quantize(model, ids(), settings=Settings(embeddings="int8", exclude=("layer",)))
    assert not result.plan.points and result.plan.quantizes
    assert result.plan.why_nothing.startswith("Nothing but tables is quantized")
    assert "table_quantized" in {t.name for t in result.model.graph.initializer}


@pytest.mark.parametrize("fmt", ["int8", "int4"])
@pytest.mark.parametrize("head", ["", "turned", "gemm"])
def test_tables_of_a_large_model_get_the_codes_of_a_small_one(
    fmt: str, head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes that lie in files, of a table alone and of one that a product shares."""
    source, settings = (
        lookup(head=head),
        Settings(embeddings=fmt, rounding="nearest", equalize="none", calibrator="max"),
    )
    onnx.save_model(source.proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    small = quantize(tmp_path / "m.onnx", ids(), settings=settings)
    for module, name in ((external, "LARGE"), (external, "MAPPED"), (weight_store, "LEAST")):
        monkeypatch.setattr(module, name, 1)
    large = quantize(tmp_path / "m.onnx", None, settings=settings, table=small.table)
    stored = {t.name for t in large.model.graph.initializer if is_stored(t)}
    assert "table_quantized" in stored
    save(large.model, tmp_path / "large.onnx")
    found = load(tmp_path / "large.onnx")
    assert found.initializers.keys() == small.model.initializers.keys()
    for name in found.initializers:
        np.testing.assert_array_equal(found.array(name), small.model.array(name))


def test_a_tie_to_a_weight_of_other_values_is_refused() -> None:
    """By its form alone it would read another weight's codes."""
    model, settings = lookup(), Settings(embeddings="int8", equalize="none")
    plan = placement.plan(model, settings)
    (table,), (weight,) = plan.tables, plan.weights
    with pytest.raises(InputError, match="which has other values"):
        quantize(model, ids(), plan=replace(plan, tables=(replace(table, tie=weight.tensor),)))
