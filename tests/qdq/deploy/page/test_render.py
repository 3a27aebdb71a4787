"""One file that fetches nothing, escapes everything, and can be read by whoever looks at it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_run import HOSTILE, made_run, with_volumes

from engines.core.documents import replace
from qdq.deploy.page.folder import Run, read
from qdq.deploy.page.render import TEMPLATES, html, page, page_of_changes
from qdq.deploy.report.details import NodeRow
from qdq.plan.plan import Skip

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")
CSS = (TEMPLATES / "page.css").read_text(encoding="utf-8")
VOID = {"meta", "input", "br", "img", "link", "hr"}


class Page(HTMLParser):
    """Elements with their attributes, and what is wrong with their nesting."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    with_volumes(place, made_run(place, limits={"min_sqnr_db": 20.0}), [0.9, 0.8, 0.95])
    return place


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    return page(folder)


def test_the_same_files_give_the_same_page(folder: Path, text: str) -> None:
    assert page(folder) == text and len(text.encode()) < 100_000


def test_a_large_network_stays_under_a_megabyte(folder: Path) -> None:
    run = read(folder)
    assert isinstance(run, Run) and run.report.details and run.plan
    path = "/encoder/layers.{}/blocks.{}/attention/projection/MatMul"
    nodes = tuple(NodeRow(node=path.format(n, n % 4), op_type="MatMul", macs=n) for n in range(1200))
    why = "it moves or picks values; a quantizer behind it is hoisted above it by the compiler"
    skips = tuple(Skip(node=row.node, op_type="MatMul", rule="r", reason=why) for row in nodes)
    report = replace(run.report, details=replace(run.report.details, nodes=nodes))
    text = html(dataclasses.replace(run, report=report, plan=replace(run.plan, skips=skips)))
    assert text.count(why) == 1200 and len(text.encode()) < 1_000_000  # twice the nodes of SwinUNETR


def test_nothing_is_fetched_and_no_script_but_ours_runs(text: str) -> None:
    made = Page(text)
    assert not made.wrong and not made.open
    for tag, attributes in made.elements:
        for name, value in attributes.items():
            assert not name.startswith("on") and name != "style", (tag, name)
            if name in ("src", "href", "action", "data", "srcset", "xlink:href"):
                assert value and value.startswith(("#", "data:image/png")), (tag, name, value)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|localStorage", text)
    policy = next(m["content"] for m in made.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'") and "unsafe" not in policy
    for kind in ("style", "script"):
        (inside,) = re.findall(rf"<{kind}>(.*?)</{kind}>", text, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_names_that_are_markup_are_text(tmp_path: Path) -> None:
    made_run(tmp_path / "a", hostile=True)
    (tmp_path / "a" / "provenance.json").write_text('{"schema": {"<script>": "</script><script>1"}}')
    made_run(tmp_path / "b")
    for text in (page(tmp_path / "a"), page_of_changes(tmp_path / "a", tmp_path / "b")):
        made = Page(text)
        assert len(made.all("script")) == 1 and not made.wrong and not made.open
        assert text.count("<script>") == 1 and text.count("</script>") == 1 and HOSTILE not in text
        assert "&lt;script&gt;document" in text


def test_whoever_does_not_see_it_finds_their_way(text: str) -> None:
    made = Page(text)
    assert made.all("html")[0]["lang"] == "en" and re.search(r"<title>.+</title>", text)
    levels = [int(tag[1]) for tag, _ in made.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))
    ids = [a["id"] for _, a in made.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for link in made.all("a"):
        assert (link["href"] or "").removeprefix("#") in ids
    assert text.count("<table") == text.count("<caption>") > 3
    assert all(a.get("scope") for a in made.all("th"))
    for attributes in made.all("svg"):
        assert attributes.get("role") == "img" or attributes.get("aria-hidden") == "true"
    assert len(re.findall(r'<svg [^>]*role="img"[^>]*><title>', text)) == text.count('role="img"')
    for attributes in made.elements:
        if "tabindex" in attributes[1]:
            assert attributes[1]["role"] == "region" and attributes[1]["aria-label"]


def colours() -> dict[str, tuple[str, str]]:
    """Name -> light and dark."""
    return {n: (a, b) for n, a, b in re.findall(r"--([a-z]+): light-dark\((#\w{6}), (#\w{6})\)", CSS)}


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours (WCAG 2.2)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_contrast_is_that_of_wcag_aa(theme: int) -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    found = {name: pair[theme] for name, pair in colours().items()}
    assert set(re.findall(r"var\(--([a-z]+)\)", CSS)) <= found.keys()
    for ground in ("page", "panel"):
        for name in ("ink", "quiet", "link", "good", "bad", "warn"):
            assert contrast(found[name], found[ground]) >= 4.5, (name, ground)
        for name in ("low", "float", "rest"):
            assert contrast(found[name], found[ground]) >= 3, (name, ground)
    assert contrast(found["low"], found["range"]) >= 3 and contrast(found["ink"], found["range"]) >= 4.5


def _seen(colour: str, kind: str) -> tuple[float, ...]:
    """A colour as those see it who lack a cone (Machado et al. 2009, severity 1), linear RGB."""
    matrix = {
        "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
        "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    }[kind]
    rgb = [(int(colour[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5)]
    return tuple(sum(a * b for a, b in zip(row, rgb, strict=True)) for row in matrix)


@pytest.mark.parametrize("theme", [0, 1])
@pytest.mark.parametrize("kind", ["protan", "deutan"])
def test_types_differ_for_who_is_colour_blind(theme: int, kind: str) -> None:
    found = {name: pair[theme] for name, pair in colours().items()}
    for one, other in (("low", "float"), ("low", "rest"), ("float", "rest"), ("good", "bad")):
        a, b = _seen(found[one], kind), _seen(found[other], kind)
        assert sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5 > 0.07, (one, other)
