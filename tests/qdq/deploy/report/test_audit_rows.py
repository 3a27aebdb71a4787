"""What an audit says to people of nodes that run an unknown number of turns, and what a required share makes of it."""

from __future__ import annotations

import pytest

from engines.verify.audit import Audit, NodeAudit
from qdq.deploy.report.report import audit_lines, audit_rows, share_failures


def made(*nodes: tuple[str, int | None, int | None]) -> Audit:
    """An audit of products: the type each runs in, its multiply-adds, its turns."""
    rows = tuple(
        NodeAudit(
            node=f"n{i}", op_type="MatMul", macs=macs, requested="", consumed=kind, kernel="k", cause="", turns=turns
        )
        for i, (kind, macs, turns) in enumerate(nodes)
    )
    sizes = {"kernels": 1, "bytes_moved": 1, "weight_bytes": 1, "activation_bytes": 1, "engine_bytes": 1}
    return Audit(nodes=rows, targets=("sm89",), backend="rtx", version="1", **sizes)


def test_products_of_an_unknown_number_of_turns_count_once_and_the_row_says_so() -> None:
    audit = made(("int8", 300, None), ("float32", 100, 1))
    assert audit.int8_share == 0.75 and audit.unknown_names == ("n0",)
    (row,) = [row for row in audit_rows(audit) if row[0] == "multiply-adds, as compiled"]
    assert "75.0% in int8" in row[1] and "1 nodes count for one turn of a loop" in row[1]
    assert not audit_lines(audit)


@pytest.mark.parametrize(
    ("nodes", "least", "said"),
    [
        ([("int8", 300, None), ("float32", 100, 1)], 0.5, ""),  # more turns only raise the share
        ([("int8", 300, 1), ("float32", 100, None)], 0.5, "cannot be checked"),
        ([("int8", 300, 1), ("float32", 100, 7)], 0.9, "0.7500 of the multiply-adds"),
    ],
)
def test_a_share_that_depends_on_turns_cannot_be_checked(
    nodes: list[tuple[str, int, int | None]], least: float, said: str
) -> None:
    failures = share_failures(made(*nodes), least)
    assert said in failures[0] if said else not failures
