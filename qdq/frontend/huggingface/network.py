"""The network of a folder, in PyTorch, and its tokenizer or processor: from the folder's files alone.

Must not download, and runs the folder's own code only where it is trusted.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

from calib_data.volumes.monai import trusted
from qdq.core.errors import InputError, MissingRuntimeError
from qdq.frontend.huggingface.folder import Folder
from qdq.frontend.huggingface.tasks import Wish

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
CACHES = ("cache", "past_key_values")  # what `forward` calls keys and values of earlier tokens, the newest name first


def transformers_here() -> ModuleType:
    """The package transformers, told to stay offline.

    Raises:
        MissingRuntimeError: it, or torch, is not installed, or cannot be imported.
    """
    try:
        with offline(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch  # noqa: F401
            import transformers
    except ImportError as error:
        raise MissingRuntimeError(
            f"A Hugging Face folder needs torch and transformers: {error}. Install them: pip install 'qdq[hf]'."
        ) from error
    found: ModuleType = transformers
    return found


@contextmanager
def offline() -> Iterator[None]:
    """Nothing is fetched meanwhile; the environment is put back."""
    before = {name: os.environ.get(name) for name in OFFLINE}
    os.environ.update(OFFLINE)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@dataclass(frozen=True, kw_only=True)
class Network:
    """A model in evaluation mode, in FP32, on the CPU.

    Attributes:
        folder: that it comes from.
        wish: what it is exported for.
        model: transformers' model, whole: the encoder and the decoder of one with both.
        notes: what of its weights a person must know.
    """

    folder: Folder
    wish: Wish
    model: Any
    notes: tuple[str, ...] = ()

    @property
    def config(self) -> Any:
        """transformers' configuration; of the text part where the model has several."""
        found = self.model.config
        return found.get_text_config(decoder=True) if hasattr(found, "get_text_config") else found

    @property
    def main_input(self) -> str:
        """`input_ids`, `pixel_values`, `input_features` or `input_values`."""
        return str(self.model.main_input_name)

    @cached_property
    def takes(self) -> frozenset[str]:
        """Names of what `forward` takes."""
        return frozenset(inspect.signature(self.model.forward).parameters)

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's tokenizer; None where it has none, for which transformers may give one without words."""
        found = self._processor("AutoTokenizer")
        return found if found is None or len(found) > len(set(found.all_special_tokens)) else None

    @cached_property
    def pictures(self) -> Any:
        """The folder's image processor; None where it has none."""
        return self._processor("AutoImageProcessor")

    @cached_property
    def hearing(self) -> Any:
        """The folder's feature extractor; None where it has none."""
        return self._processor("AutoFeatureExtractor")

    @property
    def longest(self) -> int | None:
        """Tokens that the model takes at once, None where nothing says."""
        limits = [getattr(self.config, key, None) for key in ("max_position_embeddings", "n_positions")]
        pooling = self.folder.pooling
        limits += [getattr(self.tokenizer, "model_max_length", None), pooling.max_length if pooling else None]
        found = [int(n) for n in limits if n and 0 < n < 1 << 24]  # 1e30: transformers' word for none
        if self.config.model_type in ("roberta", "xlm-roberta", "camembert", "esm", "longformer", "mpnet"):
            offset = (self.config.pad_token_id or 0) + 1  # their positions start behind that of padding
            learned = getattr(self.config, "position_embedding_type", "absolute") == "absolute"
            found = [n - offset if learned and n == self.config.max_position_embeddings else n for n in found]
        return min(found, default=None)

    def _processor(self, auto: str) -> Any:
        transformers = transformers_here()
        try:
            with offline(), quiet(transformers):
                return getattr(transformers, auto).from_pretrained(
                    str(self.folder.path), local_files_only=True, trust_remote_code=trusted()
                )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
            return None


