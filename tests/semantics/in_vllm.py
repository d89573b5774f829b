"""How vLLM with KVShare in it is asked."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vllm import SamplingParams

from kvshare_mm import RequestMetrics, RequestOutput, TokenLogprob
from kvshare_mm.models.loader import locate
from kvshare_mm.stream import SegmentStream, text_stream
from kvshare_mm.vllm.offline import provenance_of
from kvshare_mm.vllm.pictures import prompt_of

from ..vllm.engines import GREEDY, shared_engine, stream_of, tokens
from .engines import NUM_LOGPROBS, Prompt


class InVLLM:
    """What vLLM caches itself is forgotten before each request: donors are all there is."""

    precision = 2e-3

    def __init__(self, model: Path | str, **options: Any) -> None:
        self._model = locate(str(model))
        self._stack = ExitStack()
        options = {"lookup_deadline_s": 30, "min_load_tokens": 1, **options}
        self.shared = self._stack.enter_context(
            shared_engine(self._model, options, max_model_len=512, max_logprobs=NUM_LOGPROBS)
        )
        self.reuse, self.store = self.shared.scheduler.reuse, self.shared.store

    def ask(
        self, prompt: Prompt, max_tokens: int = 4, cache_salt: str = "", **options: Any
    ) -> RequestOutput:
        stream = self._stream(prompt)
        asked = prompt_of(stream) | ({"cache_salt": cache_salt} if cache_salt else {})
        params = SamplingParams(
            max_tokens=max_tokens,
            logprobs=NUM_LOGPROBS,
            extra_args={"kv_transfer_params": {"kvshare": options}},
            **GREEDY,
        )
        assert self.shared.llm.reset_prefix_cache()
        self.shared.llm.llm_engine.reset_encoder_cache()
        (output,) = self.shared.llm.generate([asked], params, use_tqdm=False)
        self.shared.settle()
        return RequestOutput(
            request_id=output.request_id,
            prompt_token_ids=tuple(output.prompt_token_ids),
            text=output.outputs[0].text,
            token_ids=tuple(tokens(output)),
            finish_reason="length",
            provenance=provenance_of(output, stream),
            metrics=RequestMetrics(),
            logprobs=tuple(
                TokenLogprob(token, at[token].logprob, tuple((i, x.logprob) for i, x in at.items()))
                for token, at in zip(tokens(output), output.outputs[0].logprobs, strict=True)
            ),
        )

    def _stream(self, prompt: Prompt) -> SegmentStream:
        if isinstance(prompt[0], int):
            return text_stream(prompt)
        return stream_of(self._model, prompt)

    def forget(self) -> None:
        self.shared.forget()

    def close(self) -> None:
        self.store.flush(60)
        self._stack.close()
