"""Can KV of a model be shared? From its configuration alone: a small random one of its kind."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Qwen2_5OmniThinkerTextModel,
)
from transformers.models.qwen2_5_omni import Qwen2_5OmniTextConfig

from kvshare_mm.models.decoder import Decoder
from kvshare_mm.models.family import BOTH_WAYS, MEDIA
from kvshare_mm.models.loader import locate, read_config
from kvshare_mm.models.shape import KVShape
from kvshare_mm.models.states import CachedModel, state_bytes
from kvshare_mm.models.support import (
    RECURRENT,
    Support,
    check_support,
    declared_obstacle,
    windows,
)
from kvshare_mm.stream import Modality

_LAYERS = 8  # every pattern of layers is there by then, in the models there are
_WIDTH = 256
_MOST_LAYERS = 1000  # what a configuration may ask for: each is made, without weights
_MOST_PARAMETERS = 1_000_000_000  # of the small model
# What makes a model large and its attention no other.
_AT_MOST = {
    "vocab_size": 256,
    "vocab_size_per_layer_input": 256,
    "intermediate_size": 64,
    "intermediate_size_mlp": 64,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "n_group": 1,
    "topk_group": 1,
    "num_kv_shared_layers": 2,
    "num_experts_per_tok": 8,
}


@dataclass(frozen=True, slots=True)
class Checked:
    """What the configuration of a model says.

    Attributes:
        model_type: of its language part, e.g. "gemma3_text".
        reason: why KV of similar requests cannot be reused, in words, or None.
        shape: of one position's KV; None if that cannot be reused.
        dtype: of weights and KV.
        windows: some layers do not see all that is before.
        context_len: the model's own limit in tokens, or None if it says none.
        media: what it takes beside text, as far as that is known here.
        parameters: of its decoder layers, which each token of a prompt goes through: embeddings and
            output head, which only the last token of a prompt needs, are left out. Of a mixture of
            experts, all experts count. 0 if its KV cannot be reused.
        exact: identical beginnings can be reused; where `reason` is given, nothing else.
        state_bytes: of its recurrent layers together; they are reused up to where a state was kept.
    """

    model_type: str
    reason: str | None
    shape: KVShape | None
    dtype: torch.dtype
    windows: bool
    context_len: int | None
    media: tuple[Modality, ...] = ()
    parameters: int = 0
    exact: bool = False
    state_bytes: int = 0

    @property
    def bytes_per_token(self) -> int | None:
        return None if self.shape is None else self.shape.bytes_per_token(self.dtype)


def check_model(name: str, *, trust_remote_code: bool = False) -> Checked:
    """Whether KV of a model can be shared, without its weights.

    A random model of its architecture with few and narrow layers goes through the proof that every
    model goes through when it is loaded. What only weights decide is found then: HunYuan's
    trained norms, for one.

    Args:
        name: hub name, folder with a ``config.json``, ``.gguf`` file, or an embedded model.

    Raises:
        ModelLoadError: the configuration cannot be read.
    """
    return check_config(read_config(locate(name), trust_remote_code=trust_remote_code))


def check_config(config: Any) -> Checked:
    """`check_model` of a configuration that is read already."""
    text = config.get_text_config()
    dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.bfloat16
    support, shape, parameters, size = Support(declared_obstacle(text)), None, 0, 0
    media = MEDIA.get(config.model_type, ())
    if support.reason in (None, RECURRENT):
        try:
            num_layers = int(text.num_hidden_layers)
            if not 0 < num_layers <= _MOST_LAYERS:
                raise ValueError(f"num_hidden_layers is {num_layers}")
            if media:  # their decoders are proved on small models of each
                heads = text.num_attention_heads
                dim = getattr(text, "head_dim", None) or text.hidden_size // heads
                shape = KVShape(num_layers, text.num_key_value_heads, dim, dim)
            else:
                support, shape, size = _tried(text, num_layers, dtype)
            if shape is not None:
                with torch.device("meta"):
                    decoder = _decoder(text)
                embeddings = decoder.get_input_embeddings().weight.numel()
                parameters = sum(p.numel() for p in decoder.parameters()) - embeddings
        except Exception as error:  # of any architecture's own code
            words = (str(error).splitlines() or [type(error).__name__])[0][:200]
            support, shape = Support(f"no model of its kind could be made ({words})"), None
    if support.reason and config.model_type in BOTH_WAYS:
        media = ()
    return Checked(
        text.model_type,
        support.reason,
        shape,
        dtype,
        windows(text),
        getattr(text, "max_position_embeddings", None),
        media,
        parameters,
        exact=support.reason is None or support.states is not None,
        state_bytes=size,
    )


def _tried(text: Any, num_layers: int, dtype: torch.dtype) -> tuple[Support, KVShape | None, int]:
    """What the proof finds of a small model of a kind; of the whole one the shape of KV, and the
    bytes of its recurrent layers' state."""
    narrow, fewer = _narrow(text)
    if type(text) in AutoModelForCausalLM._model_mapping:
        make: Any = AutoModelForCausalLM.from_config
    elif type(text) in AutoModel._model_mapping:  # the language part of a multimodal model
        make = _with_head
    else:
        return Support(f"models of type {text.model_type} are not known here"), None, 0
    with torch.device("meta"):
        size = sum(p.numel() for p in make(narrow, dtype=torch.float32).parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"even a small one has {size:,} parameters")
    model = make(narrow, dtype=torch.float32).eval().requires_grad_(False)
    support = check_support(model)
    shape = support.kv_shape
    if shape is not None:
        shape = replace(shape, num_layers=num_layers, num_kv_heads=shape.num_kv_heads * fewer)
    size = 0
    if support.states is not None and support.states.states:
        forward = CachedModel(model.to(dtype))
        _, cache = forward(forward.new_cache(), {"input_ids": torch.zeros(1, 4, dtype=torch.int64)})
        by_kind = dict(zip(text.layer_types, map(state_bytes, cache.layers), strict=False))
        size = sum(by_kind[kind] for kind in text.layer_types)
    return support, shape, size


