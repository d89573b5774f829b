"""What a model's configuration says of its KV, without its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModel

from kvshare_mm.errors import ConfigError, ModelLoadError
from kvshare_mm.models.loader import DTYPES, locate
from kvshare_mm.models.support import KVShape, declared_obstacle


@dataclass(frozen=True, slots=True)
class DescribedModel:
    """A model that was not loaded.

    Attributes:
        dtype: of its KV.
        parameters: of its decoder layers, which each token of a prompt goes through: embeddings and
            output head, which only the last token of a prompt needs, are left out. Of a mixture of
            experts, all experts count.
        obstacle: why its KV cannot be reused, as far as its configuration tells.
    """

    shape: KVShape
    dtype: torch.dtype
    parameters: int
    obstacle: str | None


def described_model(name: str, dtype: str = "auto") -> DescribedModel:
    """Read a model's configuration: hub name, folder with a config.json, or an embedded model.

    Raises:
        ConfigError: there is no such dtype.
        ModelLoadError: there is no such model, or it is none that has KV.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is none of auto, {', '.join(DTYPES)}")
    try:
        config = AutoConfig.from_pretrained(locate(name))
        text = config.get_text_config()
        heads = int(text.num_attention_heads)
        width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
        shape = KVShape(
            num_layers=int(text.num_hidden_layers),
            num_kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
            key_dim=width,
            value_dim=int(getattr(text, "v_head_dim", None) or width),
        )
        with torch.device("meta"):
            decoder = AutoModel.from_config(text)
        embeddings = decoder.get_input_embeddings().weight.numel()
    except ModelLoadError:
        raise
    except Exception as error:  # of transformers, the hub, or a config that is no language model's
        raise ModelLoadError(f"Could not read the configuration of {name!r}. {error}") from error
    own = getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.float32
    return DescribedModel(
        shape,
        own if dtype == "auto" else DTYPES[dtype],
        sum(p.numel() for p in decoder.parameters()) - embeddings,
        declared_obstacle(text),
    )
