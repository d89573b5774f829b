"""Names of things that must not be taken for one another: media, tenants, settings.

Who sends requests chooses what is hashed here. Under a hash without a secret that was made to be
fast alone (xxh3), two different pictures with one hash can be written down, and one sender's KV
would answer another's question. 256 bits: finding two things with one name takes 2**128 tries.
"""

from __future__ import annotations

import hashlib

DIGEST_SIZE = 32
"""Bytes of a name."""


def identity(*parts: bytes) -> str:
    """The name, 64 hex digits, of `parts` written one after the other (blake2b, RFC 7693)."""
    digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def text_identity(text: str) -> str:
    """The name of a text, half surrogate pairs included: JSON can spell them."""
    return identity(text.encode("utf-8", "surrogatepass"))
