"""Answers of a form: valid whatever the model, or cut by length; schemas that are refused."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
import torch

from kvshare_mm import InvalidRequestError, KVShare, RequestOptions, SamplingParams
from kvshare_mm.forms import Form
from kvshare_mm.grammar import Grammars

from .asking import _PROMPTS, Inbox
from .schemas import SCHEMAS, an_object, json_schema

ALONE = RequestOptions(reuse="off")
OBJECT = {"type": "json_object"}


def test_the_mask_is_what_makes_them_so(llm: KVShare) -> None:
    with pytest.raises(json.JSONDecodeError):
        json.loads(llm.generate(_PROMPTS[0], max_tokens=100).text)


def test_answers_at_once_keep_their_own_forms(llm: KVShare) -> None:
    """More at once than slots, each with another schema, and plain ones between."""
    alone = llm.generate(_PROMPTS[7], max_tokens=30, options=ALONE)
    asked = [
        (name, Inbox(llm, prompt, SamplingParams(max_tokens=400, temperature=1.0, seed=i, **form)))
        for i, (name, prompt) in enumerate(zip(SCHEMAS, _PROMPTS, strict=False))
        for form in ({"response_format": json_schema(SCHEMAS[name])},) * 2
    ]
    plain = Inbox(llm, _PROMPTS[7], SamplingParams(max_tokens=30))
    for name, inbox in asked:
        output = inbox.result()
        assert output.finish_reason == "stop"
        jsonschema_rs.validate(SCHEMAS[name], json.loads(output.text))
    assert plain.result().token_ids == alone.token_ids


def test_an_object_may_be_cut_by_length(llm: KVShare) -> None:
    output = llm.generate(_PROMPTS[0], max_tokens=3, response_format=OBJECT)
    assert output.finish_reason == "length" and len(output.token_ids) == 3
    assert output.text.startswith("{")


def test_the_last_token_may_complete_it(llm: KVShare) -> None:
    form = json_schema(SCHEMAS["flags"])
    whole = llm.generate(_PROMPTS[0], max_tokens=400, response_format=form, options=ALONE)
    size = len(whole.token_ids)
    again = llm.generate(_PROMPTS[0], max_tokens=size, response_format=form, options=ALONE)
    assert (again.text, again.finish_reason) == (whole.text, "stop")
    short = llm.generate(_PROMPTS[0], max_tokens=size - 1, response_format=form, options=ALONE)
    assert short.finish_reason == "length"


def test_a_number_ends_by_the_end_token_alone(llm: KVShare) -> None:
    """It could always go on: only the model says that it is over, also with `ignore_eos`."""
    form = json_schema({"type": "integer"})
    eos = llm.tokenizer.eos_token_id
    for more in ({}, {"ignore_eos": True}):
        bias = {eos: 100.0}
        output = llm.generate(
            _PROMPTS[0], max_tokens=30, response_format=form, logit_bias=bias, **more
        )
        assert output.finish_reason == "stop" and output.token_ids[-1] == eos
        assert len(output.token_ids) == 2 and isinstance(json.loads(output.text), int)


def test_logprobs_leave_out_what_is_forbidden(llm: KVShare) -> None:
    """As inside vLLM, which masks before it takes them."""
    form = json_schema({"const": [True]})
    output = llm.generate(_PROMPTS[0], max_tokens=30, response_format=form, logprobs=1)
    assert output.logprobs is not None and json.loads(output.text) == [True]
    grammar = Grammars(llm.tokenizer, frozenset({llm.tokenizer.eos_token_id})).of(
        Form("json", {"const": [True]})
    )
    assert grammar is not None
    for entry in output.logprobs:
        if int(grammar.allowed(len(llm.tokenizer)).sum()) == 1:
            assert entry.logprob == pytest.approx(0.0, abs=1e-6)
        grammar.add(entry.token_id)
    assert grammar.complete


def test_blanks_do_not_go_on_for_ever(llm: KVShare) -> None:
    blank = llm.tokenizer.encode(" ")
    output = llm.generate(
        _PROMPTS[0], max_tokens=200, response_format=json_schema(SCHEMAS["flags"]),
        logit_bias=dict.fromkeys(blank, 100.0),
    )  # fmt: skip
    assert output.finish_reason == "stop"
    assert output.text.count(" ") > 15 and json.loads(output.text)["no"] is None


# -- what is refused ------------------------------------------------------------------------

LOOP: dict[str, Any] = {}
LOOP["properties"] = {"self": LOOP}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"not": {}},
        {"type": "array", "uniqueItems": True, "contains": {"type": "string"}},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
        {"oneOf": [{"type": "number"}, {"type": "integer"}]},
        {"const": -(2**63)},  # this, too, ended the process
        {"type": "string", "pattern": "("},
        {"$ref": "#"},
        {"$ref": "#/nowhere"},
        {"$ref": "http://127.0.0.1/schema.json"},
        {"enum": []},
        {"enum": ["x" * 70_000]},
        # Each of these ended the process, or filled its memory.
        {"type": "array", "items": {"type": "boolean"}, "minItems": 1_000_000_000},
        {"type": "array", "items": {"type": "boolean"}, "maxItems": 1e9},
        {"anyOf": [{"type": "integer", "multipleOf": n} for n in (9991, 9990)]},
        {"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}z"} for i in range(30)]},
        {"type": "object", "patternProperties": {f".*a.{{{i}}}z": {} for i in range(30)}},
        {"type": "string", "pattern": "a" * 300},
        {"type": "string", "maxLength": 1_000_000_000},
        {"const": float("nan")},
        {"const": {1, 2}},
        LOOP,
    ],
    ids=lambda schema: repr(schema)[:40],
)
def test_schemas_that_cannot_be_followed_are_refused(llm: KVShare, schema: Any) -> None:
    with pytest.raises(InvalidRequestError, match="response_format") as raised:
        llm.generate("Hi", max_tokens=2, response_format=json_schema(schema))
    assert raised.value.field == "response_format"
    assert llm.generate("Hi", max_tokens=2).token_ids  # the engine never heard of it


def test_a_schema_that_takes_too_long_ends_its_own_request_alone(llm: KVShare) -> None:
    """All ways to go on are followed at once: these took 150 ms a token, everybody waiting."""
    node = {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/node"}} for _ in range(140)]}
    form = json_schema({"$defs": {"node": node}, "$ref": "#/$defs/node"})
    other = Inbox(llm, _PROMPTS[0], SamplingParams(max_tokens=40))
    with pytest.raises(InvalidRequestError, match="cannot be followed") as raised:
        llm.generate("Hi", max_tokens=20, response_format=form)
    assert raised.value.field == "response_format"
    assert other.result().token_ids and llm.healthy


def test_properties_may_be_called_like_keywords(llm: KVShare) -> None:
    names = ("minItems", "multipleOf", "allOf", "$ref", "pattern", "patternProperties", "enum")
    schema = an_object(**{name: {"enum": [1, 2]} for name in names})
    output = llm.generate("Hi", max_tokens=300, response_format=json_schema(schema))
    assert list(json.loads(output.text)) == list(names)


def test_what_one_answer_takes_is_not_counted_to_the_next(llm: KVShare) -> None:
    """All that is alike between two answers of one schema is its text."""
    grammars = Grammars(llm.tokenizer, frozenset({0}))
    schema = {"type": "string", "pattern": "^(.*[a-m].{40}|.*[n-z0-9].{39})$"}
    rng = np.random.default_rng(0)
    for _ in range(2):
        one = grammars.of(Form("json", schema))
        assert one is not None and one.allowed(len(llm.tokenizer)).any()
        with pytest.raises(InvalidRequestError, match="cannot be followed"):
            for _ in range(20_000):
                may = one.allowed(len(llm.tokenizer)).nonzero().flatten()
                plain = [i for i in may.tolist() if llm.tokenizer.decode([i]).isalnum()]
                one.add(int(rng.choice(plain or may.tolist())))


def test_objects_of_two_hundred_optional_properties_are_followed(llm: KVShare) -> None:
    schema = an_object(first={"const": 1}, last={"const": 2})
    schema["properties"] = {
        "first": {"const": 1},
        **{f"p{i}": {"const": i} for i in range(200)},
        "last": {"const": 2},
    }
    output = llm.generate(
        "Hi", max_tokens=400, temperature=1.0, seed=1, response_format=json_schema(schema)
    )
    assert output.finish_reason in ("stop", "length") and '"first"' in output.text


@pytest.mark.parametrize("depth", [200, 3_000, 100_000])
def test_deep_schemas_are_refused(llm: KVShare, depth: int) -> None:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    with pytest.raises(InvalidRequestError) as raised:
        llm.read("Hi", response_format=json_schema(schema))
    assert raised.value.field == "response_format"
    while "items" in schema:  # taking it apart in one go would be as deep
        schema = schema["items"]


@pytest.mark.parametrize(
    "value",
    ["json", 5, [], {}, {"type": "xml"}, {"type": []}, {"type": "json_schema"},
     {"type": "json_schema", "json_schema": {}},
     {"type": "json_schema", "json_schema": {"schema": "{}"}}],
)  # fmt: skip
def test_formats_that_are_none_are_refused(value: Any) -> None:
    with pytest.raises(InvalidRequestError, match="json_schema") as raised:
        SamplingParams(response_format=value)
    assert raised.value.field == "response_format"


def test_a_tokenizer_that_cannot_be_looked_through_is_said() -> None:
    class Slow:
        def __len__(self) -> int:
            return 10

    with pytest.raises(InvalidRequestError, match="tokenizer") as raised:
        Grammars(Slow(), frozenset({1})).of(Form("json", {"type": "object"}))  # type: ignore[arg-type]
    assert raised.value.field == "response_format"


def test_rows_without_a_token_are_never_allowed(llm: KVShare) -> None:
    """Models have more rows than their tokenizers have tokens."""
    grammar = Grammars(llm.tokenizer, frozenset()).of(Form("json", an_object()))
    assert grammar is not None
    size = len(llm.tokenizer)
    longer, shorter = grammar.allowed(size + 64), grammar.allowed(size - 5)
    assert longer.dtype == torch.bool and len(longer) == size + 64 and len(shorter) == size - 5
    assert not longer[size:].any() and torch.equal(longer[: size - 5], shorter)
    assert {llm.tokenizer.decode([i]).strip()[:1] for i in longer.nonzero().flatten()} <= {"{", ""}


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["bounds", "references", "a call"])
def test_a_trained_model_answers_in_the_form(smollm2: KVShare, name: str) -> None:
    messages = [{"role": "user", "content": f"Answer in JSON, with {name}."}]
    form = json_schema(SCHEMAS[name])
    outputs = [smollm2.chat(messages, max_tokens=400, response_format=form)]
    *_, last = smollm2.stream(messages, max_tokens=400, temperature=0.8, response_format=form)
    outputs.append(last.output)
    for output in outputs:
        assert output.finish_reason == "stop"
        jsonschema_rs.validate(SCHEMAS[name], json.loads(output.text))


@pytest.fixture(scope="module")
def smollm2() -> Any:
    with KVShare("smollm2", embedder=None) as llm:
        yield llm
