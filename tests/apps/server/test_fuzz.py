"""Requests made up from the server's own description never break it, and are answered as it says.

``KVSHARE_FUZZ_EXAMPLES=500`` makes up that many for each route and kind (`-k` picks routes). How
many there were is printed (``pytest -s``).
"""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.config import SchemathesisConfig

from kvshare_mm.apps.server.app import create_app
from kvshare_mm.apps.server.options import ServerOptions
from kvshare_mm.apps.server.service import Service

from .conftest import ADMIN, Running

_SETTINGS = settings(
    max_examples=int(os.environ.get("KVSHARE_FUZZ_EXAMPLES", "25")),
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
# What a description cannot say of a valid body: that it names another model, is more than the
# context holds, or no word of the vocabulary. `_UNSAID` is what such an error is about.
_CONFIG = {"checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", "400", "404"]}}}
_UNSAID = re.compile(
    r"prompt|tokens|messages|messages\[\d+\](\.content.*)?|n|top_logprobs|repair|namespace|logit_bias|response_format|tools.*|tool_choice|model|input|dimensions|structured_outputs"
)


def _operations() -> list[Any]:
    def never() -> Any:
        raise AssertionError("the description needs no model")

    app = create_app(Service(never, ServerOptions("tiny")))
    schema = schemathesis.openapi.from_dict(
        app.openapi(), config=SchemathesisConfig.from_dict(_CONFIG)
    )
    return [result.ok() for result in schema.get_all_operations()]


_OPERATIONS = _operations()


def test_all_routes_are_described() -> None:
    labels = {operation.label for operation in _OPERATIONS}
    assert {
        "POST /v1/chat/completions",
        "POST /v1/completions",
        "GET /v1/models",
        "POST /tokenize",
        "POST /detokenize",
        "GET /health",
        "GET /metrics",
        "POST /v1/cache/lookup",
        "POST /v1/cache/clear",
        "DELETE /v1/cache/donors/{donor_id}",
    } <= labels


_VALID, _INVALID = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
# A path takes any text, so only bodies and queries can be invalid.
_CASES = [(_VALID, o) for o in _OPERATIONS] + [
    (_INVALID, o) for o in _OPERATIONS if list(o.body) or list(o.query)
]


@pytest.mark.parametrize(
    ("mode", "operation"), _CASES, ids=[f"{m.value} {o.label}" for m, o in _CASES]
)
def test_no_request_is_a_server_error(shared: Running, operation: Any, mode: Any) -> None:
    headers = {"Authorization": f"Bearer {ADMIN}"}
    statuses: Counter[int] = Counter()

    @given(case=operation.as_strategy(generation_mode=mode))
    @_SETTINGS
    def check(case: Any) -> None:
        body = case.body
        if isinstance(body, dict) and "completions" in operation.path:
            # A long answer is no mistake, but it takes its time.
            body["max_tokens"] = 1 if mode is _VALID else body.get("max_tokens", 1)
            body.pop("max_completion_tokens", None)
        reply = case.call(base_url=shared.url, headers=headers, timeout=60)
        statuses[reply.status_code] += 1
        case.validate_response(reply, headers=headers)
        if reply.status_code >= 400 and reply.headers["content-type"] == "application/json":
            error = reply.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            if mode is _VALID and reply.status_code == 400:
                assert _UNSAID.fullmatch(error["param"]), error

    check()
    print(f"\n{mode.value} {operation.label}: {statuses.total()} requests, {dict(statuses)}")
    assert shared.ask("GET", "/health").status_code == 200