def _with_head(config: Any, **options: Any) -> Decoder:
    head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    return Decoder(AutoModel.from_config(config, **options), head, None)


def _decoder(text: Any) -> Any:
    if isinstance(text, Qwen2_5OmniTextConfig):  # the one that AutoModel does not know
        return Qwen2_5OmniThinkerTextModel(text)
    return AutoModel.from_config(text)


def _narrow(config: Any) -> tuple[Any, int]:
    """A configuration of few, narrow layers with the same attention in them, and how many times
    fewer heads it has."""
    config = copy.deepcopy(config)
    layers = int(config.num_hidden_layers)
    few, recurrent = min(layers, _LAYERS), declared_obstacle(config) == RECURRENT
    if recurrent:  # one of each kind, as wide as it is: widths depend on one another
        few = 1 + max(config.layer_types.index(kind) for kind in set(config.layer_types))
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == layers:
            setattr(config, name, value[:few])
    config.num_hidden_layers = few
    for name, most in _AT_MOST.items():
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            setattr(config, name, min(value, most))
    fewer, width, dim = 1, config.hidden_size, getattr(config, "head_dim", None)
    heads = getattr(config, "num_attention_heads", None) or 1
    if recurrent:
        pass
    elif getattr(config, "kv_lora_rank", None) or (dim and heads * dim != width):
        config.hidden_size = min(width, _WIDTH)
    elif width > 4 * _WIDTH:  # as wide as its heads are together: fewer of them
        kv_heads = getattr(config, "num_key_value_heads", None)
        fewer = math.gcd(heads, kv_heads or heads)
        config.hidden_size, config.num_attention_heads = width // fewer, heads // fewer
        if kv_heads:
            config.num_key_value_heads = kv_heads // fewer
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, name, None) is not None:
            setattr(config, name, 0)
    return config, fewer
