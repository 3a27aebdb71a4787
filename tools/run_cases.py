"""Run the commands of a folder of cases and print what each ended with.

The folder's README.md holds a table whose first two columns are case names and commands; every case is a folder beside
it. A case is copied to a temporary folder and its commands run there with this interpreter's qdq, one after the other.

    python tools/run_cases.py [../shared/cases] [--only NAME ...] [--time-limit SECONDS]

Commands are read as people abbreviate them:

    ...                  the row before where it begins a command; else the model, samples and output
    the same             the commands of the row before
    X.onnx, X.yaml       every file of that kind; a model that is not there likewise
    --shape ...          open sizes as a twin of the model has them, else 4
    a file name alone    the command before, with that file in place of the one most like it
    --option alone       `qdq quantize model.onnx` with it; where "etc." follows, with every file that is no model
    module.call(...)     run by Python
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from difflib import SequenceMatcher
from pathlib import Path

import onnx

OUTPUT = ("-o", "q.onnx")
OUTPUTS = ("-o", "--output", "--out")
EVERY = "every"
Command = list[str]


def table(readme: Path) -> Iterator[tuple[list[str], str]]:
    """The case names and the text of the command of each row."""
    for line in readme.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        names = cells[0].split(", ")
        if line.startswith("|") and len(cells) > 1 and all((readme.parent / name).is_dir() for name in names):
            yield names, cells[1]


def commands(text: str, before: Sequence[Command]) -> list[Command]:
    """The commands of a row, still with their abbreviations; `before` are those of the row before."""
    found: list[Command] = []
    if text.startswith("the same"):
        found = [list(command) for command in before]
    for part in (p.strip() for quoted in re.findall(r"`([^`]+)`", text) for p in quoted.split("; ")):
        if re.fullmatch(r"[\w.]+\(.*\)", part):
            found.append(["python", "-c", f"import {part.partition('.')[0]}; {part}"])
            continue
        words = shlex.split(part)
        if f"`{part}` etc." in text:
            words[-1] = EVERY
        if words[0] == "qdq":
            found.append(words)
        elif words[0] == "...":
            found.append([*before[-1], *words[1:]])
        elif words[0].startswith("--"):
            found.append(["qdq", "quantize", "model.onnx", *words, *OUTPUT])
        elif found and len(words) == 1:
            like = [w for w in found[-1] if Path(w).suffix == Path(part).suffix and w not in OUTPUT]
            most = max(like, key=lambda word: SequenceMatcher(None, word, part).ratio(), default=None)
            found.append([part if word == most else word for word in found[-1]])
    return found


def outputs(row: Sequence[Command]) -> set[str]:
    """The files that the commands of a row write."""
    return {command[i + 1] for command in row for i, word in enumerate(command[:-1]) if word in OUTPUTS}


def spelled_out(command: Command, folder: Path, made: Collection[str]) -> Iterator[Command]:
    """The command without abbreviations, once for each file that it stands for; `made` are not in the folder yet."""
    samples = ("--data", "data") if (folder / "data").exists() else ("--random-data", "4")
    words = list(command)
    for i, word in reversed(list(enumerate(command))):
        if word == "..." and command[i - 1] != "--shape":
            words[i : i + 1] = ["model.onnx", *samples, *(() if outputs([command]) else OUTPUT)]
        elif command[i : i + 2] == ["--data", "data"]:
            words[i : i + 2] = samples
    for i, word in enumerate(words if command[0] == "qdq" else ()):
        kind = Path(word).suffix
        missing = kind in (".onnx", ".yaml") and word not in {*made, *OUTPUT} and not (folder / word).exists()
        if missing or word == EVERY:
            for file in sorted(folder.iterdir()):
                if file.suffix == kind if missing else file.suffix != ".onnx":
                    yield _shaped([*words[:i], file.name, *words[i + 1 :]], folder)
            return
    yield _shaped(words, folder)


def _shaped(words: Command, folder: Path) -> Command:
    """The command with a --shape for each input with open sizes in place of `--shape ...`."""
    if "..." not in words:
        return words
    at, path = words.index("--shape"), next(folder / word for word in words if word.endswith(".onnx"))
    inputs = {file: _inputs(file) for file in (path, *sorted(folder.glob("*.onnx")))}
    options: Command = []
    for name, sizes in inputs[path].items():
        if 0 in sizes:
            twins = [other[name] for other in inputs.values() if len(other.get(name, ())) == len(sizes)]
            shape = [next(filter(None, axis), 4) for axis in zip(*twins, strict=True)]
            options += ["--shape", f"{name}:{'x'.join(map(str, shape))}"]
    return [*words[:at], *options, *words[at + 2 :]]


def _inputs(path: Path) -> dict[str, list[int]]:
    """The shapes of a model's inputs, 0 for an open size."""
    infos = onnx.load(path, load_external_data=False).graph.input
    return {info.name: [max(d.dim_value, 0) for d in info.type.tensor_type.shape.dim] for info in infos}


def run(command: Command, folder: Path, limit: float) -> tuple[str, str]:
    """What a command ended with and what it said."""
    program = [sys.executable, "-m", "qdq"] if command[0] == "qdq" else [sys.executable]
    with subprocess.Popen(
        [*program, *command[1:]],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            return f"over {limit:g} s", said
    return str(process.returncode), said


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path, nargs="?", default=Path("../shared/cases"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these cases alone")
    parser.add_argument("--time-limit", type=float, default=120, metavar="SECONDS", help="of each command")
    given = parser.parse_args()
    before: list[Command] = []
    print("case | command | exit code | last line | SQNR")
    for names, text in table(given.cases / "README.md"):
        before = commands(text, before)
        for name in (n for n in names if not given.only or n in given.only):
            beside = {Path(w).parts[1] for command in before for w in command if w.startswith("../")}
            with tempfile.TemporaryDirectory() as place:
                for each in (name, *beside):
                    shutil.copytree(given.cases / each, Path(place, each), copy_function=shutil.copyfile)
                    for folder in (Path(place, each), *(p for p in Path(place, each).rglob("*") if p.is_dir())):
                        folder.chmod(0o755)
                made = outputs(before)
                for command in [c for line in before for c in spelled_out(line, Path(place, name), made)]:
                    code, said = run(command, Path(place, name), given.time_limit)
                    lines = [line.strip() for line in said.splitlines() if line.strip()] or [""]
                    found = re.findall(r"(?:SQNR|sqnr_db).*?(-?[\d.]+|-?inf|nan) dB", said)
                    print(
                        f"{name} | {shlex.join(command)} | {code} | {lines[-1][:300]} | {', '.join(found)}", flush=True
                    )


if __name__ == "__main__":
    main()
