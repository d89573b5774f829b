"""What tests of several folders use."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kvshare_mm import assets


class Clock:
    """A clock that only a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for a condition; the limit is for a broken program, not a measurement."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def in_threads(work: Callable[[Any], object], arguments: Sequence[Any]) -> None:
    """Do the work for all arguments at once; what one of them raises is raised here."""
    with ThreadPoolExecutor(len(arguments)) as pool:
        list(pool.map(work, arguments))


def samples(model: str) -> list[tuple[list[dict[str, Any]], str]]:
    """An embedded model's samples: messages, their media as paths, and the right answers."""
    folder = Path(assets.folder(model)) / "samples"
    found = []
    for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        for message in sample["messages"]:
            for part in message["content"]:
                kind = part["type"]
                if kind != "text":
                    part[kind] = str(folder / part[kind])
        found.append((sample["messages"], sample["answer"]))
    return found


def byte_tokenizer(
    texts: Sequence[str], vocab_size: int, special: Sequence[str], **more: Any
) -> Any:
    """Byte-level BPE: 256 bytes, and some merges of what is often in the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **more)
