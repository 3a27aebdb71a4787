"""What of a network is exported: plain named tensors in and out, as Optimum names them.

network, wish -> `form_of` -> `Form`: the names of its inputs, an example, and a function of them.
Must not read samples or write files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qdq.core.errors import InputError
from qdq.frontend.huggingface import caches
from qdq.frontend.huggingface.network import Network, cache_name
from qdq.frontend.huggingface.pooled import pooled
from qdq.frontend.pytorch.libraries import torch_here

Tensors = Mapping[str, Any]
BATCH, LENGTH, PAST = "batch", "length", "past_length"
EXAMPLE = {BATCH: 2, LENGTH: 5, PAST: 7, "total_length": 12, "encoder_length": 6}  # of open sizes; no two alike


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Plain tensors in and out.

    Attributes:
        run: input name -> tensor, to output name -> tensor.
        example: of the inputs.
        dynamic: the sizes that stay open.
        layers: of keys and values that go in and out, 0 without.
        modules: that `run` needs beyond the network's model.
    """

    run: Callable[[Tensors], dict[str, Any]]
    example: dict[str, Any]
    dynamic: dict[str, dict[int, str]]
    layers: int = 0
    modules: tuple[Any, ...] = field(default=())


def plain(network: Network, form: Form) -> Any:
    """A form as a torch.nn.Module whose `forward` takes its tensors in order; the model is a part of it."""
    nn = torch_here().nn
    base: Any = nn.Module
    names = tuple(form.example)

    class Plain(base):  # type: ignore[misc]  # torch is known at run time only
        def __init__(self) -> None:
            super().__init__()
            self.model = network.model
            self.others = nn.ModuleList(form.modules)
            self.eval()

        def forward(self, *tensors: Any) -> dict[str, Any]:
            return form.run(dict(zip(names, tensors, strict=True)))

    return Plain()


def form_of(network: Network, *, past: int | None = None) -> Form:
    """What is exported of a network.

    Args:
        network: loaded.
        past: with a cache: keys and values of exactly so many tokens go in, and one token; None leaves both open.

    Raises:
        InputError: the model has no such part.
    """
    wish = network.wish
    if past is not None and past < 1:
        raise InputError(f"--past {past}: a cache of a fixed length holds at least one token.")
    if past is not None and not wish.past:
        raise InputError(
            f"--past is the length of a cache, which --task {wish.task.name} does not have. Give --task "
            f"{'text-generation' if not wish.part else wish.task.name}{'' if not wish.part else ':decoder'}-with-past."
        )
    if wish.part == "encoder":
        return _encoder(network, network.model.get_encoder(), ("last_hidden_state",))
    if wish.part:
        return _decoder(network, past)
    if wish.task.shape == "decoder":
        return _generator(network, past) if wish.past else _causal(network)
    return _encoder(network, network.model, wish.task.outputs)


def _encoder(network: Network, model: Any, outputs: tuple[str, ...]) -> Form:
    """Tokens, pixels or sound to one tensor."""
    main, text = network.main_input, network.main_input == "input_ids"
    example = _tokens(network) if text else {main: _signal(network)}
    heads = network.folder.pooling if network.wish.task.shape == "pooled" else None
    dense, pool = pooled(heads) if heads else ((), None)

    def run(given: Tensors) -> dict[str, Any]:
        returned = model(**given, return_dict=True)
        name = next((n for n in outputs if getattr(returned, n, None) is not None), None)
        if name is None:
            raise InputError(
                f"{type(model).__name__} returns {', '.join(returned.keys())}, none of {', '.join(outputs)}. Give "
                "another --task."
            )
        if pool:
            return {"sentence_embedding": pool(returned[name], given["attention_mask"])}
        return {name: returned[name]}

    open_ = {0: BATCH, 1: LENGTH} if text or main == "input_values" else {0: BATCH}
    return Form(run=run, example=example, dynamic={name: dict(open_) for name in example}, modules=dense)


def _causal(network: Network) -> Form:
    """A language model without a cache: logits of every position."""
    example = _tokens(network)

    def run(given: Tensors) -> dict[str, Any]:
        return {"logits": network.model(**given, use_cache=False, return_dict=True).logits}

    return Form(run=run, example=example, dynamic={name: {0: BATCH, 1: LENGTH} for name in example})


def _generator(network: Network, past: int | None) -> Form:
    """A language model with a cache: logits of the new tokens, and the cache with them in it."""
    name = cache_name(network.model.forward)
    cache = caches.empty_cache(both=False)
    length = EXAMPLE[PAST] if past is None else past
    batch = EXAMPLE[BATCH] if past is None else 1
    new = EXAMPLE[LENGTH] if past is None else 1
    ids = _ids(network, (batch, length + new))
    network.model(input_ids=ids[:, :length], use_cache=True, **{name: cache})
    held = caches.tensors_of(cache, sides=("",))
    layers = len(held) // 2
    example = {"input_ids": ids[:, length:], "attention_mask": torch_here().ones_like(ids)}
    if "position_ids" in network.takes:
        example["position_ids"] = torch_here().arange(length, length + new).expand(batch, new).contiguous()
    example |= held

    def run(given: Tensors) -> dict[str, Any]:
        rest = {key: value for key, value in given.items() if not key.startswith(caches.PAST)}
        cache = caches.cache_of(given, layers)
        logits = network.model(**rest, use_cache=True, return_dict=True, **{name: cache}).logits
        grown = caches.tensors_of(cache, sides=("",))
        return {"logits": logits} | {caches.present_name(n): grown[n] for n in held}

    dynamic: dict[str, dict[int, str]] = {} if past is not None else _grown(example)
    return Form(run=run, example=example, dynamic=dynamic, layers=layers)


