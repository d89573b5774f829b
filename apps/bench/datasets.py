"""Streams of prompts: conversation datasets by hub name or as files, and plain JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from kvshare_mm.apps.bench.jsonl import read_jsonl, read_text
from kvshare_mm.errors import ConfigError

Row = Mapping[str, Any]

_INSTALL = "pip install 'kvshare-mm[hub]'"


@dataclass(frozen=True, slots=True)
class Conversations:
    """A public dataset of conversations.

    Attributes:
        name: on the command line.
        hub_id: on the Hugging Face hub.
        field: has the turns, and tells its rows from those of others.
        role: the field of a turn that says who speaks.
        text: the field of a turn that has the words.
    """

    name: str
    hub_id: str
    field: str
    role: str
    text: str

    def prompt(self, row: Row) -> str | None:
        """The first turn of a user, or None."""
        turns = row[self.field]
        if isinstance(turns, Mapping):  # as parquet files have it: an object of lists
            turns = [
                dict(zip(turns, values, strict=True))
                for values in zip(*turns.values(), strict=True)
            ]
        if not isinstance(turns, list | tuple):
            return None
        for turn in turns:
            if isinstance(turn, Mapping) and turn.get(self.role) in ("user", "human"):
                said = turn.get(self.text)
                return said if isinstance(said, str) and said.strip() else None
        return None


DATASETS: dict[str, Conversations] = {
    name: Conversations(name, *rest)
    for name, *rest in (
        # A million conversations with GPT-3.5 and GPT-4 (arXiv 2405.01470, ODC-BY).
        ("wildchat", "allenai/WildChat-1M", "conversation", "role", "content"),
        # Conversations that users of ChatGPT shared.
        ("sharegpt", "RyokoAI/ShareGPT52K", "conversations", "from", "value"),
        # A million conversations with 25 models (arXiv 2309.11998; gated on the hub).
        ("lmsys", "lmsys/lmsys-chat-1m", "conversation", "role", "content"),
    )
}


def read_stream(source: str, limit: int | None = None) -> list[str]:
    """Prompts in the order of their source: the first user turn of every conversation.

    Args:
        source: ``wildchat``, ``sharegpt`` or ``lmsys``, fetched from the hub; or a ``.jsonl``,
            ``.json`` or ``.parquet`` file whose rows are those datasets' or have a ``text``.
        limit: the first so many prompts.

    Raises:
        ConfigError: no such file or dataset, no network or library for it, or no prompts in it.
    """
    rows = _hub_rows(DATASETS[source]) if source in DATASETS else _file_rows(Path(source))
    prompts = list(islice(_prompts(rows, source), limit))
    if not prompts:
        raise ConfigError(f"{source} has no prompts")
    return prompts


def _prompts(rows: Iterable[Row], source: str) -> Iterator[str]:
    for row in rows:
        if "text" in row:
            prompt: str | None = str(row["text"])
        else:
            kinds = [d for d in DATASETS.values() if d.field in row]
            if not kinds:
                names = ", ".join(sorted({"text", *(d.field for d in DATASETS.values())}))
                raise ConfigError(f"{source} has a row with none of the fields {names}")
            prompt = kinds[0].prompt(row)
        if prompt and prompt.strip():
            yield prompt


def _file_rows(path: Path) -> Iterable[Row]:
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    if path.suffix == ".json":
        try:
            rows = json.loads(read_text(path))
        except ValueError as error:
            raise ConfigError(f"{path} is no JSON: {error}") from error
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ConfigError(f"{path} is no list of objects")
        return rows
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    raise ConfigError(
        f"{str(path)!r} is neither a .jsonl, .json or .parquet file nor one of "
        f"{', '.join(DATASETS)}"
    )


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ConfigError(f"parquet files need pyarrow: {_INSTALL}") from error
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (OSError, ArrowException) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def _hub_rows(dataset: Conversations) -> Iterator[Row]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(f"the dataset {dataset.name} needs the hub: {_INSTALL}") from error
    try:
        rows: Any = load_dataset(dataset.hub_id, split="train", streaming=True)
        yield from rows
    # No network, offline mode, gated without a login, ...: each library below has its own errors.
    except Exception as error:
        raise ConfigError(
            f"cannot fetch {dataset.hub_id} from the hub: {error}. A local .jsonl, .json or "
            ".parquet file of it can be given instead"
        ) from error
