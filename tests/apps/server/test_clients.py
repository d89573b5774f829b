"""Clients that others wrote, against a server with a trained model: chats, streams, forms, tools.

What they get is always valid; whether it makes sense is the small model's matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, ConfigDict, Field

from kvshare_mm import KVShare

from .conftest import Running, serving

pytestmark = pytest.mark.e2e


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=1, le=9)


class Dog(BaseModel):
    kind: Literal["dog"]
    good: bool


class Shop(BaseModel):
    """A shop for pets."""

    name: str = Field(max_length=12)
    open: bool
    best: Cat | Dog
    note: Literal["new", "old"] | None = None


class Day(BaseModel):
    """Of a week."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["Monday", "Sunday"]


class GetWeather(BaseModel):
    """The current weather of a city."""

    city: str = Field(max_length=16)
    unit: Literal["C", "F"]


_QUESTION = "Use the tool: what is the weather in Paris?"
_SMALL: dict[str, Any] = {"temperature": 0, "max_tokens": 200}


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with serving(lambda: KVShare("smollm2"), model_name="smollm2") as running:
        yield running


def test_openai_parses_models_of_pydantic(served: Running) -> None:
    parse = served.client().chat.completions.parse
    asked: Any = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "A shop."}],
        **_SMALL,
    }
    [choice] = parse(**asked, response_format=Shop).choices
    assert isinstance(choice.message.parsed, Shop) and choice.finish_reason == "stop"
    tools = [openai.pydantic_function_tool(GetWeather)]
    [choice] = parse(**asked, tools=tools, tool_choice="required").choices
    [call, *_] = choice.message.tool_calls
    assert isinstance(call.function.parsed_arguments, GetWeather)
    with served.client().chat.completions.stream(**asked, response_format=Shop) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Shop)


@pytest.mark.parametrize("stream", [False, True])
def test_openai_goes_round_with_results(served: Running, stream: bool) -> None:
    client = served.client()
    messages: list[Any] = [{"role": "user", "content": _QUESTION}]
    asked: Any = {
        "model": "smollm2",
        "tools": [openai.pydantic_function_tool(GetWeather)],
        **_SMALL,
    }
    one: Any = {**asked, "tool_choice": "required", "parallel_tool_calls": False}
    if stream:
        with client.chat.completions.stream(messages=messages, **one) as events:
            answer: Any = events.get_final_completion()
    else:
        answer = client.chat.completions.create(messages=messages, **one)
    message = answer.choices[0].message
    [call] = message.tool_calls
    GetWeather.model_validate_json(call.function.arguments)
    told = message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"})
    result = {"role": "tool", "tool_call_id": call.id, "content": "18 C and sunny"}
    reply = client.chat.completions.create(messages=[*messages, told, result], **asked)
    assert reply.choices[0].message.content or reply.choices[0].message.tool_calls
    assert reply.usage.prompt_tokens_details.cached_tokens > 100  # tools, question and the call


@pytest.mark.parametrize("stream", [False, True])
def test_openai_responses(served: Running, stream: bool) -> None:
    """Text, a schema, and there and back with a tool."""
    responses = served.client().responses
    asked: Any = {"model": "smollm2", "temperature": 0, "max_output_tokens": 200}

    def answer(**fields: Any) -> Any:
        if not stream:
            return responses.parse(**asked, **fields)
        with responses.stream(**asked, **fields) as events:
            return events.get_final_response()

    said = answer(input="Say hello.", instructions="Be brief.")
    assert said.output_text and said.status == "completed"
    assert said.usage.output_tokens < 200
    assert isinstance(answer(input="A shop.", text_format=Shop).output_parsed, Shop)

    items: list[Any] = [{"role": "user", "content": _QUESTION}]
    tools: Any = [
        {
            "type": "function",
            "name": "GetWeather",
            "parameters": GetWeather.model_json_schema(),
            "strict": True,
        }
    ]
    one: Any = {"tool_choice": "required", "parallel_tool_calls": False}
    [call] = answer(input=items, tools=tools, **one).output
    GetWeather.model_validate_json(call.arguments)
    assert GetWeather.model_validate(call.parsed_arguments)
    told = call.model_dump(exclude={"parsed_arguments"}, exclude_none=True)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "18 C and sunny"}
    reply = answer(input=[*items, told, result], tools=tools)
    assert reply.output[0].type in ("message", "function_call")
    assert reply.usage.input_tokens_details.cached_tokens > 100  # tools, question and the call


