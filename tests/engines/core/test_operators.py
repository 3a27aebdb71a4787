"""Families of operators: each name is an operator of ONNX."""

from __future__ import annotations

import onnx
import pytest

from engines.core import operators

FAMILIES = {name: value for name, value in vars(operators).items() if name.isupper()}
KNOWN = {schema.name for schema in onnx.defs.get_all_schemas_with_history()} | {"SimplifiedLayerNormalization"}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_names_operators(name: str) -> None:
    assert FAMILIES[name] and set(FAMILIES[name]) <= KNOWN
