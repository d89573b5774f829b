"""The disk tier when processes die, and when several share its folder."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch

from kvshare_mm.errors import KVUnavailableError
from kvshare_mm.node import Node, Span
from kvshare_mm.store.base import NodeKV, StoredNode
from kvshare_mm.store.codec import TEMP_SUFFIX
from kvshare_mm.store.disk import DiskTier
from kvshare_mm.store.host import ram_bytes

from ..helpers import in_threads

BUDGET = 1 << 24


def temp_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{TEMP_SUFFIX}"))


def test_opening_while_another_process_writes_does_not_lose_the_write(
    tmp_path, make_stored, assert_same, monkeypatch
):
    tier = DiskTier(tmp_path, BUDGET)
    stored = make_stored("a")
    replace, openings = os.replace, []

    def open_elsewhere_then_replace(source: object, target: object) -> None:
        if not openings:
            openings.append(DiskTier(tmp_path, BUDGET))
            assert temp_files(tmp_path) == []
        replace(source, target)

    monkeypatch.setattr(os, "replace", open_elsewhere_then_replace)
    assert tier.put(stored) == []
    assert len(openings) == 1
    assert_same(tier.get("a"), stored)


def write_until_killed(folder: Path, progress: Connection, die_before_rename: int) -> None:
    """Write 8 nodes over and over: a killed replacement must leave the version before it."""
    replace, renames = os.replace, itertools.count(1)

    def maybe_die(source: object, target: object) -> None:
        if next(renames) == die_before_rename:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = maybe_die
    tier = DiskTier(folder, 1 << 30)
    for i in itertools.count(1):
        node = Node(str(i % 8), "ns", np.full(1000, i, np.uint64), (Span(0, 1000),))
        kv = torch.full((4, 2, 1000, 32), float(i))
        tier.put(StoredNode(node, NodeKV(kv, kv + 1)))
        progress.send(i)


@pytest.mark.parametrize("die_before_rename", [0, 20])
def test_a_writer_killed_in_the_middle_leaves_only_whole_nodes(tmp_path, die_before_rename):
    # Forked, because a new interpreter takes seconds to import torch.
    fork = multiprocessing.get_context("fork")
    progress, sender = fork.Pipe(duplex=False)
    writer = fork.Process(target=write_until_killed, args=(tmp_path, sender, die_before_rename))
    writer.start()
    sender.close()
    written = 0
    with contextlib.suppress(EOFError):
        while True:
            written = progress.recv()
            if written == 25:
                writer.kill()  # wherever it is in its next node
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    if die_before_rename:
        assert written == die_before_rename - 1
        assert len(temp_files(tmp_path)) == 1
    else:
        assert written >= 25

    tier = DiskTier(tmp_path, 1 << 30)
    assert temp_files(tmp_path) == []
    assert tier.num_corrupt == 0
    assert sorted(tier) == [str(i) for i in range(8)]
    for node_id in tier:
        stored = tier.get(node_id)
        version = int(stored.node.align_keys[0])
        assert version > written - 8
        assert version % 8 == int(node_id)
        assert (stored.kv.k == version).all()
        assert (stored.kv.v == version + 1).all()


def test_two_tiers_on_one_folder_never_read_anything_wrong(tmp_path, make_stored, assert_same):
    nodes = {str(i): make_stored(str(i), 20 + i) for i in range(12)}
    budget = 5 * ram_bytes(nodes["11"])
    tiers = [DiskTier(tmp_path, budget), DiskTier(tmp_path, budget)]
    hits = [0, 0]

    def work(seed: int) -> None:
        rng = random.Random(seed)
        tier = tiers[seed % 2]
        for _ in range(150):
            node_id = str(rng.randrange(12))
            action = rng.choice(["put", "put", "get", "get", "get", "delete", "records"])
            if action == "put":
                tier.put(nodes[node_id])
            elif action == "get":
                try:
                    assert_same(tier.get(node_id), nodes[node_id])
                    hits[seed % 2] += 1
                except KVUnavailableError as error:
                    assert error.reason == "evicted"
            elif action == "delete":
                tier.delete(node_id)
            else:
                for node, _ in tier.records():
                    assert np.array_equal(node.align_keys, nodes[node.node_id].node.align_keys)

    in_threads(work, range(4))
    assert min(hits) > 0
    assert [tier.num_corrupt for tier in tiers] == [0, 0]
    assert temp_files(tmp_path) == []
    for tier in tiers:
        assert tier.num_bytes <= budget
    for node_id in DiskTier(tmp_path, BUDGET):
        assert_same(DiskTier(tmp_path, BUDGET).get(node_id), nodes[node_id])
