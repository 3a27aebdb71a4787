"""Sixty networks as PyTorch exports them, each through `qdq deploy --tune off`: what gets through, and how well.

Three steps, for PyTorch and qdq need not share an environment; what a step has made is not made again:

    python tools/bench_exports.py export FOLDER --python PYTHON     runs export_networks.py in an environment with torch
    python tools/bench_exports.py deploy FOLDER [--networks NAME ...] [--again]      needs qdq[cpu]
    python tools/bench_exports.py table FOLDER
    options: --networks NAME ...   --variants static.half.dynamo ...   --time-limit SECONDS   --options ...

SQNR is that of the worst output: as report.json says it, and as recomputed here from the float file and the Q/DQ file
in ONNX Runtime, FP16 rounded after every operator. "asked" is the part of the multiply-adds asked for in INT8 that the
engine runs in INT8; "linear" the part of those of MatMul and Gemm with a weight. The command ends with 1 if an exit
code is neither 0 nor 2, a traceback was printed, or the two figures of SQNR are further apart than 0.5 dB.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from results import record

APART = 0.5  # dB
KEPT = ("Constant", "Cast", "QuantizeLinear", "DequantizeLinear", "If", "Loop", "Scan", "ConstantOfShape")
PASSED_ON = ("DequantizeLinear", "QuantizeLinear", "Cast", "Transpose", "Reshape", "Identity", "Mul")
Samples = Sequence[Mapping[str, np.ndarray]]


def exported(folder: Path, networks: Sequence[str], variants: Sequence[str], python: str) -> int:
    """Run the exporters; their exit code."""
    program = Path(__file__).with_name("export_networks.py")
    chosen = ["--variants", *variants] if variants else []
    return subprocess.run([python, str(program), str(folder), *networks, *chosen], check=False).returncode


def rounded(path: Path) -> Any:
    """A file whose FP16 operators compute in FP32 and round what they give, which ONNX Runtime alone leaves out."""
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    graph, half, single = model.graph, onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    infos = (*graph.value_info, *graph.input, *graph.output)
    low = {info.name for info in infos if info.type.tensor_type.elem_type == half}
    low |= {tensor.name for tensor in graph.initializer if tensor.data_type == half}
    nodes = []
    for node in graph.node:
        before, after = [], []
        if low.intersection(node.output) and node.op_type not in KEPT:
            for i, name in enumerate(node.input):
                if name in low:
                    node.input[i] = f"{name}/{node.output[0]}/{i}"
                    before.append(onnx.helper.make_node("Cast", [name], [node.input[i]], to=single))
            for i, name in enumerate(node.output):
                if name in low:
                    node.output[i] = f"{name}/single"
                    after.append(onnx.helper.make_node("Cast", [node.output[i]], [name], to=half))
        nodes += [*before, node, *after]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return model


def outputs(source: str | bytes, samples: Samples) -> list[dict[str, np.ndarray]]:
    """What a file, or its bytes, computes in ONNX Runtime, with Q and DQ as nodes of their own."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = 4
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [info.name for info in session.get_outputs()]
    taken = {info.name for info in session.get_inputs()}
    feeds = [{name: value for name, value in sample.items() if name in taken} for sample in samples]
    return [dict(zip(names, session.run(None, feed), strict=True)) for feed in feeds]


