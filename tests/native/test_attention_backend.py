"""The engine through the Triton kernels, in the interpreter, gives what it gives through torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvshare_mm import KVShare, RequestOutput, SamplingParams
from kvshare_mm.config import KVShareConfig
from kvshare_mm.errors import ConfigError
from kvshare_mm.kernels import backend as backends
from kvshare_mm.kernels import dispatch
from kvshare_mm.kernels.backend import interpreting

pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(not interpreting(), reason="Triton compiles in this process")

_PROMPT = "Laboratory report. Patient number {}. Sodium 141 mmol/L, haemoglobin {} g/L. Sodium?"
_PARAMS = SamplingParams(max_tokens=4)


def _answers(llm: KVShare) -> list[Any]:
    """A donor, a prompt edited from it, and two at once."""
    donor = llm.generate(_PROMPT.format(48210, 148), _PARAMS)
    llm.flush()
    edited = llm.generate(_PROMPT.format(7, 151), _PARAMS)
    return [donor, edited, *llm.generate(["Sodium 141", "haemoglobin is low"], _PARAMS)]


def _kinds(output: RequestOutput) -> list[tuple[int, int, str]]:
    return [(span.start, span.end, span.kind) for span in output.provenance.spans]


def test_the_same_tokens_as_torch(
    open_llm: Callable[..., KVShare], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: dict[str, int] = {"attention": 0, "edit": 0}
    choose, edit = dispatch.choose, dispatch.edit_kv

    def counted_choose(*args: Any) -> Any:
        ran["attention"] += 1
        return choose(*args)

    def counted_edit(*args: Any) -> None:
        ran["edit"] += args[-1] == "triton"
        edit(*args)

    monkeypatch.setattr(dispatch, "choose", counted_choose)
    monkeypatch.setattr("kvshare_mm.reuse.editor.edit_kv", counted_edit)
    want = _answers(open_llm(attention_backend="torch", repair="window:2"))
    assert ran == {"attention": 0, "edit": 0}
    got = _answers(open_llm(attention_backend="triton", repair="window:2"))
    assert ran["attention"] > 0 and ran["edit"] > 0
    assert [x.token_ids for x in got] == [x.token_ids for x in want]
    assert [_kinds(x) for x in got] == [_kinds(x) for x in want]
    assert want[1].provenance.reused >= 16
    assert len(set(want[1].token_ids)) > 1, "an answer that never changes proves little"


def test_auto_is_torch_on_a_cpu() -> None:
    assert backends.resolve("auto", torch.device("cpu")) == "torch"


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match="attention_backend"):
        KVShareConfig.of(attention_backend="flash")
    with pytest.raises(backends.BackendError, match="none of auto, triton, torch"):
        backends.resolve("flash", torch.device("cpu"))


def test_triton_without_a_gpu_says_what_to_do(
    open_llm: Callable[..., KVShare], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1"):
        open_llm(attention_backend="triton")


def test_without_triton_says_what_to_do(
    open_llm: Callable[..., KVShare], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_triton_version", lambda: (3, 1))
    with pytest.raises(ConfigError, match=r"pip install 'triton>=3\.4'"):
        open_llm(attention_backend="triton")
    assert backends.resolve("auto", torch.device("cuda")) == "torch"
