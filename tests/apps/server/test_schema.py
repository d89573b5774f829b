"""Bodies as clients really send them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from kvshare_mm.apps.server import schema

_NEEDED: dict[type[BaseModel], dict[str, Any]] = {
    schema.ChatBody: {"messages": [{"role": "user", "content": "x"}]},
    schema.ResponsesBody: {"input": "x"},
    schema.TextField: {},
    schema.CompletionBody: {"prompt": "x"},
    schema.TokenizeBody: {},
    schema.EmbeddingsBody: {"input": "x"},
    schema.LookupBody: {},
    schema.ClearBody: {},
    schema.StreamOptions: {},
    schema.KVShareField: {},
}
_OPTIONAL = [
    pytest.param(model, name, id=f"{model.__name__}.{name}")
    for model in _NEEDED
    for name, field in model.model_fields.items()
    if not field.is_required()
]


@pytest.mark.parametrize(("model", "name"), _OPTIONAL)
def test_null_is_as_if_it_were_not_there(model: type[BaseModel], name: str) -> None:
    needed = _NEEDED[model]
    assert getattr(model(**needed, **{name: None}), name) == getattr(model(**needed), name)
    described = model.model_json_schema()["properties"][name]
    assert {"type": "null"} in described["anyOf"]
