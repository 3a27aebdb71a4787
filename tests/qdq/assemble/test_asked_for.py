"""What was asked for and found nothing to do is said."""

from __future__ import annotations

import graphs
from transformer_graphs import attention

from qdq.assemble.quantize import quantize
from qdq.plan.settings import Settings


def test_tables_and_attention_that_are_not_there() -> None:
    model = graphs.conv()
    notes = quantize(model, graphs.samples(model), settings=Settings(embeddings="int8", attention="fp8")).solution.notes
    assert "embeddings int8: no table is stored so: the model has none" in notes
    assert "attention fp8: no attention runs so: the model has none" in notes


def test_the_reason_is_that_of_the_plan() -> None:
    model = attention(length=9)
    notes = quantize(model, graphs.samples(model), settings=Settings(attention="fp8")).solution.notes
    assert "attention fp8: no attention runs so: of 9 tokens FP8 attention is not fused: it wants 32" in notes
