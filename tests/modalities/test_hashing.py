"""Hashes of rows, and the memory of files."""

from __future__ import annotations

import numpy as np
import xxhash

from kvshare_mm.modalities.hashing import Seen, content_digest, row_hashes


def test_rows_are_hashed_one_by_one() -> None:
    rows = np.random.default_rng(0).integers(0, 256, (5, 3, 7), dtype=np.uint8)
    want = [xxhash.xxh3_64_intdigest(row.tobytes()) for row in rows]
    assert row_hashes(rows).tolist() == want
    assert row_hashes(rows[:, ::-1]).tolist() != want
    assert row_hashes(rows[::2]).tolist() == want[::2]  # a view with gaps


def test_facts_and_order_count() -> None:
    hashes = np.arange(3, dtype=np.uint64)
    digests = [
        content_digest(hashes, 1, 2),
        content_digest(hashes, 2, 1),
        content_digest(hashes, 12),
        content_digest(hashes[::-1].copy(), 1, 2),
    ]
    assert len(set(digests)) == 4
    assert all(len(d) == 32 for d in digests)


def test_the_least_recently_seen_is_forgotten() -> None:
    seen: Seen[int] = Seen(capacity=2)
    seen.put(b"a", "", 1)
    seen.put(b"b", "", 2)
    assert seen.get(b"a", "") == 1
    seen.put(b"c", "", 3)
    assert [seen.get(x, "") for x in (b"a", b"b", b"c")] == [1, None, 3]


def test_tenants_do_not_see_each_other() -> None:
    seen: Seen[int] = Seen()
    seen.put(b"a", "one", 1)
    assert seen.get(b"a", "two") is None
    assert seen.get(b"\0a", "") is None
