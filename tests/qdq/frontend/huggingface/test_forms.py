"""Plain tensors in and out compute what transformers' own model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install 'qdq[hf]'")
pytest.importorskip("transformers", reason="transformers is not installed: pip install 'qdq[hf]'")
pytest.importorskip("hugging_face", reason="transformers cannot import its models", exc_type=ImportError)
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("default")]  # transformers warns of itself

import torch  # noqa: E402
from hugging_face import NETWORKS, make_folder, make_sentence_encoder, tokenizer, write_sounds, write_text  # noqa: E402

from qdq import InputError  # noqa: E402
from qdq.frontend.huggingface.caches import present_name  # noqa: E402
from qdq.frontend.huggingface.choose import Take  # noqa: E402
from qdq.frontend.huggingface.folder import open_folder  # noqa: E402
from qdq.frontend.huggingface.forms import Form, form_of  # noqa: E402
from qdq.frontend.huggingface.network import Network, network_of  # noqa: E402
from qdq.frontend.huggingface.samples import made_samples  # noqa: E402
from qdq.frontend.huggingface.tasks import wish_of  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("folders")
    for name in NETWORKS:
        make_folder(place, name)
    write_text(place)
    write_sounds(place)
    return place


def opened(folder: Path, task: str | None = None, past: int | None = None) -> tuple[Network, Form]:
    found = open_folder(f"hf:{folder}")
    network = network_of(found, wish_of(found, task))
    return network, form_of(network, past=past)


def near(a: Any, b: Any) -> bool:
    return bool(np.allclose(np.asarray(a), np.asarray(b), atol=1e-5))


def step(form: Form, tokens: Any, place: int, past: dict[str, Any]) -> dict[str, Any]:
    """Outputs of the token at a place, behind what `past` holds."""
    one = {"input_ids": tokens[:, place : place + 1], "attention_mask": torch.ones(1, place + 1, dtype=torch.int64)}
    one |= {"position_ids": torch.tensor([[place]])} | past
    with torch.no_grad():
        return form.run({name: one[name] for name in form.example})


def grown(outputs: dict[str, Any], form: Form) -> dict[str, Any]:
    """The cache that goes in next."""
    return {name: outputs[present_name(name)] for name in form.example if name.startswith("past")}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_steps_with_a_cache_give_the_logits_of_the_whole(folders: Path, name: str) -> None:
    network, form = opened(folders / name, "text-generation-with-past")
    _, whole = opened(folders / name)
    tokens = torch.randint(5, 90, (1, 12))
    with torch.no_grad():
        expected = whole.run({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})["logits"]
        heads, size = form.example["past_key_values.0.key"].shape[1::2]
        past = {n: torch.zeros(1, heads, 0, size) for n in form.example if n.startswith("past")}
        for place in range(12):
            found = step(form, tokens, place, past)
            past = grown(found, form)
            assert near(found["logits"][0, -1], expected[0, place]), place
    assert past["past_key_values.1.value"].shape[2] == 12 and form.layers == 2
    assert form.dynamic["attention_mask"] == {0: "batch", 1: "total_length"}
    assert set(form.example) >= {"position_ids"} and network.main_input == "input_ids"


def test_a_cache_of_fixed_length_is_filled_from_the_front(folders: Path) -> None:
    network, form = opened(folders / "llama", "text-generation-with-past", past=16)
    assert form.dynamic == {} and form.example["past_key_values.0.key"].shape[2] == 16
    take = Take(text=folders / "text.txt", length=24, count=6, past=16, samples=folders / "fixed")
    made = made_samples(network, form, take)
    assert made.calibration and made.evaluation
    for file in sorted(made.calibration.iterdir()):
        sample = {name: torch.from_numpy(array) for name, array in np.load(file).items()}
        assert list(sample) == list(form.example) and sample["attention_mask"].shape == (1, 17)
        place = int(sample["position_ids"])
        assert (
            int(sample["attention_mask"].sum()) == place + 1
            and not sample["past_key_values.0.key"][:, :, : 16 - place].any()
        )
        with torch.no_grad():
            logits = form.run(sample)["logits"]
            past = {n: t[:, :, 16 - place :] for n, t in sample.items() if n.startswith("past")}
            open_ = form_of(network).run(
                {**sample, **past, "attention_mask": torch.ones(1, place + 1, dtype=torch.int64)}
            )
        assert near(logits, open_["logits"])


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_parts_of_an_encoder_decoder_give_what_the_whole_does(folders: Path, name: str) -> None:
    task = "text2text-generation" if name == "t5" else "automatic-speech-recognition"
    network, encoder = opened(folders / name)
    _, first = opened(folders / name, f"{task}:decoder")
    _, later = opened(folders / name, f"{task}:decoder-with-past")
    given = {n: tensor[:1] for n, tensor in encoder.example.items()}
    tokens = torch.randint(5, 90, (1, 8))
    with torch.no_grad():
        expected = network.model(**given, decoder_input_ids=tokens, use_cache=False).logits
        states = encoder.run(given)["last_hidden_state"]
        more = {"encoder_attention_mask": given["attention_mask"]} if name == "t5" else {}
        found = first.run({"input_ids": tokens[:, :3], **more, "encoder_hidden_states": states})
        assert near(found["logits"], expected[:, :3])
        past = {n: found[present_name(n)] for n in later.example if n.startswith("past")}
        for place in range(3, 8):
            found = later.run({"input_ids": tokens[:, place : place + 1], **more, **past})
            assert near(found["logits"][:, 0], expected[:, place]), place
            past |= {n: found[present_name(n)] for n in past if present_name(n) in found}
    assert set(past) == {n for n in later.example if n.startswith("past")} and ".decoder." in next(iter(past))


def test_an_embedding_is_the_mean_of_the_tokens_that_count(tmp_path: Path) -> None:
    network, form = opened(make_sentence_encoder(tmp_path))
    assert list(form.example) == ["input_ids", "attention_mask", "token_type_ids"] and network.longest == 24
    given = dict(form.example)
    given["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with torch.no_grad():
        tokens = network.model(**given).last_hidden_state
        found = form.run(given)["sentence_embedding"]
    means = torch.stack([tokens[0].mean(0), tokens[1, :3].mean(0)])
    assert near(found, means / means.norm(dim=-1, keepdim=True))


def test_samples_of_a_text_are_cut_disjoint_and_of_the_task(folders: Path, tmp_path: Path) -> None:
    network, form = opened(folders / "bert")
    made = made_samples(network, form, Take(text=folders / "text.txt", length=8, count=10, samples=tmp_path / "a"))
    assert made.calibration and made.evaluation and "10 to calibrate and 10 others" in made.notes[0]
    seen = [tuple(np.load(f)["input_ids"][0]) for part in (made.calibration, made.evaluation) for f in part.iterdir()]
    assert len(set(seen)) == 20 and max(map(len, seen)) == 8 and min(map(len, seen)) > 2
    assert all(ids[0] == 1 and ids[-1] == 2 for ids in seen)
    padded = Take(text=folders / "text.txt", length=24, padding="max", count=4, samples=tmp_path / "b")
    for file in sorted((made_samples(network, form, padded).calibration or tmp_path).iterdir()):
        sample = np.load(file)
        assert sample["input_ids"].shape == (1, 24)
        assert (sample["input_ids"] != 0).sum() == sample["attention_mask"].sum() < 24
    with pytest.raises(InputError, match=r"--max-length 65 does not fit bert, which takes 2 to 64"):
        made_samples(network, form, Take(text=folders / "text.txt", length=65, samples=tmp_path / "c"))


def test_a_language_model_reads_blocks_of_the_whole_text(folders: Path, tmp_path: Path) -> None:
    network, form = opened(folders / "gpt2")
    made = made_samples(network, form, Take(text=folders / "text.txt", length=16, count=6, samples=tmp_path / "a"))
    assert made.calibration and "in blocks of 16 tokens" in made.notes[0]
    assert {np.load(f)["input_ids"].shape for f in made.calibration.iterdir()} == {(1, 16)}
    assert all(1 not in np.load(f)["input_ids"] for f in made.calibration.iterdir())
    tokenizer("<s> $A").save_pretrained(folders / "llama")
    starts, form = opened(folders / "llama")
    made = made_samples(starts, form, Take(text=folders / "text.txt", length=16, count=6, samples=tmp_path / "starts"))
    for file in made.calibration.iterdir() if made.calibration else ():
        ids = np.load(file)["input_ids"]
        assert ids.shape == (1, 16) and ids[0, 0] == 1 and (ids == 1).sum() == 1
    other = tmp_path / "other.txt"
    other.write_text("one word from the other that was not in this, but had it by his. " * 8)
    network, form = opened(folders / "gpt2")
    both = Take(text=folders / "text.txt", evaluation=str(other), length=16, count=500, samples=tmp_path / "both")
    made = made_samples(network, form, both)
    assert made.calibration and made.evaluation
    assert len(list(made.calibration.iterdir())) > len(list(made.evaluation.iterdir())) > 1


def test_recordings_are_resampled_and_heard_as_the_extractor_does(folders: Path, tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed: pip install 'qdq[hf]'")
    network, form = opened(folders / "whisper")
    made = made_samples(network, form, Take(data=str(folders / "sounds"), samples=tmp_path))
    assert made.calibration and made.evaluation and "2 to calibrate and 2 others" in made.notes[0]
    shapes = {np.load(f)["input_features"].shape for f in made.calibration.iterdir()}
    assert shapes == {(1, *form.example["input_features"].shape[1:])} == {(1, 80, 100)}
    with pytest.raises(InputError, match=r"--text is for networks that read text, and whisper reads input_features"):
        made_samples(network, form, Take(text=folders / "text.txt", samples=tmp_path))


def test_pictures_are_what_the_folders_processor_makes(folders: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed: pip install 'qdq[image]'")
    for number in range(4):
        image.new("RGB", (40, 20), (200, 10, 50 * number)).save(tmp_path / f"{number}.png")
    network, form = opened(folders / "vit")
    assert form.example["pixel_values"].shape == (2, 3, 32, 32)
    take = Take(data=str(tmp_path), samples=tmp_path / "samples")
    with pytest.raises(InputError, match=r"vit has no preprocessor_config.json of an image processor"):
        made_samples(network, form, take)
    how = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    kind = {
        "image_processor_type": "ViTImageProcessor",
        **dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True),
    }
    (folders / "vit/preprocessor_config.json").write_text(json.dumps({**kind, **how, "rescale_factor": 1 / 255}))
    network, form = opened(folders / "vit")
    made = made_samples(network, form, take)
    assert made.calibration and made.evaluation and "2 to calibrate and 2 others" in made.notes[0]
    pixels = np.load(next(made.calibration.iterdir()))["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32) and np.allclose(pixels[0, 0], (200 / 255 - 0.5) / 0.25, atol=1e-4)


def test_weights_that_a_task_needs_must_be_there(folders: Path) -> None:
    with pytest.raises(InputError, match=r"The weights of bert lack \d tensors that text-classification needs"):
        opened(folders / "bert", "text-classification")
    with pytest.raises(
        InputError, match=r"--past is the length of a cache, which --task text-generation does not have"
    ):
        opened(folders / "gpt2", past=8)


def test_a_folder_without_a_tokenizer_reads_no_text(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "gpt2")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    network, form = opened(folder)  # for which transformers makes a tokenizer without words
    with pytest.raises(InputError, match="has no tokenizer"):
        made_samples(network, form, Take(text=write_text(tmp_path), samples=tmp_path / "samples"))


def test_a_cache_of_no_tokens_is_refused(folders: Path) -> None:
    with pytest.raises(InputError, match="--past 0"):
        opened(folders / "gpt2", "text-generation-with-past", past=0)
