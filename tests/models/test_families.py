"""Multimodal families: our ids, positions, features and KV are those of transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2_5OmniConfig
from transformers.modeling_outputs import CausalLMOutput

from kvshare_mm.errors import ModelLoadError
from kvshare_mm.models.loader import load_model
from kvshare_mm.native.encoder import MediaEncoder
from kvshare_mm.native.inputs import MediaInputs
from kvshare_mm.native.plain import PlainRunner
from kvshare_mm.native.slots import SlotRunner
from kvshare_mm.stream import Modality, SegmentStream

from ..media_models import FAMILIES, FILMS, HEARS, SEES, tokenizer
from ..media_oracle import Oracle
from ..modalities.media import RATE, film, picture, tone

ATOL = 1e-4
FLAT = ("qwen2_audio", "internvl", "gemma3")  # positions have one axis
MAX_LEN = 400


def see(width: int = 112, height: int = 84, seed: int = 0) -> dict[str, Any]:
    return {"type": "image", "image": picture(width, height, seed)}


def hear(seconds: float = 0.8, hertz: float = 440) -> dict[str, Any]:
    return {"type": "audio", "audio": (tone(seconds, hertz), RATE)}


def watch(frames: int, fps: float | None = 2.0, *size: int) -> dict[str, Any]:
    return {"type": "video", "video": film(frames, *size), "fps": fps}


def say(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


SYSTEM = {"role": "system", "content": "Be brief."}
PICTURES: dict[str, list[dict[str, Any]]] = {
    "first": [user(see(), say("What is it?"))],
    "last": [SYSTEM, user(say("What is this?"), see())],
    "between": [SYSTEM, user(say("Here: "), see(200, 60), say(" What is it?"))],
    "alone": [user(see(60, 180))],
    "two of other sizes": [user(see(112, 84), say(" and "), see(56, 140, 1), say("?"))],
    "two without a word": [user(see(112, 112), see(84, 56, 1), say("?"))],
    "the same twice": [user(see(), see(), say("The same?"))],
    "over turns": [
        user(see(84, 84), say("What?")),
        {"role": "assistant", "content": "A lamp."},
        user(say("And"), see(168, 28, 2), say("?")),
    ],
    "none": [SYSTEM, {"role": "user", "content": "Hello?"}],
}
SOUNDS: dict[str, list[dict[str, Any]]] = {
    "sound first": [user(hear(), say("What is it?"))],
    "sound last": [SYSTEM, user(say("What is this?"), hear(1.3))],
    "two sounds": [user(hear(0.4), say(" or "), hear(2.0, 700), say("?"))],
    "sounds over turns": [
        user(hear(0.5), say("What?")),
        {"role": "assistant", "content": "A bell."},
        user(hear(1.1, 300), say("And?")),
    ],
}
BOTH: dict[str, list[dict[str, Any]]] = {
    "picture and sound": [user(see(), say("and"), hear(), say("?"))],
    "sound and picture": [user(hear(), see(140, 56), say("?"))],
    "much of both": [SYSTEM, user(see(), hear(0.3), hear(0.6, 300), say("?"), see(56, 56, 3))],
}
VIDEOS: dict[str, list[dict[str, Any]]] = {
    "a video": [user(watch(8), say("What is it?"))],
    "an odd last frame": [SYSTEM, user(say("What is this?"), watch(5))],
    "one frame": [user(watch(1), say("?"))],
    "of no known speed": [user(say("See "), watch(10, None), say("?"))],
    "slow": [user(say("See "), watch(8, 0.3), say(" and "), see(56, 56))],
    "of a fraction a second": [user(watch(10, 4.7, 56, 84), say("?"))],
    "two videos and a picture": [
        user(watch(4), say(" or "), see(56, 140, 1), watch(6, 1.0, 56, 56), say("?"))
    ],
    "videos over turns": [
        user(watch(3, 24), say("What?")),
        {"role": "assistant", "content": "A lamp."},
        user(watch(2, 24, 168, 28), say("?")),
    ],
}
CASES = [
    *((family, name) for family in FILMS for name in VIDEOS),
    *((family, name) for family in SEES for name in PICTURES),
    *((family, name) for family in HEARS for name in SOUNDS),
    *(("qwen2_5_omni_thinker", name) for name in BOTH),
]
MESSAGES = {**PICTURES, **SOUNDS, **BOTH, **VIDEOS}


def encoded(oracle: Oracle, stream: SegmentStream) -> MediaInputs:
    """Features of everything."""
    encoder = MediaEncoder(oracle.loaded, None)
    features = tuple(
        (segment.start, encoder.features(item, "ns")[0])
        for segment, item in zip(stream.media, stream.items, strict=True)
    )
    return MediaInputs(stream.positions, features)


@pytest.mark.parametrize(("family", "name"), [c for c in CASES if c[0] not in FLAT])
def test_positions_are_the_models(oracles: Callable[[str], Oracle], family: str, name: str) -> None:
    oracle = oracles(family)
    stream, inputs = oracle.stream(MESSAGES[name]), oracle.inputs(MESSAGES[name])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if family == "qwen2_5_omni_thinker":
        heard = inputs.get("feature_attention_mask")
        want, delta = oracle.reference.get_rope_index(
            ids,
            inputs.get("image_grid_thw"),
            None,
            mask,
            audio_seqlens=None if heard is None else heard.sum(-1),
        )
    else:
        want, delta = oracle.reference.model.get_rope_index(
            ids,
            inputs["mm_token_type_ids"],
            inputs.get("image_grid_thw"),
            inputs.get("video_grid_thw"),
            attention_mask=mask,
            **{k: inputs[k] for k in ("second_per_grid_ts",) if k in inputs},
        )
    got = stream.positions
    if got is None:
        got = np.broadcast_to(np.arange(len(stream)), (3, len(stream)))
    assert got.tolist() == want[:, 0].tolist()
    # generate() goes on from the last position, be something before it later.
    assert stream.rope_delta == int(want[0, 0, -1]) + 1 - len(stream)
    late = int(want.max()) > int(want[0, 0, -1])
    assert late or stream.rope_delta == int(delta.reshape(-1)[0])
    assert late == (family == "qwen2_5_vl" and name == "slow")
    assert (stream.positions is None) == (not any(item.grid for item in stream.items))


@pytest.mark.parametrize(("family", "name"), CASES)
def test_ids_logits_and_kv_are_the_models(
    oracles: Callable[[str], Oracle], family: str, name: str
) -> None:
    oracle = oracles(family)
    stream, inputs = oracle.stream(MESSAGES[name]), oracle.inputs(MESSAGES[name])
    assert stream.token_ids.tolist() == inputs["input_ids"][0].tolist()
    full = oracle.full(inputs)
    runner = SlotRunner(oracle.loaded, 1, MAX_LEN, 4096)
    n = len(stream)
    logits = runner.prefill(0, stream.token_ids, np.arange(n), media=encoded(oracle, stream))
    assert torch.allclose(logits, full.logits[-1], atol=ATOL, rtol=0)
    for got, want in zip(runner.slot_kv(0), (full.k, full.v), strict=True):
        assert torch.allclose(got[:, :, :n], want, atol=ATOL, rtol=0)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("family", "name"), CASES)
def test_greedy_answers_are_the_models(
    oracles: Callable[[str], Oracle], family: str, name: str, plain: bool
) -> None:
    oracle = oracles(family)
    if plain and oracle.loaded.family is not None and oracle.loaded.family.both_ways:
        pytest.skip("where PartialAttention does not run, it is served with text alone")
    stream = oracle.stream(MESSAGES[name])
    runner: Any = (
        PlainRunner(oracle.loaded, 1) if plain else SlotRunner(oracle.loaded, 1, MAX_LEN, 4096)
    )
    if plain:
        oracle.loaded.model.set_attn_implementation("sdpa")
    try:
        n = len(stream)
        logits = runner.prefill(0, stream.token_ids, np.arange(n), media=encoded(oracle, stream))
        answer = [int(logits.argmax())]
        while len(answer) < 8:
            at = n + len(answer) - 1
            answer.append(
                int(runner.decode([0], [answer[-1]], [at], [stream.rope_delta])[0].argmax())
            )
    finally:
        if plain:
            oracle.loaded.model.set_attn_implementation("kvshare_torch")
    assert answer == oracle.greedy(oracle.inputs(MESSAGES[name]), 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_depend_on_what_is_seen_and_heard(
    oracles: Callable[[str], Oracle], family: str
) -> None:
    """Or all of the above would hold for a model that is blind and deaf."""
    oracle = oracles(family)
    part = {"qwen2_audio": hear}.get(family, see)
    other = hear(hertz=2000) if family == "qwen2_audio" else see(seed=9)
    one, two = (oracle.full(oracle.inputs([user(p, say("?"))])) for p in (part(), other))
    assert (one.logits[-1] - two.logits[-1]).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_served_with_reuse(oracles: Callable[[str], Oracle], family: str) -> None:
    loaded = oracles(family).loaded
    assert loaded.unsupported is None
    assert loaded.family is not None
    assert set(loaded.family.placeholders) == {
        modality
        for modality, families in (
            (Modality.IMAGE, SEES),
            (Modality.AUDIO, HEARS),
            (Modality.VIDEO, FILMS),
        )
        if family in families
    }
    assert loaded.family.mrope == (family not in FLAT)


@pytest.mark.parametrize("family", FILMS)
def test_each_picture_of_a_video_is_encoded_alone(
    oracles: Callable[[str], Oracle], family: str
) -> None:
    """What the model makes of a whole video at once."""
    oracle = oracles(family)
    messages = VIDEOS["two videos and a picture"]
    media = encoded(oracle, oracle.stream(messages)).features
    inputs = oracle.inputs(messages)
    with torch.inference_mode():
        want = oracle.reference.get_video_features(
            inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True
        ).pooler_output
    got = torch.cat([features for _, features in (*media[:2], *media[3:])])
    assert torch.allclose(got, torch.cat(tuple(want)), atol=ATOL, rtol=0)


def test_which_models_move_keys_on_each_axis(oracles: Callable[[str], Oracle]) -> None:
    apart = {}
    for family in ("qwen2_vl", "qwen3_vl", "internvl"):
        rotary = oracles(family).loaded.rotary
        assert rotary is not None
        apart[family] = rotary.axes
    assert apart == {"qwen2_vl": (0, 0, 1, 1, 1, 2, 2, 2), "qwen3_vl": None, "internvl": None}


def test_decoding_in_a_batch_with_other_positions(oracles: Callable[[str], Oracle]) -> None:
    """Each request's answer goes on from its own last position."""
    oracle = oracles("qwen2_5_vl")
    names = ["first", "none", "two of other sizes"]
    runner = SlotRunner(oracle.loaded, 3, MAX_LEN, 4096)
    streams = [oracle.stream(MESSAGES[name]) for name in names]
    assert len({stream.rope_delta for stream in streams}) == 3
    answers = []
    for slot, stream in enumerate(streams):
        media = encoded(oracle, stream)
        logits = runner.prefill(slot, stream.token_ids, np.arange(len(stream)), media=media)
        answers.append([int(logits.argmax())])
    for step in range(7):
        logits = runner.decode(
            [0, 1, 2],
            [answer[-1] for answer in answers],
            [len(stream) + step for stream in streams],
            [stream.rope_delta for stream in streams],
        )
        for answer, row in zip(answers, logits, strict=True):
            answer.append(int(row.argmax()))
    for name, answer in zip(names, answers, strict=True):
        assert answer == oracle.greedy(oracle.inputs(MESSAGES[name]), 8)


