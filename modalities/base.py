"""What every modality's adapter can do: turn its part of a message into a `MediaItem`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.stream import MediaItem, Modality


class ModalityAdapter(Protocol):
    """Reads the parts of one modality.

    Attributes:
        modality: of the items it makes.
        part_types: values of a part's ``type`` that it reads.
    """

    modality: Modality
    part_types: frozenset[str]

    def read(self, part: Mapping[str, Any], where: str, tenant: str) -> MediaItem:
        """The medium in a part of a message.

        Args:
            part: of one of `part_types`.
            where: the part, e.g. ``messages[0].content[1]``.
            tenant: whose request it is; what one tenant sent is never looked up for another.

        Raises:
            InvalidRequestError: it cannot be read; `field` names the part and the key in it.
        """


class Adapters:
    """The adapters of a model, by part type."""

    def __init__(self, adapters: Iterable[ModalityAdapter]) -> None:
        self._by_type = {kind: a for a in adapters for kind in a.part_types}

    @property
    def modalities(self) -> frozenset[Modality]:
        """What the model can see or hear."""
        return frozenset(a.modality for a in self._by_type.values())

    def read(self, part: Mapping[str, Any], where: str, tenant: str) -> MediaItem:
        """The medium in a part of any type; raises InvalidRequestError naming the part."""
        kind = part.get("type")
        adapter = self._by_type.get(kind) if isinstance(kind, str) else None
        if adapter is not None:
            return adapter.read(part, where, tenant)
        if isinstance(kind, str) and kind.startswith("video"):
            raise InvalidRequestError(
                f"{where} is a video, and video is not supported by this model", where
            )
        known = ", ".join(sorted({"text", *self._by_type}))
        raise InvalidRequestError(
            f"{where} is of type {kind!r}; this model takes parts of type {known}", where
        )
