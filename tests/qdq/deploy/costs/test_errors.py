"""The error of each quantized tensor is that of its own rounding, as computed apart."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from models import images, segmenter

from qdq.assemble.finish import finish
from qdq.assemble.quantize import Quantized, quantize
from qdq.core.formats import FORMATS
from qdq.deploy.costs import errors
from qdq.deploy.costs.errors import tensor_errors
from qdq.model.model import Model
from qdq.plan.settings import Settings

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")


def made(**settings: object) -> tuple[Quantized, Model]:
    done = quantize(segmenter(), images(4), settings=Settings(**settings))  # type: ignore[arg-type]
    return done, finish(done.model, done.plan, unquantized_type="fp32", table=done.table).model


@pytest.mark.parametrize("shift", [True, False])
def test_the_error_of_an_input_is_that_of_its_codes(shift: bool) -> None:
    done, finished = made(shift=shift, equalize="none")
    samples = images(3, seed=9)
    found = tensor_errors(done.prepared, finished, samples)
    assert found.samples == 3 and not found.why
    assert set(found.sqnr_db) == {(p.role, p.tensor) for p in done.plan.points}
    params = done.solution.activations["image"]
    fmt, scale = FORMATS[params.format], float(params.scale)
    x = np.stack([s["image"] for s in samples]).astype(np.float64)
    codes = np.clip(np.rint(x / scale) + params.zero_point, fmt.low, fmt.high)
    noise = x - (codes - params.zero_point) * scale
    expected = 10 * np.log10((x**2).sum() / (noise**2).sum())
    assert found.sqnr_db["activation", "image"] == pytest.approx(expected, abs=0.05)
    assert all(15 < db < 80 for db in found.sqnr_db.values())


def test_as_many_samples_are_run_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    done, finished = made()
    assert tensor_errors(done.prepared, finished, images(40)).samples == errors.SAMPLES
    monkeypatch.setattr(errors, "VALUES", images(1)[0]["image"].size + 1)
    assert tensor_errors(done.prepared, finished, images(40)).samples == 2


def test_nothing_quantized_and_large_models(monkeypatch: pytest.MonkeyPatch) -> None:
    done, finished = made()
    assert tensor_errors(done.prepared, done.prepared, images(1)).sqnr_db == {}
    monkeypatch.setattr(errors, "is_large", lambda _: True)
    assert tensor_errors(done.prepared, finished, images(1)).why == errors.LARGE


def test_a_model_that_does_not_run_gives_the_reason() -> None:
    done, finished = made()
    broken = onnx.ModelProto()
    broken.CopyFrom(finished.proto)
    broken.graph.node[0].op_type = "NoSuchOperator"
    found = tensor_errors(done.prepared, finished.replace(broken), images(1))
    assert found.sqnr_db == {} and "not measured" in found.why
