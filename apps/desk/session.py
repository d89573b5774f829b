"""One visitor's desk: its requests by number, and the donors they became."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from kvshare_mm.apps.desk.shop import Letter
from kvshare_mm.apps.server.errors import ApiError
from kvshare_mm.config import RequestOptions, Reuse
from kvshare_mm.errors import InvalidRequestError, QueueFullError
from kvshare_mm.llm import KVShare
from kvshare_mm.outputs import RequestOutput
from kvshare_mm.reuse.admin import DonorInfo
from kvshare_mm.sampling import SamplingParams

MAX_TOKENS = 40
_REFERENCES = 2  # measurements of full recompute
_MAX_TURNS = 200


@dataclass(slots=True)
class Turn:
    """One request of the desk.

    Attributes:
        number: 1 for the first.
        customer: who asked.
        text: the answer so far.
        output: once it is complete.
        donor_id: the stored request it became, or None.
        full_s: seconds to the first token without any reuse, measured right afterwards; None: not
            measured yet, or nothing was reused.
        donors: (number or None, similarity to it in words, same media) of each donor used.
    """

    number: int
    customer: str
    text: str = ""
    output: RequestOutput | None = None
    donor_id: str | None = None
    full_s: float | None = None
    donors: list[tuple[int | None, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Terms:
    """How the requests of a letter are run, and on whose account.

    Attributes:
        tenant: whose share of the engine is used.
        read: runs `KVShare.read` in a thread; raises ApiError if it cannot be now.
        finished: told of every answer, those that only measure too.
    """

    tenant: str = ""
    read: Callable[..., Awaitable[Any]] = asyncio.to_thread
    finished: Callable[[RequestOutput], None] = lambda _: None


class Session:
    """What one visitor has asked since they came, or started over. Shares with nobody else."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        # Requests of both customers may run at once; what they became is found out one by one.
        self._settling = asyncio.Lock()
        self._salt = json.dumps(["desk", uuid.uuid4().hex])
        self._numbers: dict[str, int] = {}

    async def ask(
        self,
        llm: KVShare,
        letter: Letter,
        reuse: Reuse,
        terms: Terms = Terms(),
    ) -> AsyncGenerator[Turn]:
        """Answer a letter; the turn is yielded as it grows, the last time with everything known.

        Raises:
            ApiError: what `terms` do not allow.
            InvalidRequestError: the letter, or a medium in it, cannot be taken, or there were
                too many letters.
            QueueFullError: too many people ask.
        """
        if len(self.turns) >= _MAX_TURNS:
            raise InvalidRequestError(f"{_MAX_TURNS} questions were asked; please start over")
        messages = letter.messages()
        options = RequestOptions(cache_salt=self._salt, reuse=reuse, tenant=terms.tenant)
        params = SamplingParams(max_tokens=MAX_TOKENS)
        stream = llm.astream(await terms.read(llm.read, messages, params, options))
        # Only now: a letter that is refused gets no number.
        turn = Turn(len(self.turns) + 1, letter.name)
        self.turns.append(turn)
        async with aclosing(stream):
            async for chunk in stream:
                turn.text += chunk.text
                turn.output = chunk.output
                if chunk.output is not None:
                    terms.finished(chunk.output)
                    turn.donors = self._described(chunk.output)
                yield turn
        async with self._settling:
            await asyncio.to_thread(llm.flush, 10)
            self._settle(llm, turn)
        yield turn
        told = turn.output.provenance if turn.output is not None else None
        if told is not None and not told.exact + told.reused:
            return  # it was computed in full: that is what it cost
        try:
            turn.full_s = await self._measured(llm, messages, terms)
        except (ApiError, QueueFullError):
            return  # others wait, or there is nothing left on the account
        yield turn

    async def _measured(self, llm: KVShare, messages: list[dict[str, Any]], terms: Terms) -> float:
        """Seconds to the first token of a letter without any reuse."""
        alone = RequestOptions(cache_salt=self._salt, reuse="off", store=False, tenant=terms.tenant)
        one = SamplingParams(max_tokens=1)
        times = []
        for _ in range(_REFERENCES):
            async with aclosing(
                llm.astream(await terms.read(llm.read, messages, one, alone))
            ) as reference:
                async for chunk in reference:
                    if chunk.output is not None:
                        terms.finished(chunk.output)
                        times.append(chunk.output.metrics.ttft - chunk.output.metrics.queue)
        return min(times)  # what else the machine did must not count for us

    def donors(self, llm: KVShare) -> list[tuple[DonorInfo, int | None]]:
        """The stored requests of this session with their numbers, the oldest first."""
        if llm.cache is None:
            return []
        found = reversed(llm.cache.list(llm.namespace(self._salt)))
        return [(info, self._numbers.get(info.donor_id)) for info in found]

    def close(self, llm: KVShare) -> None:
        """Delete what this session stored."""
        if llm.cache is not None:
            llm.cache.clear(llm.namespace(self._salt))

    def _settle(self, llm: KVShare, turn: Turn) -> None:
        """Find out which stored request a turn became: a new one, as long as it was."""
        assert turn.output is not None
        length = len(turn.output.prompt_token_ids) + len(turn.output.token_ids) - 1
        for info, number in self.donors(llm):
            if number is None and info.num_tokens == length:
                turn.donor_id = info.donor_id
                self._numbers[info.donor_id] = turn.number
                return

    def _described(self, output: RequestOutput) -> list[tuple[int | None, str]]:
        media = {use.content_hash for use in output.provenance.media}
        told = []
        for donor in output.provenance.donors:
            number = self._numbers.get(donor)
            before = next((t for t in self.turns if t.number == number), None)
            about = ""
            if media and before is not None and before.output is not None:
                same = media & {use.content_hash for use in before.output.provenance.media}
                about = "same picture or sound" if same else "another picture or sound"
            told.append((number, about))
        return told
