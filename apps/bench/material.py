"""What workloads are made of: agent sessions, documents, a file, examples; cut to a length."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from kvshare_mm import assets
from kvshare_mm.apps.bench.jsonl import read_jsonl, read_text
from kvshare_mm.errors import ConfigError

Message = dict[str, str]
Messages = list[Message]

# Tokens of a chat template around a message, about.
_FRAME = 5
# Items of a kind that share no session or document, where there are enough.
_APART = 24
# A chat template's own words on tools, as Qwen2.5's has them.
_TOOLS = """

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class Session:
    """An agent's session up to where it acts next.

    Attributes:
        policy: what the system prompt says.
        tools: signatures that stand behind it, one line each.
        turns: of user and assistant in turn; the last is the user's, or a tool's output.
    """

    policy: str
    tools: tuple[str, ...]
    turns: tuple[Message, ...]

    @property
    def outputs(self) -> list[int]:
        """Turns that are outputs of tools, the last two turns left out."""
        old = range(1, len(self.turns) - 2)
        return [k for k in old if self.turns[k]["content"].startswith("<tool_response>")]

    def messages(self) -> Messages:
        """As any chat template takes it: without roles or fields for tools."""
        tools = _TOOLS.format("\n".join(self.tools)) if self.tools else ""
        return [{"role": "system", "content": self.policy + tools}, *self.turns]