def _grown(example: Tensors) -> dict[str, dict[int, str]]:
    """Open sizes of a step with a cache."""
    axes = {"input_ids": {0: BATCH, 1: LENGTH}, "position_ids": {0: BATCH, 1: LENGTH}}
    axes["attention_mask"] = {0: BATCH, 1: "total_length"}
    return {
        name: axes[name]
        if name in axes
        else {0: BATCH, 1: "encoder_length"}
        if name.startswith("encoder_")
        else {0: BATCH, 2: "encoder_length" if ".encoder." in name else PAST}
        for name in example
    }


def _decoder(network: Network, past: int | None) -> Form:
    """The decoder of an encoder-decoder, with a cache of its own keys and values and the encoder's, or without."""
    model, width = network.model, _width(network)
    name = cache_name(model.forward)
    batch, heard = (EXAMPLE[BATCH], EXAMPLE["encoder_length"]) if past is None else (1, EXAMPLE["encoder_length"])
    sound = network.main_input != "input_ids"
    if sound:
        heard = _states(network).shape[1]
    states = torch_here().randn(batch, heard, width, generator=torch_here().Generator().manual_seed(0))
    example: dict[str, Any] = (
        {} if sound else {"encoder_attention_mask": torch_here().ones(batch, heard, dtype=torch_here().int64)}
    )
    ids, sides = _ids(network, (batch, EXAMPLE[LENGTH])), ("decoder", "encoder")
    mask = example.get("encoder_attention_mask")
    cache = caches.empty_cache(both=True)
    length = 1 if not network.wish.past else EXAMPLE[PAST] if past is None else past
    decoded(network, _ids(network, (batch, length)), states, mask, **{name: cache})
    held = caches.tensors_of(cache, sides=sides)
    layers = len(held) // 4
    if network.wish.past:
        example = {"input_ids": ids[:, :1].contiguous(), **example, **held}
    else:
        example = {"input_ids": ids, **example, "encoder_hidden_states": states}

    def run(given: Tensors) -> dict[str, Any]:
        mask, heard = given.get("encoder_attention_mask"), given.get("encoder_hidden_states")
        if heard is None:  # its keys and values are in the cache; only its sizes are looked at
            cache = caches.cache_of(given, layers)
            key = given[caches.past_names(1, ("encoder",))[0]]
            heard = torch_here().zeros(key.shape[0], key.shape[2], width)
        else:
            cache = caches.empty_cache(both=True)
        logits = decoded(network, given["input_ids"], heard, mask, **{name: cache})
        grown = caches.tensors_of(cache, sides=("decoder",) if network.wish.past else sides)
        return {"logits": logits} | {caches.present_name(n): tensor for n, tensor in grown.items()}

    dynamic: dict[str, dict[int, str]] = {} if past is not None else _grown(example)
    if network.wish.past:
        dynamic |= {"input_ids": {0: BATCH}} if dynamic else {}
    if sound:
        dynamic = {n: {a: s for a, s in axes.items() if s != "encoder_length"} for n, axes in dynamic.items()}
    return Form(run=run, example=example, dynamic=dynamic, layers=layers if network.wish.past else 0)


def decoded(network: Network, ids: Any, states: Any, mask: Any, **more: Any) -> Any:
    """(batch, tokens, words): what an encoder-decoder's decoder makes of its tokens and of the encoder's states."""
    from transformers.modeling_outputs import BaseModelOutput

    given = {"decoder_input_ids": ids, "encoder_outputs": BaseModelOutput(last_hidden_state=states)}
    if mask is not None:
        given["attention_mask"] = mask
    return network.model(**given, return_dict=True, **more).logits


def _width(network: Network) -> int:
    config = network.model.config
    return int(getattr(config, "d_model", None) or config.hidden_size)


def _states(network: Network) -> Any:
    return network.model.get_encoder()(_signal(network, batch=1)).last_hidden_state


def _ids(network: Network, shape: tuple[int, int]) -> Any:
    """Token ids from 0 on that are not padding."""
    words = int(network.config.vocab_size)
    ids = torch_here().randint(0, words, shape, generator=torch_here().Generator().manual_seed(0))
    pad = getattr(network.config, "pad_token_id", None)
    return ids if pad is None else torch_here().where(ids == pad, (pad + 1) % words, ids)


def _tokens(network: Network) -> dict[str, Any]:
    ids = _ids(network, (EXAMPLE[BATCH], EXAMPLE[LENGTH]))
    example = {"input_ids": ids}
    if "attention_mask" in network.takes:
        example["attention_mask"] = torch_here().ones_like(ids)
    if "token_type_ids" in network.takes and getattr(network.config, "type_vocab_size", 0) > 1:
        example["token_type_ids"] = torch_here().zeros_like(ids)
    return example


def _signal(network: Network, batch: int = EXAMPLE[BATCH]) -> Any:
    """Pixels or sound of the size that the folder's processor gives."""
    from qdq.frontend.huggingface.media import example_shape

    return torch_here().randn((batch, *example_shape(network)), generator=torch_here().Generator().manual_seed(0))
