"""--plot leaves a picture per tensor and a page that lists the worst first."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from models import images, segmenter

from qdq.core.errors import InputError, MissingRuntimeError
from qdq.deploy.report.plots import draw
from qdq.measure.collect import collect
from qdq.measure.table import CalibrationTable
from qdq.model.model import Model
from qdq.passes.prepare import prepare
from qdq.plan import placement
from qdq.plan.plan import Plan


@pytest.fixture(scope="module")
def model() -> Model:
    return prepare(Model(proto=segmenter(), directory=Path(), sha256="m"))


@pytest.fixture(scope="module")
def plan(model: Model) -> Plan:
    return placement.plan(model)


@pytest.fixture(scope="module")
def table(model: Model, plan: Plan) -> CalibrationTable:
    return collect(model, plan, images(3))


def test_page_lists_every_tensor_the_worst_first(
    tmp_path: Path, model: Model, plan: Plan, table: CalibrationTable
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install qdq[plot]")
    page = draw(model, plan, table, tmp_path / "plots")
    text = page.read_text(encoding="utf-8")
    pictures = re.findall(r'<img src="([^"]+)"', text)
    assert sorted(p.name for p in page.parent.iterdir()) == sorted([*pictures, "index.html"])
    assert all((page.parent / p).read_bytes().startswith(b"\x89PNG") for p in pictures)
    rows = re.findall(r"<tr><td>(.+?)</td><td>.+?</td><td>.+?</td>(.+?)<td><a", text)
    assert {name for name, _ in rows} == set(table.tensors)
    best = [max(float(v) for v in re.findall(r">([\d.]+)</td>", cells)) for _, cells in rows]
    assert best == sorted(best) and np.isfinite(best).all()


def test_what_is_missing_is_said(
    tmp_path: Path, model: Model, plan: Plan, table: CalibrationTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    if "matplotlib" in sys.modules or __import__("importlib.util").util.find_spec("matplotlib"):
        with pytest.raises(InputError, match="Cannot write pictures"):
            draw(model, plan, table, tmp_path / "file")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingRuntimeError, match=r"pip install 'qdq\[plot\]'"):
        draw(model, plan, table, tmp_path)