def test_the_thinker_is_taken_out_of_a_whole_omni(
    media_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """As it is published: with a talker, and the thinker's weights under a name of their own."""
    thinker = media_folder("qwen2_5_omni_thinker")
    whole = tmp_path / "omni"
    shutil.copytree(thinker, whole)
    weights = load_file(thinker / "model.safetensors")
    named = {f"thinker.{name}": weight for name, weight in weights.items()}
    save_file({**named, "talker.weight": torch.zeros(3)}, whole / "model.safetensors")
    config = Qwen2_5OmniConfig(thinker_config=AutoConfig.from_pretrained(thinker).to_dict())
    config.save_pretrained(whole)
    one, other = (load_model(str(path), dtype="float32") for path in (whole, thinker))
    assert one.unsupported is None
    assert one.family is not None and other.family is not None
    assert one.family.placeholders == other.family.placeholders
    for name, weight in other.model.state_dict().items():
        assert torch.equal(one.model.state_dict()[name], weight), name


_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
_GEMMA4 = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4}
        for kind in ("sliding_attention", "full_attention")
    },
    "sliding_window": 8,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "final_logit_softcapping": 0.1,
}
_EYES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "image_size": 56}


@pytest.mark.parametrize(
    ("kind", "text", "vision"),
    [
        ("mistral3", {"model_type": "mistral"}, {"model_type": "pixtral"}),
        ("llava_onevision", {"model_type": "qwen2"}, {"model_type": "siglip_vision_model"}),
        ("smolvlm", {"model_type": "llama"}, {}),
        # What becomes of its logits is done by the model around its language part.
        ("gemma4", _GEMMA4, {"num_key_value_heads": 2, "head_dim": 16}),
    ],
)
def test_of_other_multimodal_models_text_is_served(
    kind: str, text: dict[str, Any], vision: dict[str, Any], tmp_path: Path
) -> None:
    tok = tokenizer()
    config = AutoConfig.for_model(
        kind,
        text_config={**_SMALL, "vocab_size": len(tok), **text},
        vision_config={**_EYES, "num_attention_heads": 2, "patch_size": 14, **vision},
    )
    reference = AutoModelForImageTextToText.from_config(config).eval()
    for saved in (reference, tok):
        saved.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype="float32")
    assert (loaded.unsupported, loaded.family, loaded.processor) == (None, None, None)
    ids = np.random.default_rng(0).integers(3, 200, 40)
    with torch.inference_mode():
        want = reference(input_ids=torch.from_numpy(ids)[None]).logits[0, -1]
    got = SlotRunner(loaded, 1, MAX_LEN, 16).prefill(0, ids, np.arange(40))
    assert torch.allclose(got, want, atol=ATOL)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"is_encoder_decoder": True}, "not known here"),
        ({"lm_head": None}, "not known here"),
        ({"forward": lambda **_: CausalLMOutput(logits=torch.ones(1, 7, 128))}, "does not answer"),
    ],
)
def test_a_language_part_that_is_not_the_whole_is_refused(
    changed: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {**_SMALL, "vocab_size": 128}
    eyes = {**_EYES, "num_attention_heads": 2, "patch_size": 14}
    config = AutoConfig.for_model(
        "llava_onevision",
        text_config={**sizes, "model_type": "qwen2"},
        vision_config={**eyes, "model_type": "siglip_vision_model"},
    )
    model = AutoModelForImageTextToText.from_config(config)
    config.save_pretrained(tmp_path)
    for name, value in changed.items():
        setattr(config if name == "is_encoder_decoder" else model, name, value)
    monkeypatch.setattr(
        AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: (model, {})
    )
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: config)
    with pytest.raises(ModelLoadError, match=words):
        load_model(str(tmp_path), dtype="float32")


def test_a_multimodal_model_without_its_processor(
    media_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(media_folder("qwen2_5_vl"), bare)
    for file in bare.iterdir():
        if "processor" in file.name or "token" in file.name:
            file.unlink()
    with pytest.raises(ModelLoadError, match="Could not load the model"):
        load_model(str(bare))