def sqnr(wanted: Sequence[Mapping[str, np.ndarray]], got: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Signal to noise in dB of every output of floats, over the samples whose shapes agree.

    >>> sqnr([{"y": np.ones(10)}], [{"y": np.full(10, 1.1)}])
    {'y': 20.0}
    """
    found = {}
    for name in wanted[0]:
        pairs = [
            (np.asarray(a[name], np.float64), np.asarray(b[name], np.float64)) for a, b in zip(wanted, got, strict=True)
        ]
        pairs = [(a, b) for a, b in pairs if a.shape == b.shape]
        power, noise = (float(sum(np.sum(part(a, b) ** 2) for a, b in pairs)) for part in (lambda a, b: a, np.subtract))
        if wanted[0][name].dtype.kind == "f" and pairs:
            found[name] = round(10 * math.log10(power / noise), 3) if power and noise else math.inf
    return found


def linear(path: Path) -> set[str]:
    """Names of the MatMul and Gemm nodes of a file that have a constant operand, in whatever form."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}

    def constant(name: str) -> bool:
        node = made.get(name)
        if node is None:
            return name in constants
        return node.op_type == "Constant" or (
            node.op_type in PASSED_ON and all(map(constant, filter(None, node.input)))
        )

    products = (node for node in graph.node if node.op_type in ("MatMul", "Gemm"))
    return {node.name for node in products if any(constant(name) for name in node.input[:2])}


def share(nodes: Sequence[Mapping[str, Any]]) -> float | None:
    """The part of the multiply-adds of an audit's nodes that runs in INT8; None without any."""
    total = sum(node["macs"] or 0 for node in nodes)
    return sum(node["macs"] or 0 for node in nodes if node["consumed"] == "int8") / total if total else None


def judged(path: Path, out: Path) -> dict[str, Any]:
    """What the report of a deployment says, beside what is computed here."""
    report = json.loads((out / "report.json").read_text())
    samples = [dict(np.load(file)) for file in sorted(path.with_suffix("").glob("*.npz"))]
    nodes, weighted = report["audit"]["nodes"], linear(out / report["model_file"])
    asked = [node for node in nodes if node["requested"] == "int8"]
    candidate = rounded(out / report["model_file"]).SerializeToString()
    own = sqnr(outputs(str(path), samples), outputs(candidate, samples))
    said = {o["name"]: float(o["sqnr_db"]) for o in report["check"]["outputs"] if o["sqnr_db"] is not None}
    return {
        "said": said,
        "own": own,
        "int8": share(nodes),
        "asked": share(asked),
        "linear": share([node for node in nodes if node["node"] in weighted]),
        "missed": [
            f"{n['node']} ({n['op_type']}) {n['consumed']}: {n['cause']}" for n in asked if n["consumed"] != "int8"
        ],
        "float_linear": [n["node"] for n in nodes if n["node"] in weighted and n["requested"] != "int8"],
        "notes": report["notes"],
    }


def deployed(path: Path, limit: float, options: Sequence[str] = ()) -> dict[str, Any]:
    """Deploy one file with further options and judge the result."""
    with tempfile.TemporaryDirectory() as place:
        out, start = Path(place) / "out", time.monotonic()
        command = [sys.executable, "-m", "qdq", "deploy", str(path), "--data", str(path.with_suffix(""))]
        try:
            done = subprocess.run(
                [*command, "--out", str(out), "--tune", "off", *options],
                capture_output=True,
                text=True,
                timeout=limit,
                check=False,
                errors="replace",
            )
        except subprocess.TimeoutExpired:
            return {"code": -1, "seconds": limit, "printed": f"over {limit:g} s"}
        printed = done.stdout + done.stderr
        found = {"code": done.returncode, "seconds": round(time.monotonic() - start, 1), "printed": printed[-6000:]}
        found["options"] = " ".join(options)
        return found | (judged(path, out) if done.returncode == 0 else {})


def apart(result: Mapping[str, Any]) -> float:
    """The largest difference in dB between the two figures of an output."""
    both = [(said, result["own"].get(name)) for name, said in result["said"].items()]
    return max((abs(a - b) for a, b in both if b is not None and a != b), default=0.0)


def faults(result: Mapping[str, Any]) -> list[str]:
    """What must not be."""
    found = []
    if result["code"] not in (0, 2):
        found.append(f"exit code {result['code']}")
    if "Traceback (most recent call last)" in result["printed"]:
        found.append("traceback")
    if result["code"] == 0 and not apart(result) <= APART:
        found.append(f"SQNR is {apart(result):.1f} dB off")
    return found


def rows(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The table, and the totals."""
    heads = (
        "network",
        "variant",
        "exit",
        "INT8 share of multiply-adds",
        "asked",
        "linear",
        "SQNR",
        "recomputed",
        "seconds",
        "",
    )
    yield f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}"
    given = dict.fromkeys(result["options"] for result in results.values() if result.get("options"))
    marks = {options: "†" * (i + 1) for i, options in enumerate(given)}
    for key, result in results.items():
        name, _, variant = key.partition(".")
        cells = [name, variant.replace(".", ", "), str(result["code"])]
        if result["code"] == 0:
            worst = min(result["said"], key=result["said"].__getitem__, default="")
            shares = ["" if result[kind] is None else f"{result[kind]:.3f}" for kind in ("int8", "asked", "linear")]
            figures = [f"{side[worst]:.1f}" if worst in side else "" for side in (result["said"], result["own"])]
            cells += [*shares, *figures]
        else:
            cells += [""] * 5
        lines = [line for line in result["printed"].splitlines() if line.startswith("Error")] or [""]
        said = [lines[-1][:200].replace("|", "/")] if result["code"] else []
        said += [marks[result["options"]]] if result.get("options") else []
        yield f"| {' | '.join([*cells, str(round(result['seconds'])), '; '.join([*faults(result), *said])])} |"
    yield "".join(f"\n{mark} with `{options}`" for options, mark in marks.items())
    good = [result for result in results.values() if result["code"] == 0]
    networks = {key.partition(".")[0] for key in results}
    passed = {key.partition(".")[0] for key, result in results.items() if result["code"] == 0}
    transformers = [
        result["linear"] for key, result in results.items() if key.startswith("hf_") and result["code"] == 0
    ]
    yield f"\n{len(good)} of {len(results)} files of {len(networks)} networks end with 0 ({len(passed)} networks)."
    yield f"Tracebacks: {sum('traceback' in faults(result) for result in results.values())}."
    yield f"SQNR recomputed differs by at most {max(map(apart, good), default=0):.2f} dB."
    whole = sum(share == 1 for share in transformers)
    yield f"Transformers whose linear layers all run in INT8: {whole} of {len(transformers)}."


def main() -> int:
    """Do one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("export", "deploy", "table"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--networks", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--variants", nargs="+", default=[], metavar="VARIANT")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has torch")
    parser.add_argument("--time-limit", type=float, default=300, metavar="SECONDS", help="of a deployment")
    parser.add_argument("--again", action="store_true", help="deploy also what has been deployed")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="the rest is passed to qdq deploy")
    given = parser.parse_args()
    if given.step == "export":
        return exported(given.folder, given.networks, given.variants, given.python)
    results = {}
    for path in sorted(given.folder.glob("*.onnx")):
        name, _, variant = path.stem.partition(".")
        chosen = name in (given.networks or [name]) and variant in (given.variants or [variant])
        if not chosen or not path.with_suffix("").exists():  # without samples: not exported to the end
            continue
        kept = path.with_suffix(".json")
        if given.step == "deploy" and (given.again or not kept.exists()):
            kept.write_text(json.dumps(deployed(path, given.time_limit, given.options), indent=1))
            result = json.loads(kept.read_text())
            print(
                path.stem,
                result["code"],
                *faults(result),
                result["printed"].strip()[-200:] if result["code"] else "",
                file=sys.stderr,
                flush=True,
            )
        if kept.exists():
            results[path.stem] = json.loads(kept.read_text())
    if given.step == "table":
        print("\n".join(rows(results)))
    return int(any(map(faults, results.values())))


if __name__ == "__main__":
    codes: list[int] = []
    record(lambda: codes.append(main()))
    sys.exit(codes[-1])