def network_of(folder: Folder, wish: Wish) -> Network:
    """Load the model of a folder.

    Raises:
        InputError: weights are missing, broken or of another network; or it needs code of its own that is not trusted.
        MissingRuntimeError: torch or transformers is missing.
    """
    transformers = transformers_here()
    if folder.config.get("auto_map") and not trusted() and not _built_in(transformers, folder):
        raise InputError(
            f"The model {folder.name} is code of its own (`auto_map` in config.json), and none of transformers' knows "
            f"{folder.kind!r}. Code of a folder can do anything on this machine: read it, and give --trust if you "
            "trust whoever made it."
        )
    names = [f"Auto{name}" for name in wish.task.classes]
    if wish.task.name == "feature-extraction" and hasattr(transformers, folder.architecture):
        names = [folder.architecture, *names] if folder.architecture.endswith("Model") else names
    failed: list[Exception] = []
    for name in names:
        if (kind := getattr(transformers, name, None)) is None:
            continue
        try:
            model, info = _loaded(transformers, kind, folder)
        except ImportError as error:
            raise MissingRuntimeError(
                f"transformers {transformers.__version__} cannot import what {folder.name} needs: {_cause(error)}. "
                "Install that, or where it is torchvision the one that fits your torch, or none."
            ) from error
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            failed.append(error)
            continue
        notes = _of_weights(folder, wish, info)
        model.eval().float()
        model.requires_grad_(False)
        return Network(folder=folder, wish=wish, model=model, notes=notes)
    said = " ".join(str(failed[0] if failed else f"transformers {transformers.__version__} has no {names[0]}").split())
    if "Unrecognized configuration class" in said:  # and a list of hundreds of those that are known
        said = f"transformers {transformers.__version__} has no {' or '.join(names)} of a {folder.kind} model"
    raise InputError(
        f"Cannot load {folder.name} for {wish.task.name}: {said[:600].rstrip('.')}. Give a folder with config.json and "
        "its weights (model.safetensors), and a --task that the model can do."
    )


def _cause(error: BaseException) -> BaseException:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _built_in(transformers: ModuleType, folder: Folder) -> bool:
    return folder.kind in transformers.CONFIG_MAPPING


def _loaded(transformers: ModuleType, kind: Any, folder: Folder) -> tuple[Any, Mapping[str, Any]]:
    """The model and what its loading says; with attention in plain operators, where it has that."""
    import torch

    given = {
        "local_files_only": True,
        "output_loading_info": True,
        "dtype" if int(transformers.__version__.partition(".")[0]) >= 5 else "torch_dtype": torch.float32,
    }
    if kind.__name__.startswith("Auto"):
        given["trust_remote_code"] = trusted()
    with offline(), quiet(transformers):
        try:
            model, info = kind.from_pretrained(str(folder.path), attn_implementation="eager", **given)
        except (TypeError, ValueError) as error:
            if "attn_implementation" not in str(error) and "attention" not in str(error).lower():
                raise
            model, info = kind.from_pretrained(str(folder.path), **given)
    return model, info


def _of_weights(folder: Folder, wish: Wish, info: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes of weights that the folder lacks.

    Raises:
        InputError: those are missing that an output needs.
    """
    missing = sorted(map(str, info.get("missing_keys") or ()))
    unneeded = [name for name in missing if "pooler" in name]
    if needed := [name for name in missing if name not in unneeded]:
        raise InputError(
            f"The weights of {folder.name} lack {len(needed)} tensors that {wish.task.name} needs, the first "
            f"{needed[0]!r}: they would be random numbers. Give the --task that the model was trained for, or a folder "
            "with all weights."
        )
    return (f"Weights of the pooler are not in {folder.name}; no output needs them.",) if unneeded else ()


@contextmanager
def quiet(transformers: ModuleType) -> Iterator[None]:
    """transformers logs errors only, warns of nothing and shows no bars."""
    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def cache_name(forward: Any) -> str:
    """What a `forward` calls its cache.

    Raises:
        InputError: it takes none.
    """
    taken: Sequence[str] = list(inspect.signature(forward).parameters)
    if found := next((name for name in CACHES if name in taken), None):
        return found
    raise InputError(
        "This model's forward takes no keys and values of earlier tokens. Give --task text-generation, without a cache."
    )