class Material:
    """Reads the sources once and cuts them to a prompt of about `tokens`.

    Args:
        folder: has ``agents_airline.jsonl``, ``agents_airline_tools.json``, ``agents_swe.jsonl``
            and ``rag_musique.jsonl``; ``banking77.jsonl`` and ``dialogsum_dev.jsonl`` if it likes.
            None: the small samples that are installed.
        count: tokens of a text.
        tokens: of a prompt.

    Raises:
        ConfigError: a file is missing or is not what it should be.
    """

    def __init__(self, folder: Path | None, count: Callable[[str], int], tokens: int) -> None:
        folder = folder or assets.folder("workloads")
        self.tokens = tokens
        self._count = count
        self._airline = read_jsonl(folder / "agents_airline.jsonl", "messages")
        self._swe = [
            # What the shell says is told by a user there.
            {"messages": [*row["messages"][:2], *map(_observed, row["messages"][2:])]}
            for row in read_jsonl(folder / "agents_swe.jsonl", "messages")
        ]
        self._tools = _tools(folder / "agents_airline_tools.json")
        self._rag = read_jsonl(folder / "rag_musique.jsonl", "ctxs", "question")
        banking = folder / "banking77.jsonl"
        if not banking.exists():
            banking = assets.folder("workloads").parent / "banking77-sample.jsonl"
        self._questions = read_jsonl(banking, "text", "intent")
        dialogues = folder / "dialogsum_dev.jsonl"
        self._dialogues = (
            read_jsonl(dialogues, "dialogue", "summary") if dialogues.exists() else None
        )

    def airline(self, i: int, policy: float = 0.3, tools: float = 0.2) -> Session:
        """A customer's session with a clock in its policy.

        Args:
            policy, tools: their shares of the prompt, at most; two tools at least, or none.
        """
        rows = _from(self._airline, i)
        system = self.cut(rows[0]["messages"][0]["content"], int(policy * self.tokens))
        signatures: list[str] = []
        room = tools * self.tokens
        for tool in self._tools:
            room -= self._count(tool)
            if room < 0 and (len(signatures) > 1 or not tools):
                break
            signatures.append(tool)
        used = self._count(system) + sum(map(self._count, signatures)) + self._count(_TOOLS)
        return Session(system, tuple(signatures), self._turns(rows, self.tokens - used))

    def software(self, i: int, policy: float = 0.3) -> Session:
        """A software agent's session: its actions are commands in a fence."""
        rows = _from(self._swe, i)
        system = self.cut(rows[0]["messages"][0]["content"], int(policy * self.tokens))
        return Session(system, (), self._turns(rows, self.tokens - self._count(system)))

    def documents(self, i: int, number: int, share: float) -> tuple[list[str], str]:
        """Passages, each of that share of a prompt, and a question about some of the first."""
        rows, size = _from(self._rag, i), int(share * self.tokens)
        passages: list[str] = []
        texts = iter([doc["text"] for row in rows for doc in row["ctxs"]])
        while len(passages) < number:
            passage = ""
            while self._count(passage) < size:
                text = next(texts, None)
                if text is None:
                    self._too_little("documents")
                passage += text + " "
            passages.append(self.cut(passage, size).strip())
        return passages, str(rows[0]["question"])

    def filler(self, i: int, tokens: int) -> str:
        """So many tokens of passages, as a paragraph of their own."""
        return f"{self.documents(i, 1, tokens / self.tokens)[0][0]}\n" if tokens else ""

    def file(self, i: int) -> list[str]:
        """Lines of source files that a software agent opened."""
        lines: list[str] = []
        for row in _from(self._swe, i):
            opened = [_opened(m["content"] or "") for m in row["messages"][2:] if m.get("content")]
            for code in sorted(opened, key=len, reverse=True)[:1]:
                lines += [line for line in code if line not in lines or not line.strip()]
        text = self.cut("\n".join(lines), self.tokens - 60)
        if self._count(text) < self.tokens // 2:
            self._too_little("source files")
        return text.split("\n")

    def examples(self, i: int) -> list[tuple[str, str]]:
        """Examples of one task, what is asked and what is right; the last is to be asked."""
        if self._dialogues is not None and i % 2 == 0:
            rows = _from(self._dialogues, i)
            found = [(f"Dialogue:\n{r['dialogue']}\nSummary:", str(r["summary"])) for r in rows]
        else:
            # Neighbours in the file have one intent.
            step = max(1, len(self._questions) // 97)
            rows = [self._questions[(i + k * step) % len(self._questions)] for k in range(2000)]
            found = [(f"Question: {r['text']}\nIntent:", str(r["intent"])) for r in rows]
        kept: list[tuple[str, str]] = []
        room = self.tokens - 40
        for asked, right in dict.fromkeys(found):
            size = self._count(f"{asked} {right}\n\n")
            if size <= room:
                kept.append((asked, right))
                room -= size
            elif room < 0.1 * self.tokens and len(kept) > 2:
                return kept
        self._too_little("examples")

    def cut(self, text: str, most: int) -> str:
        """The beginning of a text, of whole lines or words."""
        size = self._count(text)
        while size > most:
            text = text[: max(1, len(text) * most // size)]
            end = max(text.rfind("\n"), text.rfind(" "))
            text = text[:end] if end > 0 else text[:-1]
            size = self._count(text)
        return text

    def _turns(self, rows: Iterable[dict[str, Any]], room: int) -> tuple[Message, ...]:
        """Turns of sessions, one behind the other, that end where the assistant acts."""
        # A few long outputs would leave no turns to drop or to sum up.
        most = max(90, room // 8)
        turns: list[Message] = []
        acts: list[tuple[int, int]] = []
        used = 0
        for message in (m for row in rows for m in row["messages"][1:]):
            if message["role"] == "system":
                continue
            turn = _folded(message, lambda text: self.cut(text, most))
            if turn["role"] == "assistant" and _acts(turn["content"]):
                acts.append((len(turns), used))
            if turn["role"] == "assistant" and used + self._size(turn) > room:
                break
            if turn["role"] == (turns[-1]["role"] if turns else "assistant"):
                continue
            turns.append(turn)
            used += self._size(turn)
        else:
            self._too_little("agent sessions")
        end = next((at for at, size in reversed(acts) if size > 0.8 * room), len(turns))
        return tuple(turns[:end])

    def _size(self, turn: Message) -> int:
        return self._count(turn["content"]) + _FRAME

    def _too_little(self, what: str) -> NoReturn:
        raise ConfigError(f"too few {what} for prompts of {self.tokens} tokens: give more data")


def _tools(path: Path) -> list[str]:
    try:
        found = json.loads(read_text(path))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, list) or len(found) < 2:
        raise ConfigError(f"{path} must hold a list of two tools or more")
    return [json.dumps(tool, ensure_ascii=False) for tool in found]


def _from(rows: Sequence[dict[str, Any]], i: int) -> list[dict[str, Any]]:
    start = i * max(1, len(rows) // _APART) % len(rows)
    return [*rows[start:], *rows[:start]]


def _observed(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "role": "tool"} if message["role"] == "user" else message


def _opened(text: str) -> list[str]:
    """Lines of a file as the agent's editor shows it, without their numbers."""
    numbered = (line.rstrip("\r").partition(":") for line in text.split("\n"))
    return [code for number, colon, code in numbered if colon and number.isdigit()]


def _acts(text: str) -> bool:
    return "<tool_call>" in text or "```" in text


def _folded(message: dict[str, Any], cut: Callable[[str], str]) -> Message:
    """A turn as Qwen2.5's chat template writes it, where tools have roles and fields."""
    text = cut(message.get("content") or "")
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{text}\n</tool_response>"}
    for call in message.get("tool_calls") or ():
        arguments = json.loads(call["function"]["arguments"])
        told = json.dumps({"name": call["function"]["name"], "arguments": arguments})
        text += f"\n<tool_call>\n{told}\n</tool_call>"
    return {"role": message["role"], "content": text.strip() or "..."}
