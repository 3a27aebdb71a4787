"""Hostile inputs of every kind: one paragraph and exit code 2, in seconds; `hunt.py` is the long run."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from fuzz.forked import Server
from fuzz.hunt import broken, valid_documents
from fuzz.mutate import KINDS, Made

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")
pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")
if not hasattr(os, "fork"):
    pytest.skip("the server forks, which this system does not", allow_module_level=True)

SECONDS = 110  # for all kinds together
LEAST = 5  # inputs of each, however slow the machine is


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Made]]:
    """The server, and the files that valid runs write."""
    with Server() as server:
        yield server, valid_documents(server, tmp_path_factory.mktemp("valid"))


@pytest.mark.parametrize("kind", sorted(set(KINDS)))
def test_hostile_inputs(prepared: tuple[Server, Made], kind: str) -> None:
    server, made = prepared
    until = time.monotonic() + SECONDS * KINDS.count(kind) / len(KINDS)
    for seed in itertools.count():
        if seed >= LEAST and time.monotonic() > until:
            break
        command, outcome, rule = broken(server, kind, made, Random(seed))
        assert not rule, f"seed {seed}: qdq {' '.join(command)}: {rule}\n{outcome.said}"


def test_a_broken_rule_is_seen(prepared: tuple[Server, Made], tmp_path: Path) -> None:
    server, _ = prepared
    (tmp_path / "run").mkdir()
    outcome = server.run(tmp_path / "run", "python", "raise KeyError('x')")
    assert outcome.code == 70 or "Traceback" in outcome.said
    assert server.run(tmp_path / "run", "python", "while True: pass").code < 0
    assert server.run(tmp_path / "run", "lint", "absent.onnx").code == 2