def test_langchain(served: Running) -> None:
    model = ChatOpenAI(
        base_url=f"{served.url}/v1", api_key="none", model="smollm2", temperature=0,
        max_completion_tokens=200,
    )  # type: ignore[call-arg]  # fmt: skip
    said = model.invoke("Say hello.").content
    assert "".join(str(chunk.content) for chunk in model.stream("Say hello.")) == said
    for method in ("json_schema", "function_calling"):
        made = model.with_structured_output(Shop, method=method).invoke("A shop.")
        assert isinstance(made, Shop), method
    newer = model.model_copy(update={"use_responses_api": True})
    assert newer.invoke("Say hello.").text == said
    assert "".join(chunk.text for chunk in newer.stream("Say hello.")) == said
    bound = model.bind_tools([GetWeather], tool_choice="any", parallel_tool_calls=False)
    answer = bound.invoke(_QUESTION)
    [call] = answer.tool_calls
    GetWeather.model_validate(call["args"])
    streamed: Any = None
    for chunk in bound.stream(_QUESTION):
        streamed = chunk if streamed is None else streamed + chunk
    assert [each["args"] for each in streamed.tool_calls] == [call["args"]]
    result = ToolMessage("18 C", tool_call_id=call["id"])
    again = model.bind_tools([GetWeather]).invoke([HumanMessage(_QUESTION), answer, result])
    assert again.content or again.tool_calls
    embeddings = OpenAIEmbeddings(
        base_url=f"{served.url}/v1", api_key="none", model="smollm2",
        check_embedding_ctx_length=False,
    )  # type: ignore[call-arg]  # fmt: skip
    assert len(embeddings.embed_query("hello")) == 384


def test_llm(served: Running, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simon Willison's: models of OpenAI's kind come from a file."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    monkeypatch.setenv("LLM_LOAD_PLUGINS", "")  # the model's own package is one, without llama.cpp
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: small\n  model_name: smollm2\n  api_base: {served.url}/v1\n"
        "  supports_schema: true\n  supports_tools: true\n"
    )
    import llm

    model = llm.get_model("small")
    model.key = "none"
    said = model.prompt("Say hello.", stream=False, temperature=0, max_tokens=20).text()
    streamed = "".join(model.prompt("Say hello.", stream=True, temperature=0, max_tokens=20))
    assert streamed == said != ""
    text = model.prompt("A shop.", schema=Day, stream=False, **_SMALL).text()
    Day.model_validate_json(text)

    def now() -> str:
        """The time."""
        return "noon"

    for stream in (False, True):
        chain = model.chain("Say hello.", tools=[now], stream=stream, options=_SMALL)
        assert chain.text()


def test_litellm(served: Running) -> None:
    """Its way to servers of OpenAI's kind."""
    import litellm

    asked: dict[str, Any] = {
        "model": "hosted_vllm/smollm2", "api_base": f"{served.url}/v1", "api_key": "none", **_SMALL,
    }  # fmt: skip
    hello = [{"role": "user", "content": "Say hello."}]
    said = litellm.completion(messages=hello, **asked).choices[0].message.content
    chunks = litellm.completion(messages=hello, stream=True, **asked)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said != ""
    made = litellm.completion(
        messages=[{"role": "user", "content": "A shop."}], response_format=Shop, **asked
    )
    Shop.model_validate_json(made.choices[0].message.content)
    called = litellm.completion(
        messages=[{"role": "user", "content": _QUESTION}], tool_choice="required",
        tools=[openai.pydantic_function_tool(GetWeather)], parallel_tool_calls=False, **asked,
    )  # fmt: skip
    [call] = called.choices[0].message.tool_calls
    GetWeather.model_validate_json(call.function.arguments)


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"])
def test_instructor(served: Running, mode: str) -> None:
    """Not its modes JSON and MD_JSON: those ask for an object and hope; no schema is sent."""
    import instructor

    client = instructor.from_openai(served.client(), mode=instructor.Mode[mode])
    made = client.chat.completions.create(
        model="smollm2", messages=[{"role": "user", "content": "A day."}], response_model=Day,
        max_retries=0, **_SMALL,
    )  # fmt: skip
    assert isinstance(made, Day)
