"""Declared files: what is written is read back equal, and what is wrong is said with its place."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import ClassVar

import jsonschema
import msgspec
import pytest

from engines.core.documents import Document, DocumentError, Measured, Part


class Line(Part, frozen=True, kw_only=True):
    x: int
    y: float = 1.0


class Sheet(Document, frozen=True, kw_only=True):
    FORMAT = "qdq.sheet/2"
    MAKE = "qdq sheet"
    COMPUTED: ClassVar[Mapping[str, str]] = {"count": "number"}
    lines: tuple[Line, ...]
    worst: Measured = 0.0
    shares: dict[int, float] = msgspec.field(default_factory=dict)

    @property
    def number(self) -> int:
        return len(self.lines)


SHEET = Sheet(lines=(Line(x=1), Line(x=2, y=0.5)), shares={3: 0.25})


def test_what_is_written_is_read_back() -> None:
    text = SHEET.to_json()
    assert Sheet.from_json(text) == SHEET and Sheet.from_json(text).to_json() == text
    assert json.loads(text)["count"] == 2 and json.loads(text)["schema"] == "qdq.sheet/2"


WRONG = {
    "{": "not JSON",
    r'{"schema": "qdq.sheet/2", "lines": "\ud800"}': "not JSON .*surrogates",
    "[" * 100_000: "not JSON",
    "[]": "another file",
    '{"schema": "qdq.other/1"}': "another file",
    '{"schema": "qdq.sheet/1"}': "another version of qdq. Make it again with `qdq sheet`",
    '{"schema": "qdq.sheet/2"}': "missing required field `lines`",
    '{"schema": "qdq.sheet/2", "lines": [], "line": []}': "did you mean `lines`",
    '{"schema": "qdq.sheet/2", "lines": [{"x": "1"}]}': r"Expected `int`, got `str` - at `lines\[0\].x`",
    '{"schema": "qdq.sheet/2", "lines": [{"x": 1, "z": 2}]}': r"unknown field `z` - at `lines\[0\]`",
    '{"schema": "qdq.sheet/2", "lines": [], "shares": {"a": 1}}': "Expected `int`",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items(), ids=[k[:40] for k in WRONG])
def test_what_is_wrong_is_said_with_its_place(text: str, message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        Sheet.from_json(text)


def test_the_schema_is_kept_and_not_empty() -> None:
    check = jsonschema.Draft202012Validator(Sheet.schema())
    check.check_schema(Sheet.schema())
    for worst in (1.0, math.inf, -math.inf, math.nan):
        check.validate(json.loads(Sheet(lines=SHEET.lines, worst=worst).to_json()))
    content = json.loads(SHEET.to_json())
    for wrong in ({"worst": "big"}, {"more": 1}, {"count": "2"}, {"schema": "qdq.sheet/1"}, {"lines": [{"x": 1.5}]}):
        assert not check.is_valid(content | wrong), wrong
    assert not check.is_valid({k: v for k, v in content.items() if k != "lines"})


class Cell(Part, frozen=True, kw_only=True):
    name: str
    db: Measured | None = None


class Grid(Document, frozen=True, kw_only=True):
    FORMAT = "qdq.grid/1"
    MAKE = "qdq grid"
    cells: tuple[Cell, ...] = ()
    named: dict[str, Cell] = msgspec.field(default_factory=dict)
    best: Cell | None = None


def test_numbers_that_are_not_finite_are_read_back() -> None:
    cells = tuple(Cell(name="inf", db=db) for db in (math.inf, -math.inf, None, 1.5))  # a name is no number
    grid = Grid(cells=cells, named={"a": cells[0]}, best=cells[1])
    assert Grid.from_json(grid.to_json()) == grid
    found = Grid.from_json(Grid(best=Cell(name="a", db=math.nan)).to_json()).best
    assert found is not None and found.db is not None and math.isnan(found.db)
    with pytest.raises(DocumentError, match=r"Expected `float \| null`, got `str` - at `best.db`"):
        Grid.from_json(Grid(best=cells[1]).to_json().replace('"-inf"', '"-infinite"'))


class Binder(Document, frozen=True, kw_only=True):
    FORMAT = "qdq.binder/1"
    MAKE = "qdq binder"
    sheet: Sheet


def test_a_document_inside_another_is_as_it_is_alone() -> None:
    binder = Binder(sheet=SHEET)
    content = json.loads(binder.to_json())
    assert content["sheet"] == json.loads(SHEET.to_json()) and Binder.from_json(binder.to_json()) == binder
    check = jsonschema.Draft202012Validator(Binder.schema())
    check.validate(content)
    assert not check.is_valid({**content, "sheet": {**content["sheet"], "count": "2"}})


class Shelf(Document, frozen=True, kw_only=True):
    FORMAT = "qdq.shelf/1"
    MAKE = "qdq shelf"
    best: Sheet | None = None
    sheets: tuple[Sheet, ...] = ()


@pytest.mark.parametrize("shelf", [Shelf(), Shelf(best=SHEET), Shelf(sheets=(SHEET, SHEET))])
def test_a_document_may_hold_none_or_several_others(shelf: Shelf) -> None:
    assert Shelf.from_json(shelf.to_json()) == shelf
    jsonschema.Draft202012Validator(Shelf.schema()).validate(json.loads(shelf.to_json()))


def test_none_stays_refused_where_a_document_is_needed() -> None:
    with pytest.raises(DocumentError, match="sheet"):
        Binder.from_json('{"schema": "qdq.binder/1", "sheet": null}')


@pytest.mark.parametrize("half", [rb"\ud800", b"\xed\xa0\x80", b"\xff"])
def test_bytes_that_are_no_text_are_refused(half: bytes) -> None:
    with pytest.raises(DocumentError, match="not JSON"):
        Sheet.from_json(SHEET.to_json().encode().replace(b"{", b'{"' + half + b'": 1,', 1))
