"""OpenTelemetry traces, by option: one span a request, with the names of the GenAI conventions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from kvshare_mm.errors import ConfigError
from kvshare_mm.outputs import RequestOutput


class Tracer:
    """Sends a span for every answer; without an endpoint it does nothing.

    Args:
        endpoint: where traces go (OTLP over HTTP), e.g. ``http://localhost:4318/v1/traces``.
        model_name: attribute of every span.
        exporter: used instead of the one for `endpoint`.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str | None, model_name: str, exporter: Any = None) -> None:
        self._model = model_name
        self._tracer: Any = None
        self._provider: Any = None
        if endpoint is None and exporter is None:
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError("traces need `pip install kvshare-mm[otel]`") from error
        self._provider = TracerProvider(resource=Resource.create({"service.name": "kvshare-mm"}))
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint))
        )
        self._tracer = self._provider.get_tracer("kvshare_mm")

    def record(self, output: RequestOutput, request_id: str, headers: Mapping[str, str]) -> None:
        """Send the span of a finished answer; it joins the trace that the client named, if any."""
        if self._tracer is None:
            return
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        p, m = output.provenance, output.metrics
        now = time.time_ns()
        span = self._tracer.start_span(
            "llm_request",
            context=TraceContextTextMapPropagator().extract(dict(headers)),
            start_time=now - int(1e9 * m.total),
            attributes={
                "gen_ai.request.id": request_id,
                "gen_ai.response.model": self._model,
                "gen_ai.usage.prompt_tokens": len(output.prompt_token_ids),
                "gen_ai.usage.completion_tokens": len(output.token_ids),
                "gen_ai.latency.time_in_queue": m.queue,
                "gen_ai.latency.time_to_first_token": m.ttft,
                "gen_ai.latency.e2e": m.total,
                "kvshare.exact": p.exact,
                "kvshare.reused": p.reused,
                "kvshare.recomputed": p.recomputed,
                "kvshare.declined": p.declined or "",
                "kvshare.fallback": p.fallback or "",
                "kvshare.lookup_s": m.lookup,
                "kvshare.plan_s": m.plan,
                "kvshare.edit_s": m.edit,
                "kvshare.prefill_s": m.prefill,
            },
        )
        span.end(end_time=now)

    def close(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()
