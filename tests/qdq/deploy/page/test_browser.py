"""The page in a browser: no error, no request, sorting and searching by mouse and keyboard, no scroll aside."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from made_run import made_run, with_volumes

from qdq.deploy.page.render import page

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")

DRIVER = """
const found = {};
const table = document.getElementById("nodes");
const names = () => [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => row.cells[1].textContent);
const head = (text) => [...table.querySelectorAll("th button")].find((button) => button.textContent.startsWith(text));
const state = () => [...table.querySelectorAll("thead th")].map((th) => th.getAttribute("aria-sort"));
const search = document.querySelector(".tools input");
const type = (text) => { search.value = text; search.dispatchEvent(new Event("input")); };
found.first = names();
head("Predicted").focus();
found.focused = document.activeElement === head("Predicted");
head("Predicted").click();
found.up = names(); found.up_state = state();
head("Predicted").click();
found.down = names(); found.down_state = state();
head("Data").click();
found.data = names();
type("CONV head");
found.searched = names(); found.count = document.querySelector("[role=status]").textContent;
type("");
const kinds = document.querySelector(".tools select");
kinds.value = "low"; kinds.dispatchEvent(new Event("change"));
found.low = names().length;
const theme = document.querySelector(".theme");
const ground = () => getComputedStyle(document.body).backgroundColor;
theme.click(); found.light = ground(); theme.click(); found.dark = ground();
found.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const tab = [...document.querySelectorAll("a[href], button, input, select, summary, [tabindex='0']")];
found.reachable = tab.every((one) => one.tabIndex === 0);
dispatchEvent(new Event("beforeprint"));
found.closed = document.querySelectorAll("details:not([open])").length;
found.asked = performance.getEntriesByType("resource").map((one) => one.name);
const say = document.createElement("pre");
say.id = "found"; say.textContent = JSON.stringify(found);
document.body.append(say);
"""


def browse(path: Path, *options: str) -> tuple[str, str]:
    """The document after scripts ran, and what the browser logged."""
    fixed = ("--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0")
    own = (f"--user-data-dir={path.with_suffix('.profile')}", "--disable-background-networking", "--no-first-run")
    done = subprocess.run(
        [str(CHROMIUM), *fixed, *own, *options, "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def driven(text: str, script: str) -> str:
    """The page with one script more, which its policy lets run."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = text.replace("script-src ", f"script-src &#39;sha256-{digest}&#39; ", 1)
    assert allowed != text
    return allowed.replace("</body>", f"<script>{script}</script></body>")


def result(document: str) -> Any:
    (found,) = re.findall(r'<pre id="found">(.*?)</pre>', document, flags=re.DOTALL)
    return json.loads(html.unescape(found))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("run")
    with_volumes(place, made_run(place, limits={"min_sqnr_db": 20.0}), [0.9, 0.8, 0.95])
    return page(place)


def test_the_page_is_driven(text: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(driven(text, DRIVER))
    document, said = browse(path, "--window-size=1400,1000")
    assert "CONSOLE" not in said, said
    found = result(document)
    assert found["asked"] == []
    encode, relu, head = "/encode/Conv", "/encode/Relu", "/head/Conv"
    assert found["first"] == [encode, relu, head] and found["focused"]
    assert found["up"] == [encode, relu, head] and found["down"] == [head, relu, encode]
    assert found["up_state"].count("ascending") == 1 and found["down_state"].count("descending") == 1
    assert set(found["up_state"]) == {"none", "ascending"}  # the first order is given up
    assert found["data"][-1] == relu  # which has no error: it comes last
    assert found["searched"] == [head] and found["count"] == "1 of 3 shown" and found["low"] == 2
    assert found["light"] == "rgb(255, 255, 255)" and found["dark"] == "rgb(20, 23, 27)"
    assert found["wide"] <= 0 and found["reachable"] and found["closed"] == 0


def test_a_narrow_page_does_not_scroll_aside(text: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(text)
    script = (
        "const frame = document.querySelector('iframe').contentDocument.documentElement;"
        "const say = document.createElement('pre'); say.id = 'found';"
        "say.textContent = JSON.stringify([frame.scrollWidth, frame.clientWidth]); document.body.append(say);"
    )
    place = '<iframe src="page.html" style="width:400px;height:900px;border:0"></iframe>'
    frame = f"<body>{place}<script>onload=()=>{{{script}}}</script>"
    (tmp_path / "frame.html").write_text(frame)
    document, _ = browse(tmp_path / "frame.html", "--allow-file-access-from-files")
    wide, room = result(document)
    assert wide <= room <= 400


def test_a_policy_that_is_broken_is_seen(text: str, tmp_path: Path) -> None:
    """What the first test looks for is there where a page does ask, or runs another script."""
    path = tmp_path / "page.html"
    path.write_text(text.replace("</body>", '<script>1</script><img src="https://example.invalid/x.png"></body>'))
    _, said = browse(path)
    assert "CONSOLE" in said and "Content Security Policy" in said
