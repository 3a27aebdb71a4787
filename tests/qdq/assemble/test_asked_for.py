"""What was asked for and found nothing to do is said."""

from __future__ import annotations

import graphs
import numpy as np
from transformer_graphs import attention

from qdq.assemble.quantize import quantize
from qdq.plan.settings import Settings


def test_tables_and_attention_that_are_not_there() -> None:
    model = graphs.conv()
    notes = quantize(model, graphs.samples(model), settings=Settings(embeddings="int8", attention="fp8")).solution.notes
    assert "embeddings int8: no table is stored so: the model has none" in notes
    assert "attention fp8: no attention runs so: the model has none" in notes


def test_what_an_override_adds_in_vain_is_said_and_what_nobody_asked_for_is_not() -> None:
    model = graphs.build([graphs.node("MatMul", "x w", "y", "fc")], {"x": (4, 64)}, {"w": graphs.normal(64, 64)})
    settings = Settings(overrides={"fc": "int8:block=32"})
    notes = quantize(model, graphs.samples(model), settings=settings).solution.notes
    assert "override 'fc': block 32 has no effect with scheme int8" in notes
    for calibrator, said in (("", False), ("max", True)):  # without one, comparing settles on its first
        settings = Settings(scheme="int8-weight", calibrator=calibrator)
        notes = quantize(model, graphs.samples(model), settings=settings).solution.notes
        assert any(note.startswith("calibrator") and "no effect" in note for note in notes) == said


def test_one_scale_for_all_of_an_int8_weight_is_what_block_tensor_asks_for() -> None:
    """A product whose outputs differ in size a hundredfold loses by it, and has one scale."""
    sizes = np.geomspace(0.01, 1, 64).astype(np.float32)
    weight = graphs.normal(64, 64) * sizes
    model = graphs.build([graphs.node("MatMul", "x w", "y", "fc")], {"x": (4, 64)}, {"w": weight})
    samples = graphs.samples(model)
    found = {}
    for block in ("auto", "tensor"):
        made = quantize(model, samples, settings=Settings(block=block, rounding="nearest", equalize="none"))
        (codes,) = made.solution.weights.values()
        assert not any(note.startswith("block") for note in made.solution.notes)
        found[block] = np.ptp(codes.params.scale), np.abs(codes.values() - weight).max(axis=0)
        (ours,), (theirs,) = graphs.run(made.model, samples[:1]), graphs.run(model, samples[:1])
        assert np.abs(ours["y"] - theirs["y"]).max() < 0.05 * np.abs(theirs["y"]).max()
    assert found["tensor"][0] == 0 and found["auto"][0] > 0
    assert found["tensor"][1][0] > 20 * found["auto"][1][0]


def test_the_reason_is_that_of_the_plan() -> None:
    model = attention(length=9)
    notes = quantize(model, graphs.samples(model), settings=Settings(attention="fp8")).solution.notes
    assert "attention fp8: no attention runs so: of 9 tokens FP8 attention is not fused: it wants 32" in notes
