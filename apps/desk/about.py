"""Who answers, what it knows and what it cannot know, in words for a visitor."""

from __future__ import annotations

from kvshare_mm.apps.desk.endpoint import Endpoint
from kvshare_mm.apps.desk.engine import Engine
from kvshare_mm.llm import KVShare
from kvshare_mm.stream import Modality

_MODELS = {
    "smollm2": (
        "SmolLM2 answers, with 135 million parameters. What it can know:",
        "It can find what the letter and the shop's rules say: an order number, a fee, a number of "
        "days. It cannot reckon, knows next to nothing of the world, and makes things up where the "
        "rules are silent.",
    ),
    "tiny-vl": (
        "tiny-vl answers, with 3 million parameters. What it can know:",
        "It was trained on drawings of six products: phone, radio, camera, kettle, lamp, clock. It "
        "knows their kind, colour, cracks, buttons and label, and the shop's policy. "
        "Anything else, a real photo or another question, gets one of the answers that it knows.",
    ),
    "tiny-audio": (
        "tiny-audio answers, with one million parameters. What it can know:",
        "It understands sixteen spoken words: the digits, yes, no, help, stop, refund, broken. "
        "Anything else, a sentence or a written question, gets one of the answers that it knows.",
    ),
}
_SHOWN = "Watch what is computed, not how clever it is: a larger model shares in the same way."
_NO_CLIP = (
    "Pictures that look alike are shown where a CLIP model is loaded: "
    "--media-embedder tiny-clip, a folder, or ARCHITECTURE/WEIGHTS of open_clip."
)


def about(llm: Engine) -> list[str]:
    """Paragraphs about an engine, the first of one line."""
    if isinstance(llm, Endpoint):
        return [
            f"{llm.name} answers, at an endpoint.",
            "Times are what the desk sees, the way there and back with them. The prompt's tokens, "
            "the tree of stored requests and pictures that look alike are the endpoint's own.",
        ]
    assert isinstance(llm, KVShare)
    model = llm.config.model
    told = [*_MODELS[model], _SHOWN] if model in _MODELS else [f"{model} answers."]
    if Modality.IMAGE in llm.modalities and llm.config.media_embedder is None:
        told.append(_NO_CLIP)
    return told
