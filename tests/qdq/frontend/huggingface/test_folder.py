"""What config.json and sentence-transformers' files say of a folder: needs neither torch nor transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qdq import InputError
from qdq.build.recipe import Recipe
from qdq.cli.main import main
from qdq.cli.options.folder import asked_of, files_of
from qdq.cli.options.origin import as_onnx, dynamic_of
from qdq.frontend.huggingface.choose import apart, pieces
from qdq.frontend.huggingface.folder import open_folder
from qdq.frontend.huggingface.tasks import TASKS, wish_of
from qdq.frontend.origin import kind_of, origin_of


def folder(place: Path, *steps: str, **config: Any) -> Path:
    """A folder without weights; `steps` behind the transformer."""
    (place / "config.json").write_text(json.dumps({"model_type": "bert", **config}))
    if steps:
        rows = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
        rows += [
            {"path": f"{i}_{kind}", "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(steps, 1)
        ]
        (place / "modules.json").write_text(json.dumps(rows))
    return place


@pytest.mark.parametrize(
    ("architecture", "several", "task", "part"),
    [
        ("BertModel", False, "feature-extraction", ""),
        ("BertForMaskedLM", False, "fill-mask", ""),
        ("EsmForTokenClassification", False, "token-classification", ""),
        ("GPT2LMHeadModel", False, "text-generation", ""),
        ("LlamaForCausalLM", False, "text-generation", ""),
        ("T5ForConditionalGeneration", True, "text2text-generation", "encoder"),
        ("WhisperModel", True, "feature-extraction", "encoder"),
        ("Wav2Vec2ForCTC", False, "automatic-speech-recognition", ""),
        ("ViTForImageClassification", False, "image-classification", ""),
        ("SegformerForSemanticSegmentation", False, "semantic-segmentation", ""),
    ],
)
def test_the_architecture_decides_the_task(
    tmp_path: Path, architecture: str, several: bool, task: str, part: str
) -> None:
    found = wish_of(
        open_folder(f"hf:{folder(tmp_path, architectures=[architecture], is_encoder_decoder=several)}"), None
    )
    assert (found.task.name, found.part) == (task, part) and architecture in found.why


def test_whisper_is_speech_and_a_part_is_asked_for(tmp_path: Path) -> None:
    config = {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], "is_encoder_decoder": True}
    opened = open_folder(str(folder(tmp_path, **config)))
    assert wish_of(opened, None).task.name == "automatic-speech-recognition"
    found = wish_of(opened, "automatic-speech-recognition:decoder-with-past")
    assert found.part == "decoder-with-past" and found.past
    with pytest.raises(InputError, match=r"Unknown part 'head'.*encoder, decoder, decoder-with-past"):
        wish_of(opened, "automatic-speech-recognition:head")


def test_a_sequence_of_sound_is_no_text(tmp_path: Path) -> None:
    """Wav2Vec2, HuBERT and WavLM call the classifier of a recording as BERT calls that of a text."""
    wav2vec2 = {"model_type": "wav2vec2", "architectures": ["Wav2Vec2ForSequenceClassification"]}
    found = wish_of(open_folder(str(folder(tmp_path, **wav2vec2, num_feat_extract_layers=7))), None)
    assert found.task.name == "audio-classification"
    opened = open_folder(str(folder(tmp_path, **wav2vec2)))
    assert wish_of(opened, None).task.name == "text-classification"
    (tmp_path / "preprocessor_config.json").write_text('{"sampling_rate": 16000}')
    assert wish_of(opened, None).task.name == "audio-classification"


def test_a_task_that_nobody_knows_is_refused_with_the_list(tmp_path: Path) -> None:
    opened = open_folder(str(folder(tmp_path, architectures=["BertForNextSentencePrediction"])))
    with pytest.raises(InputError, match=r"BertForNextSentencePrediction, of which no task is known") as refused:
        wish_of(opened, None)
    assert all(name in str(refused.value) for name in TASKS)
    with pytest.raises(InputError, match=r"Unknown --task 'fill-masc'. Did you mean 'fill-mask'?"):
        wish_of(opened, "fill-masc")
    with pytest.raises(InputError, match=r"names a part, and .* is one network"):
        wish_of(opened, "fill-mask:encoder")
    with pytest.raises(InputError, match=r"has no modules.json"):
        wish_of(opened, "sentence-similarity")


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, ("mean_tokens",)),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, ("cls_token", "max_tokens")),
        ({"pooling_mode": "mean"}, ("mean_tokens",)),
        ({"pooling_mode": "cls"}, ("cls_token",)),
        ({"pooling_mode": "lasttoken"}, ("lasttoken",)),
    ],
)
def test_pooling_is_what_the_folder_says(tmp_path: Path, config: dict[str, Any], modes: tuple[str, ...]) -> None:
    place = folder(tmp_path, "Pooling", "Normalize", architectures=["BertModel"])
    (place / "1_Pooling").mkdir()
    (place / "1_Pooling/config.json").write_text(json.dumps(config))
    (place / "sentence_bert_config.json").write_text('{"max_seq_length": 24}')
    opened = open_folder(str(place))
    assert opened.pooling and opened.pooling.modes == modes and opened.pooling.normalize
    assert opened.pooling.max_length == 24 and wish_of(opened, None).task.name == "sentence-similarity"


def test_steps_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    place = folder(tmp_path, "Pooling", "LSTM")
    (place / "1_Pooling").mkdir()
    (place / "1_Pooling/config.json").write_text('{"pooling_mode_mean_tokens": true}')
    with pytest.raises(InputError, match=r"step 'LSTM'.*feature-extraction"):
        open_folder(str(place))
    (place / "1_Pooling/config.json").write_text('{"pooling_mode_attention": true}')
    with pytest.raises(InputError, match=r"pools by attention; qdq knows cls_token"):
        open_folder(str(place))


def test_what_is_no_folder_of_a_model_is_refused(tmp_path: Path) -> None:
    assert kind_of("hf:somewhere") == "hf:"
    with pytest.raises(InputError, match=r"No folder bert-base-uncased.*Nothing is downloaded.*hf download"):
        origin_of("hf:bert-base-uncased")
    with pytest.raises(InputError, match=r"holds no config.json"):
        open_folder(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"Cannot read .*config.json"):
        open_folder(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"has no `model_type`"):
        open_folder(str(tmp_path))


def test_options_of_a_folder_are_for_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--text is for `hf:FOLDER`"):
        asked_of(Path("unet.onnx"), {"text": Path("a.txt"), "task": None}, data=None)
    for model in ("unet.onnx", "torch:nets:unet", "unet.pt2"):
        with pytest.raises(InputError, match=r"--task fill-mask says what `hf:FOLDER` is exported for"):
            asked_of(Path(model), {"task": "fill-mask"}, data=None)
    with pytest.raises(InputError, match=r"Both --text and --data"):
        asked_of(Path("hf:bert"), {"text": Path("a.txt")}, data="arrays/")
    with pytest.raises(InputError, match=r"No data: give --text FILE"):
        asked_of(Path("hf:bert"), {}, data=None, needed=True)
    given = {"text": Path("a.txt"), "task": "fill-mask", "past": None}
    asked = asked_of(Path("hf:bert"), given, data=None, evaluation="held_out/")
    assert asked.task == "fill-mask" and given == {"task": None}
    assert asked.take and asked.take.elsewhere and asked.take.evaluation is None
    kept = {"task": "classification"}
    assert asked_of(Path("hf:bert"), kept, data=None).task is None and kept == {"task": "classification"}
    (tmp_path / "b.txt").write_text("text")
    also = asked_of(Path("hf:bert"), {"text": Path("a.txt")}, data=None, evaluation=str(tmp_path / "b.txt"))
    assert also.take and also.take.evaluation == str(tmp_path / "b.txt") and not also.take.elsewhere


def test_lines_and_sentences(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One line. And\nanother one!\n\nA third\n\nOne line. And\n", encoding="utf-8")
    assert pieces(text, "line") == ["One line. And", "another one!", "A third"]
    assert pieces(text, "sentence") == ["One line.", "And another one!", "A third", "And"]
    text.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"is no UTF-8 text"):
        pieces(text, "line")
    text.write_text("\n\n")
    with pytest.raises(InputError, match=r"holds no line"):
        pieces(text, "line")


@pytest.mark.parametrize(
    ("found", "evaluated", "sizes"), [(100, False, (8, 8)), (10, False, (5, 5)), (1, False, (1, 0))]
)
def test_the_parts_share_nothing(found: int, evaluated: bool, sizes: tuple[int, int]) -> None:
    parts = apart(range(found), count=8, seed=3, evaluated=evaluated)
    assert (len(parts.calibration), len(parts.evaluation)) == sizes
    assert not set(parts.calibration) & set(parts.evaluation)
    assert apart(range(found), count=8, seed=3, evaluated=True).calibration[:5] == parts.calibration[:5]


def test_an_export_replaces_no_text_and_no_file_of_the_folder(tmp_path: Path) -> None:
    made, text = folder(tmp_path), tmp_path / "words.txt"
    text.write_text("a line\n")
    for output in (text, made / "config.json"):
        before = output.read_bytes()
        done = CliRunner().invoke(main, ["export", f"hf:{made}", "--text", str(text), "-o", str(output)])
        assert done.exit_code == 2 and "input of this command" in done.stderr and output.read_bytes() == before


def test_axes_are_plain_numbers() -> None:
    with pytest.raises(InputError, match="is not of the form"):
        dynamic_of(["image:\u00b2=height"])


def test_all_files_of_a_folder_are_protected(tmp_path: Path) -> None:
    inner = tmp_path / "0_Transformer" / "model.safetensors"
    inner.parent.mkdir()
    inner.write_bytes(b"weights")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert set(files_of(Path(f"hf:{tmp_path}"))) == {inner, tmp_path / "config.json"}
    given = Path(f"hf:{tmp_path}"), inner.parent, Recipe(), None, (), None
    with pytest.raises(InputError, match="holds files of the model"), as_onnx(*given):
        pass
