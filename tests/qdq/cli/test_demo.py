"""What `qdq demo` shows: first what a user would deploy; INT8 beside it where that gains no time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qdq.build.recipe import Recipe
from qdq.cli.main import main
from qdq.deploy import deploy
from qdq.deploy.report.report import Row


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the demo with a `deploy` that quantizes, or not, and keeps the recipes that it got."""
    monkeypatch.chdir(tmp_path)
    seen: list[tuple[str, Recipe]] = []

    def demo(*args: str, pays: bool, slower: bool = True) -> tuple[Result, list[tuple[str, Recipe]]]:
        def deployed(model: Path, samples: object, out: Path, *, recipe: Recipe, **_: object) -> Any:
            seen.append((out.name, recipe))
            quantized = pays or recipe.tune == "rewrites"
            report = SimpleNamespace(
                title="for sm89",
                audit=SimpleNamespace(targets=("sm89",), missed=(), suspect=(), unknown=(), tables=()),
                rows=lambda: [Row("form", "INT8" if quantized else "FP16")],
                brief=lambda: [Row("brief", "INT8" if quantized else "FP16")],
                to_json=lambda: "{}\n",
                slower=slower and recipe.tune == "rewrites",
                check=SimpleNamespace(poorest=None, volumes=None),
                failures=[],
                notes=(),
            )
            return SimpleNamespace(folder=out, page=out / "report.html", quantized=quantized, report=report)

        monkeypatch.setattr(deploy, "deploy", deployed)
        return CliRunner().invoke(main, ["demo", *args]), seen

    return demo


def test_where_int8_pays_one_table_is_shown(run: Any) -> None:
    result, seen = run(pays=True)
    assert result.exit_code == 0, result.output
    assert [(name, recipe.tune) for name, recipe in seen] == [("qdq-demo", "placement")]
    assert "form INT8" in " ".join(result.stdout.split()) and "Smaller still" not in result.stdout


@pytest.mark.parametrize(
    ("slower", "words"), [(True, "Smaller still and predicted slower: INT8"), (False, "Smaller still: ")]
)
def test_where_it_does_not_pay_int8_comes_second(run: Any, slower: bool, words: str) -> None:
    result, seen = run(pays=False, slower=slower)
    assert result.exit_code == 0, result.output
    assert [(name, recipe.tune) for name, recipe in seen] == [("qdq-demo", "placement"), ("int8", "rewrites")]
    said = " ".join(result.stdout.split())
    assert said.index("form FP16") < said.index(words) < said.index("brief INT8")


def test_json_is_of_what_is_shipped_and_who_chooses_gets_that_alone(run: Any) -> None:
    result, _ = run("--json", pays=False)
    assert result.stdout == "{}\n"
    _, seen = run("--tune", "off", pays=False)
    assert [name for name, _ in seen][2:] == ["qdq-demo"] and seen[-1][1].tune == "off"
