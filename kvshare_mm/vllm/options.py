"""The connector's options, as they stand in ``kv_connector_extra_config``, and a request's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvshare_mm.config import KVShareConfig, RequestOptions, refuse_old_words, wrong_options
from kvshare_mm.errors import ConfigError, InvalidRequestError

# What `KVShareConfig` says about reuse and storage; the rest is vLLM's own business.
SHARED_OPTIONS = frozenset(
    {
        "audit_budget",
        "audit_share",
        "cache_salt",
        "disk_bytes",
        "donor_dtype",
        "embedder",
        "host_bytes",
        "index_token",
        "index_uri",
        "max_candidates",
        "max_divergence",
        "min_gain_share",
        "min_gain_tokens",
        "min_run",
        "repair",
        "reuse",
        "store_dir",
    }
)


# What a request may set for itself; vLLM has words of its own for the rest.
OF_REQUESTS = frozenset({"reuse", "repair", "max_divergence", "store"})


class ConnectorOptions(BaseModel):
    """Options of KVShare inside vLLM. Unknown names are an error.

    Beside the fields below, those of `KVShareConfig` that `SHARED_OPTIONS` names are taken; in
    vLLM, `embedder` is off unless it is named, because it would run beside the model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    lookup_deadline_s: float = Field(
        0.25, gt=0, description="longest that a request waits for its plan before it does without"
    )
    recompute_per_step: int = Field(
        512, ge=16, description="most tokens that loads compute in one step beside running requests"
    )
    min_load_tokens: int = Field(
        32, ge=1, description="fewest tokens beyond vLLM's own prefix cache worth a load"
    )
    core: KVShareConfig = Field(description="what the options of `SHARED_OPTIONS` say")

    _words = model_validator(mode="before")(refuse_old_words)

    @classmethod
    def of(cls, options: Mapping[str, Any] | None = None) -> ConnectorOptions:
        """Validated options. Raises ConfigError naming the option that is wrong."""
        given = dict(options or {})
        if "core" in given:
            raise ConfigError("Invalid options: core: there is no such option")
        shared = {name: given.pop(name) for name in SHARED_OPTIONS & given.keys()}
        core = KVShareConfig.of(**{"embedder": None, **shared})
        try:
            return cls(core=core, **given)
        except ValidationError as error:
            known = SHARED_OPTIONS | cls.model_fields.keys() - {"core"}
            raise wrong_options(error, known) from error


def request_options(params: Any) -> RequestOptions:
    """What a request says in ``kv_transfer_params["kvshare"]``.

    Raises:
        InvalidRequestError: a name or a value that does not exist, with the field's name.
    """
    given = params.get("kvshare") if isinstance(params, Mapping) else None
    try:
        if given is not None and not isinstance(given, Mapping):
            raise InvalidRequestError("it holds options by name")
        refuse_old_words(given := given or {})
        if unknown := sorted(map(str, given.keys() - OF_REQUESTS)):
            raise InvalidRequestError(f"there is no {unknown[0]}", unknown[0])
        return RequestOptions(**{name: x for name, x in given.items() if x is not None})
    except ValueError as error:
        field = getattr(error, "field", None)
        name = ".".join(("kv_transfer_params.kvshare", *([field] if field else [])))
        raise InvalidRequestError(f"{name}: {error}", name) from error
