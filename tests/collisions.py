"""Different byte strings with one xxh3 hash, written down rather than searched for.

Of more than 240 bytes, xxh3 keeps eight sums, each over the 8-byte words at one place ("lane") of
its 64-byte stripes. A word w adds lo32(w ^ s) * hi32(w ^ s), where s is eight bytes of a secret
that everybody knows; w itself goes into another sum. If one half of a word is that of the secret,
the product is zero, whatever the other half is: so two words of a lane may exchange their other
halves, and no sum changes. Every 1024 bytes the sums are mixed, so both must lie between two such
places; the last 64 bytes are read twice and left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b8b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ecc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)

Half = slice


def exchangeable(length: int, usable: Callable[[bytes], bool]) -> Iterator[tuple[Half, ...]]:
    """Pairs of 4-byte places of a string whose contents may change places.

    Args:
        length: of the string, in bytes, more than 240.
        usable: whether the 4 bytes of the secret may stand beside such a place.

    Yields:
        The two places, the two beside them, and where in `SECRET` lies what those must hold.
    """
    for block in range(0, length - 64, 1024):
        for lane in range(8):
            taken: set[int] = set()
            for half in (0, 4):
                stripes = [
                    n
                    for n in range(16)
                    if n not in taken
                    and block + 64 * n + 64 <= length - 64
                    and usable(SECRET[8 * (n + lane) + half :][:4])
                ]
                for pair in zip(stripes[::2], stripes[1::2], strict=False):
                    taken.update(pair)
                    words = [block + 64 * n + 8 * lane for n in pair]
                    yield (
                        *(Half(w + 4 - half, w + 8 - half) for w in words),
                        *(Half(w + half, w + half + 4) for w in words),
                        *(Half(8 * (n + lane) + half, 8 * (n + lane) + half + 4) for n in pair),
                    )


def twins(
    content: bytes, usable: Callable[[bytes], bool], one: bytes, other: bytes
) -> tuple[bytes, bytes]:
    """Two strings with one xxh3_64 and one xxh3_128: where one has `one` the other has `other`.

    Args:
        content: what stands wherever nothing else must, more than 240 bytes.
        usable: which 4 bytes may stand in the strings.
        one, other: 4 bytes each.
    """
    a, b = bytearray(content), bytearray(content)
    for p, q, beside_p, beside_q, secret_p, secret_q in exchangeable(len(content), usable):
        for made, first, second in ((a, one, other), (b, other, one)):
            made[p], made[q] = first, second
            made[beside_p], made[beside_q] = SECRET[secret_p], SECRET[secret_q]
    return bytes(a), bytes(b)


def twin_texts() -> tuple[str, str]:
    """Two texts with one xxh3_128 of their UTF-8."""
    a, b = bytearray(b"x" * 1100), bytearray(b"x" * 1100)
    # Two of the secret's words have a half that may stand in UTF-8; the first after a leading byte.
    for made, first, second in ((a, b"1", b"2"), (b, b"2", b"1")):
        made[7 * 64 : 7 * 64 + 8] = first + b"xx\xc3" + SECRET[60:64]
        made[14 * 64 : 14 * 64 + 8] = second + b"xxx" + SECRET[116:120]
    return a.decode(), b.decode()
