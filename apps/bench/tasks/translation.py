"""Translation with demonstrations, scored with BLEU: the paper's WMT19 experiment."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvshare_mm.apps.bench.jsonl import read_jsonl
from kvshare_mm.apps.bench.tasks.base import FewShot, Item
from kvshare_mm.errors import ConfigError

_LANGUAGES = {
    "cs": "Czech",
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "ja": "Japanese",
    "ru": "Russian",
    "zh": "Chinese",
}
# sacrebleu's order of n-grams: counts and totals of 1- to 4-grams, then the lengths.
_ORDER = 4


@dataclass(frozen=True)
class Translation(FewShot):
    """Sentences with other sentences and their translations before them.

    The data: JSON Lines of ``{"source", "reference"}``, the languages in the file's name
    (``wmt20_zh-en.jsonl``); or a test set of sacrebleu by name, as ``wmt19/de-en``, which
    sacrebleu fetches.

    Args:
        demonstrations: in every prompt.
        pool: sentences set aside as demonstrations: the first of the file.
        max_chars: longer sources are left out; a small model loses the thread.
    """

    name: ClassVar[str] = "translation"
    metric: ClassVar[str] = "BLEU"
    about: ClassVar[str] = "few-shot translation into the second language"
    max_new_tokens: ClassVar[int] = 72

    demonstrations: int = 5
    pool: int = 40
    max_chars: int = 180

    def rows(self, path: Path) -> list[tuple[str, str]]:
        return [
            (" ".join(s.split()), " ".join(r.split()))
            for s, r in _sentences(path)
            if len(r) >= 20 and len(s) <= self.max_chars
        ]

    def prompt(
        self, path: Path, number: int, shown: Sequence[tuple[str, str]], question: str
    ) -> str:
        of, into = _languages(path)
        parts = [f"Job {number}: translate {of} sentences into {into}."]
        parts += [f"{of}: {source}\n{into}: {reference}" for source, reference in shown]
        return "\n\n".join([*parts, f"{of}: {question}\n{into}:"])

    def statistics(self, answer: str, item: Item) -> list[float]:
        import sacrebleu

        found = sacrebleu.corpus_bleu([answer], [[item.references[0]]])
        return [*found.counts, *found.totals, found.sys_len, found.ref_len]

    def score(self, totals: NDArray[np.float64], count: int) -> NDArray[np.float64]:
        """Corpus BLEU, as sacrebleu computes it from summed counts."""
        from sacrebleu.metrics.bleu import BLEU

        flat = totals.reshape(-1, 2 * _ORDER + 2)
        scores = [
            BLEU.compute_bleu(
                correct=row[:_ORDER].astype(int).tolist(),
                total=row[_ORDER : 2 * _ORDER].astype(int).tolist(),
                sys_len=int(row[-2]),
                ref_len=int(row[-1]),
                smooth_method="exp",
            ).score
            for row in flat
        ]
        return np.array(scores).reshape(totals.shape[:-1])


def _languages(path: Path) -> tuple[str, str]:
    found = re.search(r"([a-z]{2})-([a-z]{2})$", path.stem)
    if not found:
        raise ConfigError(f"{path}: the name must end in the languages, as in wmt20_de-en.jsonl")
    source, reference = (_LANGUAGES.get(code, code) for code in found.groups())
    return source, reference


def _sentences(path: Path) -> list[tuple[str, str]]:
    if path.exists() or path.suffix == ".jsonl":
        rows = read_jsonl(path, "source", "reference")
        return [(str(r["source"]), str(r["reference"])) for r in rows]
    from sacrebleu.utils import get_reference_files, get_source_file

    test_set, _, pair = str(path).partition("/")
    try:
        files = [get_source_file(test_set, pair), get_reference_files(test_set, pair)[0]]
        source, reference = (Path(f).read_text(encoding="utf-8").split("\n") for f in files)
    # Unknown sets end in SystemExit, a missing network in urllib's errors.
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{path} is no file, and sacrebleu cannot get such a test set: {error}"
        ) from error
    return list(zip(source, reference, strict=False))
