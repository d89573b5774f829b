"""Questions about voice notes that reach the desk, with their only right answers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvshare_mm.assets.shop.dialogues import random_fillers
from kvshare_mm.assets.shop.phrases import CITIES, FILLERS, NAMES, NUMBERS, STORES
from kvshare_mm.assets.training.speech import Bank, Clip, make_clip

AUDIO_TOPICS = ("words", "first", "last", "count")
TEXT_TOPICS = ("caller", "city")
TOPICS = AUDIO_TOPICS + TEXT_TOPICS
_QUESTIONS = {
    "words": ("What do you hear?", "Which words are said?", "Write down the voice note."),
    "first": ("Which word comes first?", "What is the first word?", "Tell me the first word."),
    "last": ("Which word comes last?", "What is the last word?", "Tell me the last word."),
    "count": ("How many words are said?", "Count the words.", "Tell me the number of words."),
    "caller": ("Who is calling?", "What is the name of the caller?", "Tell me who is calling."),
    "city": ("Where does the caller live?", "From which city is the call?", "Tell me the city."),
}
PHRASINGS = 3
_HEADS = (
    "You listen to the calls of the {store} store.",
    "You write down calls for {store}.",
    "This is the telephone desk of {store}.",
)
_CALLERS = ("The caller is {name} from {city}.", "{name} from {city} is calling.")


@dataclass(frozen=True, slots=True)
class Call:
    """One question about one voice note."""

    clip: Clip
    name: str
    city: str
    store: str
    topic: str
    phrasing: int
    head: int
    line: int
    fillers: tuple[tuple[int, int], ...]

    def system_text(self, *, facts: bool = True) -> str:
        parts = [_HEADS[self.head].format(store=self.store)]
        if facts:
            parts.append(_CALLERS[self.line].format(name=self.name, city=self.city))
        for filler, place in self.fillers:
            parts.insert(1 + place % len(parts), FILLERS[filler])
        return " ".join(parts)

    def question_text(self) -> str:
        return _QUESTIONS[self.topic][self.phrasing]

    def answer(self) -> str:
        words = self.clip.words
        if self.topic == "words":
            return f"I hear: {' '.join(words)}."
        if self.topic == "first":
            return f"The first word is {words[0]}."
        if self.topic == "last":
            return f"The last word is {words[-1]}."
        if self.topic == "count":
            return f"I hear {NUMBERS[len(words)]} word{'s' if len(words) > 1 else ''}."
        if self.topic == "caller":
            return f"{self.name} is calling."
        return f"The call is from {self.city}."

    def messages(self, audio: Any = None, *, facts: bool = True) -> list[dict[str, Any]]:
        """Chat messages; ``audio`` stands for the clip's samples when given."""
        sound = self.clip.samples if audio is None else audio
        system = {"type": "text", "text": self.system_text(facts=facts)}
        content = [
            {"type": "audio", "audio": sound},
            {"type": "text", "text": self.question_text()},
        ]
        return [{"role": "system", "content": [system]}, {"role": "user", "content": content}]


def random_call(rng: random.Random, clip: Clip, topic: str) -> Call:
    return Call(
        clip=clip,
        name=rng.choice(NAMES),
        city=rng.choice(CITIES),
        store=rng.choice(STORES),
        topic=topic,
        phrasing=rng.randrange(PHRASINGS),
        head=rng.randrange(len(_HEADS)),
        line=rng.randrange(len(_CALLERS)),
        fillers=random_fillers(rng, rng.randint(0, 4)),
    )


def calls(bank: Bank, seed: int, topics: tuple[str, ...] = TOPICS) -> Iterator[Call]:
    """Endless calls, topics in turn; held out when the bank's voices are."""
    rng = random.Random(f"calls {seed}")
    while True:
        for topic in topics:
            yield random_call(rng, make_clip(bank, rng), topic)
