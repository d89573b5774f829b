"""Can KV of a model be shared? From its configuration alone: a small random one of its kind."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from kvshare_mm.errors import ModelLoadError
from kvshare_mm.models.family import MEDIA
from kvshare_mm.models.loader import locate
from kvshare_mm.models.support import KVShape, check_support, declared_obstacle, windows
from kvshare_mm.stream import Modality

_LAYERS = 8  # every pattern of layers is there by then, in the models there are
_WIDTH = 256
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
}


@dataclass(frozen=True, slots=True)
class Checked:
    """What the configuration of a model says.

    Attributes:
        model_type: of its language part, e.g. "gemma3_text".
        reason: why KV cannot be reused, in words, or None.
        shape: of one position's KV; None if KV cannot be reused.
        dtype: of weights and KV.
        windows: some layers do not see all that is before.
        context_len: the model's own limit in tokens, or None if it says none.
        media: what it takes beside text, as far as that is known here.
        parameters: of its decoder layers, which each token of a prompt goes through: embeddings and
            output head, which only the last token of a prompt needs, are left out. Of a mixture of
            experts, all experts count. 0 if its KV cannot be reused.
    """

    model_type: str
    reason: str | None
    shape: KVShape | None
    dtype: torch.dtype
    windows: bool
    context_len: int | None
    media: tuple[Modality, ...] = ()
    parameters: int = 0

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
    source = locate(name)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # of transformers, the hub, or code from the hub
        raise ModelLoadError(f"Could not read the model {name!r}. {error}") from error
    return check_config(config)


def check_config(config: Any) -> Checked:
    """`check_model` of a configuration that is read already."""
    text = config.get_text_config()
    dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.bfloat16
    num_layers = int(getattr(text, "num_hidden_layers", 0) or 0)
    media = MEDIA.get(config.model_type, ())
    reason, shape = declared_obstacle(text), None
    if reason is None and media:  # their decoders are proved on small models of each
        heads = text.num_attention_heads
        dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        shape = KVShape(num_layers, text.num_key_value_heads, dim, dim)
    elif reason is None and type(text) not in AutoModelForCausalLM._model_mapping:
        reason = f"models of type {config.model_type} are not known here"
    elif reason is None:
        try:
            model = AutoModelForCausalLM.from_config(_narrow(text), dtype=torch.float32)
            support = check_support(model.eval().requires_grad_(False))
            reason, shape = support.reason, support.kv_shape
        except Exception as error:  # of any architecture's own code
            reason = f"no small model of its kind could be made ({error})"
    parameters = 0
    if shape is not None:
        shape = replace(shape, num_layers=num_layers)
        with torch.device("meta"):
            decoder = AutoModel.from_config(text)
        embeddings = decoder.get_input_embeddings().weight.numel()
        parameters = sum(p.numel() for p in decoder.parameters()) - embeddings
    return Checked(
        text.model_type,
        reason,
        shape,
        dtype,
        windows(text),
        getattr(text, "max_position_embeddings", None),
        media,
        parameters,
    )


def _narrow(config: Any) -> Any:
    """A configuration of few, narrow layers with the same attention in them."""
    config = copy.deepcopy(config)
    layers = int(config.num_hidden_layers)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == layers:
            setattr(config, name, value[:_LAYERS])
    config.num_hidden_layers = min(layers, _LAYERS)
    for name, most in _AT_MOST.items():
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            setattr(config, name, min(value, most))
    if getattr(config, "head_dim", None):  # else it would follow from the width
        config.hidden_size = min(config.hidden_size, _WIDTH)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, None)
    return config
