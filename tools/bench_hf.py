"""Small networks of Hugging Face's kinds with random weights, each a local folder, through `qdq deploy hf:FOLDER`.

    python tools/bench_hf.py FOLDER [CASE ...] [--target SM] [--results RESULTS.md[:SECTION]]

Writes folders, text, recordings and results into FOLDER; what is deployed is not deployed again. Needs qdq[cpu,hf].
A row says how much of the linear layers' multiply-adds the engine does in INT8, the SQNR of the worst output on samples
held out, and the size of both files. Ends with 1 where a linear layer is not INT8.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from results import record

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
GENERATION, SPEECH = "text2text-generation", "automatic-speech-recognition"
CASES: dict[str, tuple[str, str | None]] = {  # case -> network, task
    "gpt2": ("gpt2", None),
    "gpt2 with past": ("gpt2", "text-generation-with-past"),
    "llama": ("llama", None),
    "llama with past": ("llama", "text-generation-with-past"),
    "t5 encoder": ("t5", None),
    "t5 decoder": ("t5", f"{GENERATION}:decoder"),
    "t5 decoder with past": ("t5", f"{GENERATION}:decoder-with-past"),
    "bert": ("bert", None),
    "esm": ("esm", None),
    "whisper encoder": ("whisper", None),
    "whisper decoder with past": ("whisper", f"{SPEECH}:decoder-with-past"),
}


def deployed(case: str, place: Path, target: str) -> Path:
    """The folder of a case's results, made where it is not there yet."""
    network, task = CASES[case]
    out = place / "deployed" / case.replace(" ", "_")
    if (out / "report.json").is_file():
        return out
    data = ["--data", str(place / "sounds")] if network == "whisper" else ["--text", str(place / "text.txt")]
    words = ["deploy", f"hf:{place / network}", *data, "--max-length", "24", "--count", "12", "--out", str(out)]
    words += ["--target", target, "--tune", "off", *(["--task", task] if task else [])]
    done = subprocess.run([sys.executable, "-m", "qdq", *words, "-q"], check=False, text=True, capture_output=True)
    if not (out / "report.json").is_file():
        raise SystemExit(f"{case}: exit code {done.returncode}\n{done.stderr}")
    return out


def main() -> None:
    """Deploy and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--target", default="sm89")
    options = parser.parse_args()
    from hugging_face import NETWORKS, linear_share, make_folder, write_sounds, write_text

    place: Path = options.folder
    place.mkdir(parents=True, exist_ok=True)
    write_text(place)
    if not (place / "sounds").is_dir():
        write_sounds(place)
    for name in NETWORKS:
        if not (place / name).is_dir():
            make_folder(place, name)
    print("| network | linear layers in INT8 | SQNR dB, worst output | float file | INT8 file |\n|---|---|---|---|---|")
    whole = True
    for case in options.cases or CASES:
        out = deployed(case, place, options.target)
        report, share = json.loads((out / "report.json").read_text()), linear_share(out)
        whole &= share == 1.0
        worst = min(output["sqnr_db"] for output in report["check"]["outputs"] if output["sqnr_db"] is not None)
        sizes = (report[key] / 1024 for key in ("float_file_bytes", "int8_file_bytes"))
        print(f"| {case} | {share:.3f} | {worst:.1f} | {' | '.join(f'{size:.0f} KiB' for size in sizes)} |", flush=True)
    if not whole:
        sys.exit(1)


if __name__ == "__main__":
    record(main)
