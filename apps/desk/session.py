"""One visitor's desk: its requests by number, and the donors they became."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from kvshare_mm.apps.desk.engine import Engine
from kvshare_mm.apps.desk.shop import Asked, Letter
from kvshare_mm.apps.server.errors import ApiError
from kvshare_mm.config import RequestOptions, Reuse
from kvshare_mm.errors import EngineClosedError, InvalidRequestError, KVShareError
from kvshare_mm.outputs import RequestOutput
from kvshare_mm.reuse.admin import DonorInfo
from kvshare_mm.sampling import SamplingParams

MAX_TOKENS = 40
_MAX_TURNS = 200


@dataclass(frozen=True, slots=True)
class Cost:
    """What a request took: prompt tokens that the model computed, seconds to the first token."""

    computed: int
    seconds: float

    @classmethod
    def of(cls, output: RequestOutput) -> Cost:
        """Without the wait for a slot, which another customer may have caused."""
        return cls(output.provenance.recomputed, output.metrics.ttft - output.metrics.queue)


@dataclass(slots=True)
class Turn:
    """One request of the desk.

    Attributes:
        number: 1 for the first.
        customer: who asked.
        reuse: how it was answered.
        text: the answer so far.
        output: once it is complete.
        donor_id: the stored request it became, or None.
        prefix: what the letter takes with prefix caching alone; None: not measured.
        full: what it takes without any reuse; None: not measured.
        measured: whether nothing more will be.
        alone: the answer without any reuse, if it was asked for.
        donors: (number or None, similarity to it in words, same media) of each donor used.
    """

    number: int
    customer: str
    reuse: Reuse = "similar"
    text: str = ""
    output: RequestOutput | None = None
    donor_id: str | None = None
    prefix: Cost | None = None
    full: Cost | None = None
    measured: bool = False
    alone: str | None = None
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
        #: What was asked, by the number of its turn.
        self.letters: dict[int, Asked] = {}
        # Requests of both customers may run at once; what they became is found out one by one.
        self._settling = asyncio.Lock()
        name = uuid.uuid4().hex
        self.salt = json.dumps(["desk", name])
        # The same letters, each answered with prefix caching alone, share under this one.
        self._prefix_salt = json.dumps(["desk", "prefix caching", name])
        self._numbers: dict[str, int] = {}

    async def ask(
        self,
        llm: Engine,
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
        options = RequestOptions(cache_salt=self.salt, reuse=reuse, tenant=terms.tenant)
        params = SamplingParams(max_tokens=MAX_TOKENS)
        stream = llm.astream(await terms.read(llm.read, messages, params, options))
        # Only now: a letter that is refused gets no number.
        turn = Turn(len(self.turns) + 1, letter.name, reuse)
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
        try:
            turn.prefix = await self._prefix_cached(llm, messages, terms)
            yield turn
            turn.full = await self._in_full(llm, messages, turn, terms)
        except (ApiError, KVShareError):
            pass  # others wait, or there is nothing left on the account: the answer is there
        turn.measured = True
        yield turn

    async def compare(self, llm: Engine, letter: Letter, turn: Turn, terms: Terms) -> None:
        """Answer the letter of a turn again, without any reuse, for `Turn.alone`.

        Raises: as `ask`.
        """
        turn.alone = (await self._alone(llm, letter.messages(), terms, MAX_TOKENS)).text

    async def _prefix_cached(
        self, llm: Engine, messages: list[dict[str, Any]], terms: Terms
    ) -> Cost:
        """What a letter takes with prefix caching alone. Once: now it is cached."""
        options = RequestOptions(cache_salt=self._prefix_salt, reuse="exact", tenant=terms.tenant)
        return Cost.of(await _answered(llm, messages, SamplingParams(max_tokens=1), options, terms))

    async def _in_full(
        self, llm: Engine, messages: list[dict[str, Any]], turn: Turn, terms: Terms
    ) -> Cost:
        """What the letter of a turn takes without any reuse."""
        assert turn.output is not None
        if turn.output.provenance.exact + turn.output.provenance.reused == 0:
            return Cost.of(turn.output)
        # Twice: what else the machine did must not count for us.
        done = [await self._alone(llm, messages, terms, 1) for _ in range(2)]
        return min(map(Cost.of, done), key=lambda cost: cost.seconds)

    async def _alone(
        self, llm: Engine, messages: list[dict[str, Any]], terms: Terms, max_tokens: int
    ) -> RequestOutput:
        # Under a salt that nobody else has: vLLM's own prefix caching knows no "off".
        salt = json.dumps(["desk", "alone", uuid.uuid4().hex])
        options = RequestOptions(cache_salt=salt, reuse="off", store=False, tenant=terms.tenant)
        return await _answered(llm, messages, SamplingParams(max_tokens=max_tokens), options, terms)

    def donors(self, llm: Engine) -> list[tuple[DonorInfo, int | None]]:
        """The stored requests of this session with their numbers, the oldest first."""
        if not llm.has_cache:
            return []
        found = reversed(llm.cache.list(llm.namespace(self.salt)))
        return [(info, self._numbers.get(info.donor_id)) for info in found]

    def first_with(self, content_hash: str) -> int | None:
        """The first request that brought a picture or clip."""
        return next(
            (
                turn.number
                for turn in self.turns
                if turn.output is not None
                and any(u.content_hash == content_hash for u in turn.output.provenance.media)
            ),
            None,
        )

    def close(self, llm: Engine) -> None:
        """Delete what this session stored."""
        if llm.has_cache:
            for salt in (self.salt, self._prefix_salt):
                llm.cache.clear(llm.namespace(salt))

    def _settle(self, llm: Engine, turn: Turn) -> None:
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


async def _answered(
    llm: Engine,
    messages: list[dict[str, Any]],
    params: SamplingParams,
    options: RequestOptions,
    terms: Terms,
) -> RequestOutput:
    """A whole answer, which counts as all do."""
    output = None
    async with aclosing(llm.astream(await terms.read(llm.read, messages, params, options))) as all_:
        async for chunk in all_:
            output = chunk.output or output
    if output is None:
        raise EngineClosedError("the answer ended too early")
    terms.finished(output)
    return output
