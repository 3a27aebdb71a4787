"""What the page says, as plain values, against the files it is made of."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_run import made_run, with_volumes

from engines.core.documents import replace
from engines.verify.audit import Audit, NodeAudit
from qdq.deploy.page.folder import Run, read
from qdq.deploy.page.limits import limits
from qdq.deploy.page.view import view
from qdq.deploy.report.details import NodeRow

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")


def opened(folder: Path) -> Run:
    found = read(folder)
    assert isinstance(found, Run)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    made_run(folder, limits={"min_sqnr_db": 20.0, "min_cosine": 0.99999999})
    return opened(folder)


def test_each_limit_says_what_it_got_and_whether_that_is_enough(run: Run) -> None:
    rows = {row["option"]: row for row in limits(run.report)}
    assert rows["--min-sqnr-db"]["kept"] and rows["--min-sqnr-db"]["needed"] == "at least 20 dB"
    assert rows["--min-sqnr-db"]["got"] == f"{run.report.check.sqnr_db:.4g} dB"
    assert not rows["--min-cosine"]["kept"]
    made = view(run)
    assert made["verdict"]["state"] == "failed" and made["verdict"]["text"] == "1 of 2 limits missed"
    assert made["verdict"]["failures"] == run.report.failures


def test_without_limits_nothing_is_called_passed(run: Run) -> None:
    free = replace(run.report, check=replace(run.report.check, limits=type(run.report.check.limits)()))
    made = view(_with(run, free))
    assert made["verdict"]["state"] == "open" and made["limits"] == []
    share = replace(free, min_int8_share=0.5)
    (row,) = limits(share)
    assert not row["kept"] and row["got"] == "not known: no engine was built"


def _with(run: Run, report: object) -> Run:
    from dataclasses import replace as changed

    return changed(run, report=report)  # type: ignore[arg-type]


def test_nodes_come_in_order_with_type_time_error_and_reason(run: Run) -> None:
    first, relu, last = view(run)["nodes"]
    assert (first["node"], relu["node"], last["node"]) == ("/encode/Conv", "/encode/Relu", "/head/Conv")
    assert first["type"] == "INT8, as planned" and first["kind"] == "low" and first["us"] == 1.5
    assert run.plan and relu["why"] == next(s.reason for s in run.plan.skips if s.node == "/encode/Relu")
    assert relu["type"] == "float" and relu["data_db"] is None and not relu["multiplies"]
    details = run.report.details
    assert details
    own = {(t.role, t.tensor): t.sqnr_db for t in details.tensors}
    assert last["data_db"] == own["activation", "b"] and last["weight_db"] == own["weight", "head.weight"]


def test_times_are_called_predicted_and_shares_sum_up(run: Run) -> None:
    made = view(run)
    facts = {fact["label"]: fact for fact in made["facts"]}
    assert facts["Predicted time"]["value"] == "7.5 µs" and "a10" in facts["Predicted time"]["note"]
    assert "Measured time" not in facts and facts["Asks for INT8"]["value"] == "100 %"
    kernels = made["kernels"]
    assert kernels["total"] == 7.5 and [row["us"] for row in kernels["rows"]] == [3.5, 2.5, 1.5]
    assert {name: share for name, share, _ in kernels["types"]} == {
        "FP16": "46.7 %",
        "no products": "33.3 %",
        "INT8": "20.0 %",
    }


@pytest.mark.parametrize(
    ("asked", "label", "value"),
    [
        (("int8", ""), "Asks for INT8", "75.0 %"),
        (("fp8", "fp8"), "Asks for FP8", "100 %"),
        (("weight-only int4", ""), "Asks for INT4 weights", "75.0 %"),
        (("int8", "weight-only int4"), "Asks for INT8 or INT4 weights", "100 %"),
        (("", ""), "Asks for INT8", "0 %"),
    ],
)
def test_what_is_asked_for_is_called_by_its_type(run: Run, asked: tuple[str, str], label: str, value: str) -> None:
    assert run.report.details
    rows = tuple(NodeRow(node=str(n), op_type="Conv", macs=macs, asked=asked[n]) for n, macs in enumerate((30, 10)))
    report = replace(run.report, details=replace(run.report.details, nodes=rows))
    facts = {fact["label"]: fact["value"] for fact in view(_with(run, report))["facts"]}
    assert facts[label] == value and sum(name.startswith("Asks for") for name in facts) == 1


@pytest.mark.parametrize(
    ("ran", "label", "value"),
    [
        ((("int8", "int8"), ("", "float16")), "Runs in INT8", "50.0 %"),
        ((("int8", "float16"), ("", "float16")), "Runs in INT8", "0 %"),
        ((("fp8", "fp8"), ("fp8", "fp8")), "Runs in FP8", "100 %"),
        ((("weight-only int4", "float16"), ("weight-only int4", "float16")), "Runs in FP16", "100 %"),
        ((("weight-only int4", "float16"), ("int8", "int8")), "Runs in INT8", "50.0 %"),
    ],
)
def test_what_runs_is_called_by_its_type(run: Run, ran: tuple[tuple[str, str], ...], label: str, value: str) -> None:
    nodes = tuple(
        NodeAudit(node=str(n), op_type="Conv", macs=8, requested=asked, consumed=got, kernel="k", cause="")
        for n, (asked, got) in enumerate(ran)
    )
    sizes = {"kernels": 2, "bytes_moved": 1, "weight_bytes": 1, "activation_bytes": 1, "engine_bytes": 1}
    audit = Audit(nodes=nodes, targets=("sm86",), backend="trt", version="11.1", **sizes)
    facts = {fact["label"]: fact["value"] for fact in view(_with(run, replace(run.report, audit=audit)))["facts"]}
    assert facts[label] == value and sum(name.startswith("Runs in") for name in facts) == 1


def test_sizes_stand_beside_fp16_and_fp32(run: Run) -> None:
    (row,) = view(run)["sizes"]
    assert (row["now"], row["fp16"], row["of_fp16"], row["of_fp32"]) == ("1.0 KiB", "2.0 KiB", "0.50", "0.25")


def test_ranges_are_those_of_the_codes(run: Run) -> None:
    rows = {row["tensor"]: row for row in view(run)["ranges"]}
    details = run.report.details
    assert details
    tensor = next(t for t in details.tensors if t.tensor == "image")
    assert tensor.low is not None and tensor.high is not None
    assert rows["image"]["range"] == f"{tensor.low:.4g} to {tensor.high:.4g}"
    assert 'role="img"' in rows["image"]["picture"] and "<title>Histogram of image" in rows["image"]["picture"]


def test_volumes_have_a_box_for_each_structure(tmp_path: Path) -> None:
    with_volumes(tmp_path, made_run(tmp_path), [0.9, 0.8, None, 0.95])
    made = view(opened(tmp_path))["volumes"]
    (table,) = made["tables"]
    (row,) = table["rows"]
    assert (row["dice"]["text"] == "0.8833" and row["cases"] == "3; 1 found only here") or row["cases"].startswith("3")
    assert [plot["title"].split()[0] for plot in made["plots"]] == ["Dice", "HD95"]
    assert made["plots"][0]["picture"].count("<circle") == 3 and not made["pictures"]
