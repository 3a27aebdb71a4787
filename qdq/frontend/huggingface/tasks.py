"""What a model is exported for, as the Hub's tasks are called: a row of `TASKS` each.

config.json -> the architecture's ending -> a task; --task tells it otherwise, and its part: NAME[:PART].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engines.core.errors import did_you_mean
from qdq.core.errors import InputError
from qdq.frontend.huggingface.folder import Folder

Shape = Literal["encoder", "pooled", "decoder", "parts", "spectrum"]
PARTS = ("encoder", "decoder", "decoder-with-past")
PAST = "-with-past"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One thing that a model does.

    Attributes:
        name: of the Hub; with `-with-past` the cache of keys and values goes in and out.
        classes: of transformers that load it, the first that knows the model; all have `Auto` in front.
        shape: which of `forms` it has.
        endings: of architectures that do this.
        outputs: fields of what the model returns, of which the first that is there is the output.
    """

    name: str
    classes: tuple[str, ...]
    shape: Shape
    endings: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ("logits",)


_BARE = ("last_hidden_state", "image_embeds", "text_embeds", "pooler_output", "logits")
TASKS = {
    task.name: task
    for task in (
        Task(name="feature-extraction", classes=("Model",), shape="encoder", endings=("Model",), outputs=_BARE),
        Task(name="sentence-similarity", classes=("Model",), shape="pooled", outputs=_BARE),
        Task(name="fill-mask", classes=("ModelForMaskedLM",), shape="encoder", endings=("ForMaskedLM",)),
        Task(
            name="text-classification",
            classes=("ModelForSequenceClassification",),
            shape="encoder",
            endings=("ForSequenceClassification",),
        ),
        Task(
            name="token-classification",
            classes=("ModelForTokenClassification",),
            shape="encoder",
            endings=("ForTokenClassification",),
        ),
        Task(
            name="text-generation",
            classes=("ModelForCausalLM",),
            shape="decoder",
            endings=("ForCausalLM", "LMHeadModel"),
        ),
        Task(name=f"text-generation{PAST}", classes=("ModelForCausalLM",), shape="decoder"),
        Task(
            name="text2text-generation",
            classes=("ModelForSeq2SeqLM",),
            shape="parts",
            endings=("ForConditionalGeneration",),
        ),
        Task(
            name="image-classification",
            classes=("ModelForImageClassification",),
            shape="encoder",
            endings=("ForImageClassification",),
        ),
        Task(
            name="semantic-segmentation",
            classes=("ModelForSemanticSegmentation",),
            shape="encoder",
            endings=("ForSemanticSegmentation",),
        ),
        Task(
            name="audio-classification",
            classes=("ModelForAudioClassification",),
            shape="encoder",
            endings=("ForAudioClassification",),
        ),
        Task(
            name="automatic-speech-recognition",
            classes=("ModelForSpeechSeq2Seq", "ModelForCTC"),
            shape="parts",
            endings=("ForSpeechSeq2Seq", "ForCTC"),
        ),
    )
}
HEARD = ("whisper", "speech_to_text", "moonshine", "speecht5")  # models that ForConditionalGeneration is speech of


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A task, and which part of a model of several.

    Attributes:
        task: a value of `TASKS`.
        part: of `PARTS`, '' where the model is one network.
        why: where it comes from, a clause.
    """

    task: Task
    part: str
    why: str

    @property
    def past(self) -> bool:
        """Whether keys and values of earlier tokens go in."""
        return self.part.endswith(PAST) or self.task.name.endswith(PAST)


def names() -> list[str]:
    """What `--task` takes for a folder."""
    return [*TASKS, *(f"{name}:{part}" for name, t in TASKS.items() if t.shape == "parts" for part in PARTS[1:])]


def wish_of(folder: Folder, asked: str | None) -> Wish:
    """What is exported of a folder.

    Args:
        folder: with the model.
        asked: NAME or NAME:PART, None as config.json says.

    Raises:
        InputError: a task that is not known, or a part that the model does not have; or config.json does not tell.
    """
    if asked is None:
        return _told(folder)
    name, _, part = asked.partition(":")
    if name not in TASKS:
        raise InputError(f"Unknown --task {name!r}.{did_you_mean(name, TASKS)} {_known()}")
    task = TASKS[name]
    several = task.shape == "parts" and bool(folder.config.get("is_encoder_decoder"))
    if part and not several:
        raise InputError(f"--task {asked} names a part, and {folder.name} is one network. Give --task {name}.")
    if part and part not in PARTS:
        raise InputError(f"Unknown part {part!r} in --task {asked}: it must be one of {', '.join(PARTS)}.")
    if task.shape == "pooled" and folder.pooling is None:
        raise InputError(
            f"--task {name} needs to know how the tokens are pooled, and {folder.name} has no modules.json of "
            "sentence-transformers. Give the folder that it saved, or --task feature-extraction."
        )
    return Wish(task=task, part=(part or "encoder") if several else "", why="--task")


def _told(folder: Folder) -> Wish:
    if folder.pooling:
        return Wish(task=TASKS["sentence-similarity"], part="", why="modules.json of sentence-transformers")
    found = folder.architecture
    fit = [task for task in TASKS.values() if any(found.endswith(ending) for ending in task.endings)]
    several = bool(folder.config.get("is_encoder_decoder"))
    if found.endswith("ForConditionalGeneration"):
        name = "automatic-speech-recognition" if folder.kind in HEARD else "text2text-generation"
        fit = [TASKS[name]] if several else []
    if found.endswith("ForSequenceClassification") and folder.hears:  # as Wav2Vec2, HuBERT and WavLM call it
        fit = [TASKS["audio-classification"]]
    if found.endswith("LMHeadModel"):
        fit = [TASKS["text-generation"]]
    if several and found.endswith("Model") and fit:
        return Wish(task=fit[0], part="encoder", why=f"the architecture {found}")
    if not fit:
        raise InputError(
            f"config.json of {folder.name} names the architecture {found or '(none)'}, of which no task is known. Give "
            f"--task. {_known()}"
        )
    part = "encoder" if fit[0].shape == "parts" and several else ""
    return Wish(task=fit[0], part=part, why=f"the architecture {found}")


def _known() -> str:
    return f"Known are {', '.join(TASKS)}; of an encoder-decoder with :{', :'.join(PARTS)} behind it."
