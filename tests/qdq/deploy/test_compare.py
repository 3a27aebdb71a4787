"""`qdq compare`: every figure of a row against the verb that measures it alone, and what is refused or not written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from models import constant, images, save_samples, segmenter
from onnx import TensorProto, helper

from engines.core import arithmetic, onnx_runtime as ort
from engines.cost import predict as predict_module
from qdq.assemble.held_out import ranked
from qdq.build import engine
from qdq.build.cost import Price
from qdq.build.pricing import tensorrt_pricer
from qdq.build.pricing.pricer import Pricer
from qdq.cli.main import main
from qdq.core.errors import InputError
from qdq.deploy.compare import compare
from qdq.deploy.compare.compare import entries
from qdq.deploy.compare.metrics import metric, next_tokens
from qdq.deploy.compare.task import Task
from qdq.model.model import Model
from qdq.tune.find_plan import FEW

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'qdq[cpu]'")
pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'qdq[cpu]'")

VOCABULARY, WIDTH = 48, 64
FORMS = ("tensor", "channel", 64, 16)
PLAIN = "rounding=nearest:equalize=none:bias_correction=off"


def language_model(seed: int = 0) -> onnx.ModelProto:
    """Tokens (b, t) int64 -> embedding -> MatMul -> Relu -> MatMul, channels of very different size -> logits."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(0, 1.5, WIDTH))
    tensors = {
        "table": rng.normal(size=(VOCABULARY, WIDTH)),
        "up.weight": rng.normal(size=(WIDTH, WIDTH)) / 8 * size,
        "head.weight": rng.normal(size=(WIDTH, VOCABULARY)) / 3 / size[:, None],
    }
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["x"], name="/embed"),
        helper.make_node("MatMul", ["x", "up.weight"], ["h"], name="/up/MatMul"),
        helper.make_node("Relu", ["h"], ["r"], name="/Relu"),
        helper.make_node("MatMul", ["r", "head.weight"], ["logits"], name="/head/MatMul"),
    ]
    ends = [
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["b", "t"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "t", VOCABULARY])],
    ]
    stored = [constant(name, array.astype(np.float32)) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "tiny", *ends, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def sentences(count: int, *, seed: int) -> list[dict[str, np.ndarray]]:
    """Tokens drawn from the model itself, so that its perplexity is low and a worse model's is higher."""
    session, rng = ort.session(language_model()), np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY, (count, 1))
    for _ in range(31):
        (outputs,) = ort.run(session, [{"tokens": tokens}])
        noisy = outputs["logits"][:, -1] + rng.gumbel(size=(count, VOCABULARY))
        tokens = np.concatenate([tokens, noisy.argmax(-1)[:, None]], axis=1)
    return [{"tokens": row[None]} for row in tokens]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with lm.onnx and net.onnx and samples for both; the current directory."""
    monkeypatch.chdir(tmp_path)
    onnx.save(language_model(), "lm.onnx")
    onnx.save(segmenter(), "net.onnx")
    save_samples(tmp_path / "text", sentences(4, seed=1))
    save_samples(tmp_path / "unseen", sentences(4, seed=2))
    save_samples(tmp_path / "data", images(3))
    return tmp_path


def run(*args: object) -> Result:
    result = CliRunner().invoke(main, ["compare", *map(str, args)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def report(*args: object) -> dict[str, Any]:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def rows(*args: object) -> dict[str, dict[str, Any]]:
    return {row["scheme"]: row for row in report(*args)["rows"]}


def test_finer_granularity_costs_memory_and_saves_perplexity(folder: Path) -> None:
    texts = [f"int4:block={form}:{PLAIN}" for form in FORMS]
    args = ("lm.onnx", "--data", "text", "--eval", "unseen", "--metric", "perplexity")
    found = rows(*args, "--schemes", ",".join(texts))
    assert list(found) == ["FP32", "FP16", *texts]
    measured = [found[text] for text in texts]
    assert [row["weights_per"] for row in measured] == ["tensor", "channel", "block of 64", "block of 16"]
    assert {row["precision"] for row in measured} == {"W4A16"} and {row["data_per"] for row in measured} == {"-"}
    assert measured[0]["value"] > measured[1]["value"] > measured[3]["value"] > found["FP32"]["value"]
    assert found["FP32"]["sqnr_db"] == "inf" and found["FP16"]["sqnr_db"] > 50
    assert measured[0]["sqnr_db"] < measured[1]["sqnr_db"] < measured[3]["sqnr_db"]
    assert measured[1]["weight_bytes"] < measured[3]["weight_bytes"] < found["FP16"]["weight_bytes"]
    assert found["FP32"]["model_bytes"] == Path("lm.onnx").stat().st_size


def test_a_row_holds_what_the_other_verbs_measure(folder: Path) -> None:
    args = ("lm.onnx", "--data", "text", "--eval", "unseen", "--metric", "perplexity", "--schemes", "w4a8:block=16")
    row = rows(*args)["w4a8:block=16"]
    assert (row["precision"], row["weights_per"], row["data_per"]) == ("W4A8", "block of 16", "tensor")
    made = ("quantize", "lm.onnx", "--data", "text", "--scheme", "w4a8", "--block", "16", "--rest", "fp16")
    assert CliRunner().invoke(main, [*made, "-o", "q.onnx"]).exit_code == 0
    shape = ("--shape", "tokens:1x32", "--json")
    audit = json.loads(CliRunner().invoke(main, ["audit", "q.onnx", *shape]).stdout)
    assert (row["weight_bytes"], row["kernels"]) == (audit["weight_bytes"], audit["kernels"])
    assert row["shares"] == {"int8": 1.0} and row["quantized_nodes"] == 2
    priced = json.loads(CliRunner().invoke(main, ["audit", "q.onnx", "--gpu", "rtx4090", *shape]).stdout)
    assert row["predicted_us"] == pytest.approx(priced["predicted_us"])
    checked = json.loads(CliRunner().invoke(main, ["check", "lm.onnx", "q.onnx", "--data", "unseen", "--json"]).stdout)
    assert row["sqnr_db"] == pytest.approx(checked["sqnr_db"])
    assert row["model_bytes"] == Path("q.onnx").stat().st_size
    expected = metric("perplexity")
    for sample in (dict(np.load(path)) for path in sorted(Path("unseen").iterdir())):
        (outputs,) = ort.run(arithmetic.session("q.onnx"), [sample])
        expected.add(outputs["logits"], outputs["logits"], next_tokens(sample["tokens"]))
    assert row["value"] == pytest.approx(expected.value)


def test_labels_are_an_array_of_the_samples(folder: Path) -> None:
    rng = np.random.default_rng(3)
    for name, count in (("labelled", 2), ("both", 3)):
        samples = [{**s, "truth": rng.integers(0, 3, (8, 8))} for s in images(count, seed=5)]
        save_samples(folder / name, samples)
    args = ("net.onnx", "--schemes", "int8", "--metric", "top1", "--labels", "truth")
    found = rows(*args, "--data", "data", "--eval", "labelled")
    right = count = 0
    for path in sorted((folder / "labelled").iterdir()):
        stored = np.load(path)
        (outputs,) = ort.run("net.onnx", [{"image": stored["image"]}])
        right += int((outputs["logits"].argmax(1)[0] == stored["truth"]).sum())
        count += 64
    assert found["FP32"]["value"] == right / count < 0.5  # random labels
    alone = report(*args, "--data", "both")
    assert alone["samples"] == 3 and alone["evaluated_on"] == "calibration samples"
    refused = run(*args, "--data", "both", "--eval", "both")
    assert refused.exit_code == 2 and "3 of the 3 samples of --eval are among those of --data" in refused.stderr
    same = report(*args, "--data", "both", "--eval", "both", "--allow-overlap")
    assert same["overlap"] == 3 and any("which was allowed" in note for note in same["notes"])
    assert alone["rows"][0]["value"] == same["rows"][0]["value"] and alone["overlap"] == 0
    stacked = {k: np.stack([np.load(p)[k] for p in sorted(Path("both").iterdir())]) for k in ("image", "truth")}
    np.savez("both.npz", **stacked)
    assert rows(*args, "--data", "both.npz") == {row["scheme"]: row for row in alone["rows"]}
    Path("loader.py").write_text(
        "import numpy as np\ndef samples():\n    z = np.load('both.npz')\n"
        "    yield from ({k: z[k][i] for k in z} for i in range(3))\n"
    )
    assert rows(*args, "--data", "loader.py:samples") == {row["scheme"]: row for row in alone["rows"]}


def test_a_scheme_that_a_target_cannot_compile_is_a_row_with_the_reason(folder: Path) -> None:
    args = ("lm.onnx", "--data", "text", "--target", "sm75", "--schemes", "int8,int4:block=16")
    found = rows(*args)
    assert "sm75 cannot compile int4: it needs sm80" in found["int4:block=16"]["problem"]
    assert found["int4:block=16"]["value"] is None
    assert found["int8"]["value"] > 0.99 and not found["int8"]["problem"] and found["int8"]["predicted_us"] > 0
    shown = run(*args)
    assert shown.exit_code == 0 and "cannot compile int4" in " ".join(shown.stdout.split())


def test_if_no_scheme_can_be_measured_that_is_an_error_and_nothing_is_written(folder: Path) -> None:
    result = run("lm.onnx", "--data", "text", "--target", "sm75", "--schemes", "int4", "-o", "r.json")
    assert result.exit_code == 2 and "cannot compile int4" in result.stderr and not Path("r.json").exists()


def test_a_model_that_the_compiler_refuses_is_still_scored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engines.core.errors import BuildError

    compiled = engine.compile_engine

    def refuse(path: Path, **options: Any) -> Any:
        if path.name == "scheme.onnx":
            raise BuildError("no kernel for that")
        return compiled(path, **options)

    monkeypatch.setattr(compare, "kept_engine", refuse)
    row = rows("net.onnx", "--data", "data", "--schemes", "int8")["int8"]
    assert row["problem"] == "does not compile: no kernel for that"
    assert row["sqnr_db"] > 20 and row["weight_bytes"] is None and row["predicted_us"] is None


def test_the_report_is_what_is_printed_and_the_table_names_every_scheme(folder: Path) -> None:
    args = ("net.onnx", "--data", "data", "--schemes", "int8", "--schemes", "int8-weight, int8", "--gpu", "rtx4090")
    result = run(*args, "-o", "r.json", "--metric", "mae", "--unit", "kcal/mol", "--per", "0.5")
    assert result.exit_code == 0, result.output
    content = json.loads(Path("r.json").read_text())
    assert [row["scheme"] for row in content["rows"]] == ["FP32", "FP16", "int8", "int8-weight"]
    assert content["gpus"] == ["rtx4090"] and content["task"]["unit"] == "kcal/mol"
    assert str(folder) not in Path("r.json").read_text()
    for text in ("FP16", "int8-weight", "W8A8", "kcal/mol", "on rtx4090"):
        assert text in " ".join(result.stdout.split())
    for note in ("stood for the engines", "calibration samples themselves"):
        assert note in result.stderr
    plain = rows(*args)
    twice = {row["scheme"]: row["value"] for row in content["rows"]}
    (absolute,) = (row["value"] for row in report(*args, "--metric", "mae")["rows"] if row["scheme"] == "int8")
    assert twice["int8"] == pytest.approx(absolute / 0.5) and plain["int8"]["value"] < 1
    assert plain["int8-weight"]["quantized_nodes"] == 0  # a convolution stays in float


def test_a_tuned_scheme_has_the_kernels_that_deploy_would_choose(folder: Path) -> None:
    found = rows("net.onnx", "--data", "data", "--schemes", "int8,int8:tune=rewrites")
    assert found["int8:tune=rewrites"]["predicted_us"] <= found["int8"]["predicted_us"]
    assert found["int8:tune=rewrites"]["quantized_nodes"] == 2


class Cheaper(Pricer):
    """A node less in float costs less; what is built costs more for it if `dear`."""

    dear = False

    def __call__(self, model: Model) -> Price:
        return Price(us=300.0 - self.many([model])[0].us) if self.dear else self.many([model])[0]

    def many(self, models: Sequence[Model]) -> list[Price]:
        return [Price(us=100.0 - sum(n.op_type == "DequantizeLinear" for n in m.graph.node)) for m in models]


def test_a_tuned_scheme_keeps_the_bound_as_deploy_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_pricer, "Pricer", Cheaper)
    found = images(8, seed=7)
    found[0]["image"] *= 12  # clipped by the average of all, and unknown to the samples that quick scales come from
    assert 0 not in ranked(found)[:FEW]
    save_samples(folder / "skewed", found)
    args = ("net.onnx", "--data", "skewed", "--recipe", "r.yaml")
    free = "tune: placement\ncalibrator: average\nrest: fp32\n"
    Path("r.yaml").write_text(free)
    unbound = rows(*args, "--schemes", "int8")["int8"]
    assert unbound["quantized_nodes"] == 2 and unbound["sqnr_db"] < 20
    Path("r.yaml").write_text(f"{free}min_sqnr_db: 20\n")
    row = rows(*args, "--schemes", "int8")["int8"]
    assert row["quantized_nodes"] < 2
    assert row["sqnr_db"] == "inf" or row["sqnr_db"] > 20
    shipped = CliRunner().invoke(main, ["deploy", *args, "--out", "out"])
    assert shipped.exit_code == 0, shipped.output
    check = json.loads(Path("out/report.json").read_text())["check"]
    assert row["sqnr_db"] == (pytest.approx(check["sqnr_db"]) if check["sqnr_db"] != "inf" else "inf")


def test_what_is_written_slower_than_in_float_is_measured_in_float(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_pricer, "Pricer", Cheaper)
    args = ("net.onnx", "--data", "data", "--schemes", "int8:tune=placement")
    assert rows(*args)["int8:tune=placement"]["quantized_nodes"] == 2
    monkeypatch.setattr(Cheaper, "dear", True)
    row = rows(*args)["int8:tune=placement"]
    assert row["quantized_nodes"] == 0 and any("left in float" in note for note in row["notes"])


def test_each_target_is_compiled_once_whatever_its_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_engine, predict = engine.compile_engine, predict_module.predict
    compiled, predicted = [], []

    def compiling(path: Path, **options: Any) -> Any:
        compiled.append(options["recipe"].targets)
        return compile_engine(path, **options)

    def predicting(path: Path, table: Any, gpu: Any, **options: Any) -> Any:
        predicted.append((gpu.name, table.targets))
        return predict(path, table, gpu, **options)

    monkeypatch.setattr(compare, "kept_engine", compiling)
    monkeypatch.setattr(compare, "predict", predicting)
    targets, gpus = (
        ("--target", "sm86", "--target", "sm89"),
        ("--gpu", "rtx3090", "--gpu", "rtx4080", "--gpu", "rtx4090"),
    )
    rows("net.onnx", "--data", "data", "--schemes", "int8", *targets, *gpus)
    assert compiled[-3:] == [("sm86", "sm89"), ("sm86",), ("sm89",)] and len(compiled) == 9  # with FP32 and FP16
    assert predicted[-3:] == [("rtx3090", ("sm86",)), ("rtx4080", ("sm89",)), ("rtx4090", ("sm89",))]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--schemes", "int5"), "Unknown scheme 'int5'"),
        (("--schemes", " , "), "No scheme to compare"),
        (("--schemes", "int4:blok=32"), "Did you mean 'block'"),
        (("--schemes", "int4:block"), "option=value"),
        (("--schemes", "int4:block=7"), "block is 7"),
        (("--schemes", "w4a8:block=tensor"), "weight-only scheme int4"),
        (("--metric", "perplexitty"), "Did you mean 'perplexity'"),
        (("--metric", "perplexity"), "the model has 0"),
        (("--metric", "mae", "--per", "0"), "above 0"),
        (("--metric", "top1", "--unit", "kcal/mol"), "belong to the metric mae"),
        (("--metric", "top1", "--labels", "truth"), "No labels 'truth' in data: its samples hold image"),
        (("--score-output", "logit"), "Did you mean 'logits'"),
        (("--target", "sm42"), "no target 'sm42'"),
        (("--random-data", "3"), "choose one"),
        (("--eval", "data", "--metric", "top1", "--labels", "truth"), "No labels 'truth' in data"),
        (("-o", "missing/r.json"), "Cannot write"),
        (("-o", "net.onnx"), "input of this command"),
    ],
)
def test_bad_input_is_one_paragraph_and_leaves_nothing(folder: Path, args: tuple[str, ...], message: str) -> None:
    before = sorted(folder.rglob("*"))
    result = run("net.onnx", "--data", "data", *args)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and result.stdout == ""
    assert sorted(folder.rglob("*")) == before


def test_random_data_have_no_labels(folder: Path) -> None:
    result = run("net.onnx", "--random-data", "2", "--schemes", "int8", "--metric", "top1", "--labels", "truth")
    assert result.exit_code == 2 and "hold no array 'truth'" in result.stderr
    result = run("net.onnx", "--random-data", "2", "--schemes", "int8", "--metric", "top1")
    assert result.exit_code == 0 and "nothing about its accuracy" in result.stderr


def test_entries_read_numbers_flags_and_patterns() -> None:
    given = {"calibrator": "max", "unquantized_type": "bf16"}
    (entry,) = entries(["fptq:v0=0.5:v1=3:shift=false:bias-correction=on:exclude=/head/*:block=auto"], given)
    settings = entry.recipe.settings
    assert (settings.v0, settings.v1, settings.shift, settings.bias_correction) == (0.5, 3, False, "on")
    assert (settings.exclude, settings.block, settings.calibrator) == (("/head/*",), "auto", "max")
    assert entry.recipe.unquantized_type == "bf16"
    with pytest.raises(InputError, match="Unknown option of int8"):
        entries(["int8:scheme=int4"], {})


def test_the_worst_output_is_the_figure_and_classes_lie_where_the_graph_says(folder: Path) -> None:
    """Logits with channels last, and a large output beside them that would hide their error in a pool."""
    net = segmenter()
    shape = [1, 8, 8, 3]
    net.graph.node.append(helper.make_node("Transpose", ["logits"], ["last"], name="/turn", perm=[0, 2, 3, 1]))
    net.graph.node.append(helper.make_node("Mul", ["image", "large"], ["copy"], name="/large"))
    net.graph.initializer.append(constant("large", np.asarray(1000, np.float32)))
    del net.graph.output[:]
    for name, dims in (("copy", [1, 1, 8, 8]), ("last", shape)):
        net.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))
    onnx.save(net, "turned.onnx")
    args = ("turned.onnx", "--data", "data", "--schemes", "int8", "--score-output", "last", "--metric", "dice")
    found = report(*args)
    row = found["rows"][-1]
    assert row["worst_output"] == "last" and row["sqnr_db"] < 60 and found["outputs"] == 2
    assert any("classes on axis 3" in note and "Conv to 3 channels" in note for note in found["notes"])
    first = rows("net.onnx", "--data", "data", "--schemes", "int8", "--metric", "dice")
    assert row["value"] == pytest.approx(first["int8"]["value"])
    rows_of_the_image = report(*args, "--class-axis", "1")["rows"][-1]
    assert rows_of_the_image["value"] != row["value"]
    table = run(*args).stdout
    assert "worst output" in " ".join(table.split()) and "identical" in table  # FP32 against itself
    refused = run(*args, "--class-axis", "7")
    assert refused.exit_code == 2 and "needs classes on axis 7" in refused.stderr


def test_the_next_token_is_of_input_ids_beside_a_mask() -> None:
    kept = language_model()
    kept.graph.node[0].input[1] = kept.graph.input[0].name = "input_ids"
    for name in ("attention_mask", "position_ids"):
        kept.graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "t"]))
    assert Task(metric="perplexity").source(Model(proto=kept, directory=Path(), sha256="")) == "input_ids"
    kept.graph.node[0].input[1] = kept.graph.input[0].name = "words"
    with pytest.raises(InputError, match="has 3: words, attention_mask, position_ids"):
        Task(metric="perplexity").source(Model(proto=kept, directory=Path(), sha256=""))
