"""Bodies and headers that no honest client sends, for every route that takes a body."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

JSON = {"content-type": "application/json"}


@dataclass(frozen=True, slots=True)
class Sent:
    """One request.

    Attributes:
        name: for the report.
        legal: whether it may be answered with status 200.
    """

    name: str
    path: str
    content: bytes
    headers: dict[str, str] = field(default_factory=lambda: JSON)
    legal: bool = False


_USER = [{"role": "user", "content": "The quick brown fox"}]
_PIN = "/v1/cache/donors/nobody/pin"

# A good body of each route.
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": _USER, "max_tokens": 1},
    "/v1/responses": {"input": "The quick brown fox", "max_output_tokens": 1},
    "/v1/completions": {"prompt": "The quick brown fox", "max_tokens": 1},
    "/tokenize": {"prompt": "The quick brown fox"},
    "/detokenize": {"tokens": [5, 6, 7]},
    "/v1/cache/lookup": {"prompt": "The quick brown fox"},
    "/v1/cache/clear": {"namespace": "nobody's"},
    _PIN: {"ttl_s": 5.0},
}

_DEEP = 5000


def _nested(depth: int) -> Any:
    value: Any = 1
    for i in range(depth):
        value = [value] if i % 2 else {"a": value}
    return value


# No JSON object at all, or hardly.
RAW: dict[str, bytes] = {
    "nothing": b"",
    "blank": b" \n\t",
    "NUL": b"\0",
    "BOM": b"\xef\xbb\xbf",
    "BOM and object": b"\xef\xbb\xbf{}",
    "UTF-16": '{"prompt": "x"'.encode("utf-16"),
    "UTF-32": '{"prompt": "x"'.encode("utf-32"),
    "half a letter": b'{"prompt": "\xc3"}',
    "no UTF-8": b"\xff\xfe\xfd",
    "overlong": b'{"prompt": "\xc0\x80"}',
    "CESU": b'{"model": "\xed\xa0\x80"}',
    "number": b"1",
    "huge number": b"9" * 100_000,
    "null": b"null",
    "true": b"true",
    "text": b'"text"',
    "list": b"[]",
    "list of objects": b'[{"prompt": "x"}]',
    "NaN": b"NaN",
    "Infinity": b"-Infinity",
    "open": b"{",
    "open text": b'{"prompt": "x',
    "open list": b'{"prompt": ["x"',
    "comma": b'{"prompt": "x",}',
    "two": b'{"prompt": "x"}{"prompt": "y"}',
    "single quotes": b"{'prompt': 'x'}",
    "comment": b'{/* */"prompt": "x"}',
    "no key": b'{: "x"}',
    "number as key": b'{1: "x"}',
    "line in text": b'{"model": "a\nb"}',
    "bad escape": b'{"model": "\\x41"}',
    "bad unicode": b'{"model": "\\u12"}',
    "deep lists": b"[" * 100_000,
    "closed deep lists": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "form": b"prompt=x&max_tokens=1",
    "XML": b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><x>&e;</x>',
    "YAML": b"prompt: !!python/object/apply:os.system ['id']",
    "pickle": b"\x80\x04\x95\x10\0\0\0",
    "gzip": gzip.compress(b'{"prompt": "x"}'),
    "a request": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n{}",
}

# Written as text where Python's `json` would not write them.
_LITERALS = [
    "1e400", "-1e400", "1e-400", "NaN", "Infinity", "-Infinity", "9" * 400, "-" + "9" * 400,
    "9" * 4300, "9" * 4301, "1" * 100_000, "0.1e1", "-0", "1E+2", "2147483648",
    "9223372036854775807",
    "9223372036854775808", "-9223372036854775809", "18446744073709551615", "18446744073709551616",
    "-1", "0", "1.5", "true", "false", "null", '""', '"1"', '"x"', '"\\ud800"', '"\\u0000"',
    '"\\udfff\\ud800"', '"../../etc/passwd"', '"%s%n{}{0.__class__}"', '"${jndi:ldap://127.0.0.1/x}"',
    "[]", "[[]]", "[null]", "[true]", "[1.5]", "[-1]", '[""]', '["\\ud800"]', "[{}]", "[1, \"x\"]",
    "[[1], 2]", "[9223372036854775808]", "[-9223372036854775809]", "[4294967296]",
    "[" + "9" * 400 + "]",
    "[[9223372036854775807]]", "{}", '{"a": 1}', '{"__proto__": {}}', '{"": ""}', '{"\\ud800": 1}',
    '{"role": "user"}', '[{"role": "user", "content": 1}]', '[{"role": 1, "content": "x"}]',
    '[{"role": "\\ud800", "content": "x"}]', '[{"role": "", "content": "x"}]',
    '[{"role": "user", "content": [[]]}]', '[{"role": "user", "content": [{"type": null}]}]',
    '[{"role": "user", "content": [{"type": "text", "text": {}}]}]',
    '[{"role": "user", "content": [{"type": "\\ud800"}]}]',
    '[{"role": "user", "content": "\\ud800"}]', '[{"role": "user", "content": "x", "content": []}]',
    '[{"role": "user", "content": [{"type": "image_url", "image_url": 5}]}]',
    '[{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "\\ud800", '
    '"format": "wav"}}]}]',
    '[{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "A", '
    '"format": "wav"}}]}]',
    '[{"role": "user", "content": []}]', '[{"role": "user", "content": null}]',
    '[{"role": "user", "content": "x", "tool_calls": 5}]',
    '{"reuse": "off", "repair": "\\ud800"}', '{"repair": "recompute:1e400"}', '{"repair": ""}',
    '{"max_divergence": 1e400}', '{"max_divergence": -1e400}', '{"max_divergence": NaN}',
    '{"include_usage": 5}', '{"include_usage": "yes"}',
]  # fmt: skip

_BIG = {
    "a long text": json.dumps("x" * 200_000),
    "many short texts": json.dumps(["x"] * 20_000),
    "many tokens": json.dumps([5] * 50_000),
    "many lists": json.dumps([[5]] * 5_000),
    "an object of many keys": json.dumps({str(i): i for i in range(20_000)}),
    "messages without end": json.dumps([{"role": "user", "content": "x"}] * 5_000),
    "parts without end": json.dumps(
        [{"role": "user", "content": [{"type": "text", "text": "x"}] * 5_000}]
    ),
    "lists in lists": "[" * 900 + "1.0" + "]" * 900,
    "deep": json.dumps(_nested(250)),
    "deeper": json.dumps(_nested(900)),
    "a message with a deep field": json.dumps([{**_USER[0], "name": _nested(300)}]),
    "a part with a deep field": json.dumps(
        [{"role": "user", "content": [{"type": "text", "text": "x", "x": _nested(300)}]}]
    ),
}

_FIELDS: dict[str, tuple[str, ...]] = {
    "/v1/chat/completions": (
        "messages", "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k",
        "min_p", "seed", "stop", "ignore_eos", "n", "stream", "stream_options", "cache_salt",
        "kvshare", "logprobs", "top_logprobs", "tools", "response_format", "logit_bias", "user",
        "presence_penalty", "repetition_penalty",
    ),
    "/v1/responses": (
        "input", "instructions", "model", "max_output_tokens", "temperature", "top_p", "text",
        "tools", "tool_choice", "parallel_tool_calls", "metadata", "store", "stream", "kvshare",
        "previous_response_id", "include", "reasoning",
    ),
    "/v1/completions": (
        "prompt", "model", "max_tokens", "temperature", "top_k", "seed", "stop", "n", "logprobs",
        "stream", "cache_salt", "kvshare", "echo", "best_of", "suffix",
    ),
    "/tokenize": ("prompt", "messages", "add_special_tokens", "return_token_strs", "model"),
    "/detokenize": ("tokens", "model"),
    "/v1/cache/lookup": ("prompt", "messages", "tenant", "cache_salt", "kvshare", "model"),
    "/v1/cache/clear": ("namespace", "tenant", "cache_salt", "all"),
    _PIN: ("ttl_s",),
}  # fmt: skip

_HEADERS: dict[str, dict[str, str]] = {
    "no type": {},
    "an empty type": {"content-type": ""},
    "text": {"content-type": "text/plain"},
    "a form": {"content-type": "application/x-www-form-urlencoded"},
    "parts without a boundary": {"content-type": "multipart/form-data"},
    "parts": {"content-type": "multipart/form-data; boundary=x"},
    "XML": {"content-type": "application/xml"},
    "no type at all": {"content-type": "/"},
    "a list of types": {"content-type": "application/json, text/plain"},
    "an unknown charset": {"content-type": "application/json; charset=nothing"},
    "UTF-7": {"content-type": "application/json; charset=utf-7"},
    "a long type": {"content-type": "application/" + "x" * 4000},
    "gzip": {**JSON, "content-encoding": "gzip"},
    "deflate": {**JSON, "content-encoding": "deflate"},
    "br": {**JSON, "content-encoding": "br"},
    "an unknown encoding": {**JSON, "content-encoding": "nothing"},
    "a foreign language": {**JSON, "accept": "text/html", "accept-encoding": "x;q=9"},
    "a range": {**JSON, "range": "bytes=9-1"},
    "a method to be taken instead": {**JSON, "x-http-method-override": "DELETE"},
    "a long id": {**JSON, "x-request-id": "x" * 5000},
    "an id with escapes": {**JSON, "x-request-id": "%1b[31m"},
    "a trace of nonsense": {**JSON, "traceparent": "00-zz-zz-zz", "tracestate": "="},
    "cookies": {**JSON, "cookie": "a=" + "b" * 3000},
}

_COMBINED: list[tuple[str, str]] = [
    ("/v1/chat/completions", '{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, '
     '"seed": ' + "9" * 4300 + ', "n": 3}'),
    ("/v1/chat/completions", '{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, '
     '"n": 16, "logprobs": true, "top_logprobs": 20, "stream": true}'),
    ("/v1/chat/completions", '{"messages": 1, "messages": [{"role": "user", "content": "x"}], '
     '"max_tokens": 9, "max_tokens": 1}'),
    # Comes back in the reply: it must be JSON, and text.
    ("/v1/responses", '{"input": "x", "max_output_tokens": 1, "metadata": {"\\ud800": "\\udfff"}}'),
    ("/v1/responses", '{"input": "x", "max_output_tokens": 1, "text": {"format": {"type": '
     '"json_schema", "name": "\\ud800", "schema": {"type": "object", "title": "\\ud800"}}}}'),
    ("/v1/responses", '{"input": "x", "max_output_tokens": 1, "tool_choice": "required", "tools": '
     '[{"type": "function", "name": "f", "description": 1e400}], "text": {"format": {"type": '
     '"json_schema", "schema": {"const": NaN}}}}'),
    ("/v1/responses", '{"input": "x", "max_output_tokens": 1, "tool_choice": "required", "tools": '
     '[{"type": "function", "name": "f"}], "text": {"format": {"type": "json_schema", "schema": '
     '{"const": NaN}}}}'),
    ("/v1/responses", '{"input": [{"type": "function_call", "call_id": "x", "name": "f", '
     '"arguments": "[1e400]"}], "max_output_tokens": 1}'),
    ("/v1/responses", '{"input": [{"role": "user", "content": [{"type": "input_image", '
     '"image_url": "file:///etc/passwd"}]}], "max_output_tokens": 1}'),
    ("/v1/completions", '{"prompt": [[1], [2], [3], [999999]], "max_tokens": 1}'),
    ("/v1/completions", '{"prompt": [], "n": 0}'),
    ("/v1/completions", '{"prompt": ["a", "b"], "n": 64}'),
    ("/v1/completions", '{"prompt": "x", "max_tokens": 1, "temperature": 1e-320}'),
    ("/v1/completions", '{"prompt": "x", "max_tokens": 1, "top_p": 1e-320}'),
    ("/v1/completions", '{"prompt": "x", "max_tokens": 1, "temperature": 100, "min_p": 1}'),
    ("/v1/completions", '{"prompt": "x", "max_tokens": 1, "top_k": 100000000000000000000}'),
    ("/v1/completions", '{"prompt": [0], "max_tokens": 1}'),
    ("/v1/completions", '{"prompt": [-1], "max_tokens": 1}'),
    ("/tokenize", '{"prompt": "x", "messages": []}'),
    ("/tokenize", "{}"),
    ("/detokenize", '{"tokens": []}'),
    ("/v1/cache/clear", "{}"),
    ("/v1/cache/clear", '{"namespace": "x", "all": 1}'),
    ("/v1/cache/lookup", '{"prompt": [9223372036854775808]}'),
    ("/v1/cache/lookup", '{"prompt": [-1]}'),
]  # fmt: skip

_IDS = [
    "%00", "..%2f..%2fetc%2fpasswd", "%ff", "%F0%9F%92%A9", "x" * 4000, "%0d%0aX:%20y", "'", "{0}",
    "a%20b", "-1", "%25%32%66",
]  # fmt: skip


def sent() -> Iterator[Sent]:
    """All of them."""
    for path, good in GOOD.items():
        for name, content in RAW.items():
            yield Sent(f"{path}: {name}", path, content)
        for name in _FIELDS[path]:
            rest = {k: v for k, v in good.items() if k != name}
            head = json.dumps(rest)[:-1] + (", " if rest else "")
            for value in (*_LITERALS, *_BIG.values()):
                text = f'{head}"{name}": {value}}}'
                yield Sent(f"{path}: {name}={value[:60]}", path, text.encode(), legal=True)
        whole = json.dumps(good)
        for label, value in _BIG.items():
            text = f'{whole[:-1]}, "unheard_of": {value}}}'
            yield Sent(f"{path}: unheard_of={label}", path, text.encode(), legal=True)
        for label, headers in _HEADERS.items():
            yield Sent(f"{path}: {label}", path, whole.encode(), headers, legal=True)
        packed = {"gzip": gzip.compress, "deflate": zlib.compress}
        for label, pack in packed.items():
            headers = {**JSON, "content-encoding": label}
            bomb = pack(b'{"prompt": "' + b"x" * (1 << 20) + b'"}')
            yield Sent(f"{path}: packed with {label}", path, bomb, headers)
    for path, text in _COMBINED:
        yield Sent(f"{path}: {text[:80]}", path, text.encode(), legal=True)
    for donor in _IDS:
        yield Sent(f"pin {donor[:30]}", f"/v1/cache/donors/{donor}/pin", b'{"ttl_s": 5.0}')
    yield Sent("ping", "/ping", b"\0" * 1000, legal=True)
