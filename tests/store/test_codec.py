"""The file format: what is written comes back, and damage never does."""

from __future__ import annotations

import errno
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshare_mm.errors import KVUnavailableError
from kvshare_mm.node import Node, Piece, Span
from kvshare_mm.store import codec
from kvshare_mm.store.base import NodeKV, StoredNode
from kvshare_mm.store.codec import read_node, read_record, record_bytes, record_of, write_node
from kvshare_mm.store.media import as_node, features_of, is_media, media_id, media_namespace
from kvshare_mm.stream import MediaItem, Modality, Segment

from ..collisions import twin_texts

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)


@st.composite
def stored_nodes(draw) -> StoredNode:
    """Any node there can be: random owned spans and pieces, gaps between them, any bit pattern."""
    runs = draw(st.lists(st.tuples(st.integers(0, 5), st.sampled_from("opg")), max_size=12))
    own, pieces, position = [], [], 0
    for length, kind in runs:
        start, position = position, position + length
        if length and kind == "o":
            own.append(Span(start, position))
        elif length and kind == "p":
            owner = draw(st.text(max_size=8))
            pieces.append(Piece(owner, draw(st.integers(0, 2**40)), start, length))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    node = Node(
        node_id=draw(st.text(max_size=20)),
        namespace=draw(st.text(max_size=20)),
        align_keys=rng.integers(0, 2 ** draw(st.sampled_from([32, 64])), position, dtype=np.uint64),
        own=tuple(own),
        pieces=tuple(pieces),
        exact_len=draw(st.integers(0, position)),
        parent=draw(st.none() | st.text(max_size=8)),
        created_s=draw(st.floats(allow_nan=False)),
        risk=draw(st.floats(0, allow_nan=False)),
        attention=rng.random(draw(st.integers(0, position))) if draw(st.booleans()) else None,
        drift=np.append(rng.random(position), np.inf)[1:] if draw(st.booleans()) else None,
    )
    dtype = draw(st.sampled_from(DTYPES))
    layers, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))

    def tensor() -> torch.Tensor:
        shape = (layers, heads, node.num_owned, draw(st.integers(1, 5)))
        bits = {1: np.int8, 2: np.int16, 4: np.int32}[dtype.itemsize]
        most = 2 ** min(15, 8 * dtype.itemsize - 1)
        return torch.from_numpy(rng.integers(-most, most, shape, bits)).view(dtype)

    k, v = tensor(), tensor()
    dim = draw(st.none() | st.integers(1, 9))
    embedding = None if dim is None else rng.standard_normal(dim).astype(np.float32)
    return StoredNode(node, NodeKV(k, v), embedding)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("codec")


@given(stored=stored_nodes())
def test_round_trip(folder, assert_same, stored):
    path = folder / "node"
    assert write_node(path, stored) == path.stat().st_size

    assert_same(read_node(path), stored)
    node, embedding, kv_bytes = read_record(path)
    assert_same(StoredNode(node, stored.kv, embedding), stored)
    assert kv_bytes == stored.kv.num_bytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_safetensors_library_reads_the_file(tmp_path, make_stored, dtype):
    stored = make_stored(dtype=dtype, own=((1, 3), (5, 8)), embedding=np.arange(3, dtype="f4"))
    write_node(tmp_path / "node", stored)

    with safetensors.safe_open(tmp_path / "node", "pt") as file:
        for name, tensor in (("k", stored.kv.k), ("v", stored.kv.v)):
            found = file.get_tensor(name)
            assert found.dtype == dtype
            assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))
        assert file.get_tensor("own").tolist() == [[1, 3], [5, 8]]
        assert file.get_tensor("embedding").tolist() == [0, 1, 2]
        assert np.array_equal(file.get_tensor("keys").numpy(), stored.node.align_keys)
        assert file.metadata()["version"] == codec.FORMAT_VERSION


def test_views_and_numpy_integers_are_stored_by_value(tmp_path, assert_same, make_stored):
    whole = make_stored("a", 6, pieces=())
    spans = np.array([[0, 2], [3, 6]])
    node = Node(
        "b",
        "ns",
        np.arange(12, dtype=np.uint64)[::2],
        own=tuple(Span(*row) for row in spans),
        pieces=(Piece("x", np.int64(7), np.int64(2), np.int64(1)),),
        exact_len=np.int64(2),
    )
    view = whole.kv.k[:, :, :5], whole.kv.v.transpose(2, 3)[..., :5].transpose(2, 3)
    write_node(tmp_path / "node", StoredNode(node, NodeKV(*view)))

    got = read_node(tmp_path / "node")
    assert_same(got, StoredNode(node, NodeKV(*view)))
    assert got.kv.k.is_contiguous()
    assert got.kv.v.is_contiguous()
    assert got.node.align_keys.flags.writeable


@pytest.mark.parametrize(
    ("dtype", "own", "problem"),
    [(torch.float64, ((0, 8),), "float64"), (torch.float32, ((0, 7),), "7 owned positions")],
)
def test_kv_that_is_not_the_nodes_is_refused(tmp_path, make_stored, dtype, own, problem):
    node = make_stored(own=own).node
    with pytest.raises(ValueError, match=problem):
        write_node(tmp_path / "node", StoredNode(node, make_stored(dtype=dtype).kv))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def good(tmp_path_factory, make_stored) -> tuple[bytes, int, StoredNode]:
    """A small valid file, where its K and V begin, and what is in it."""
    stored = make_stored(
        num_tokens=6,
        own=((0, 2), (4, 5)),
        pieces=(Piece("donor", 3, 2, 2),),
        parent="donor",
        exact_len=2,
        dtype=torch.bfloat16,
        embedding=np.array([0.5, -1], dtype=np.float32),
    )
    path = tmp_path_factory.mktemp("good") / "node"
    size = write_node(path, stored)
    return path.read_bytes(), size - stored.kv.num_bytes, stored


def reason_of(read, path: Path) -> str:
    with pytest.raises(KVUnavailableError, match=str(path)) as caught:
        read(path)
    return caught.value.reason


@pytest.mark.parametrize("mask", [0xFF, 0x01, 0x20, 0x80])
def test_no_changed_byte_is_read(tmp_path, good, mask):
    content, kv_start, _ = good
    path = tmp_path / "node"
    path.write_bytes(content)
    with path.open("r+b", buffering=0) as file:
        for position, byte in enumerate(content):
            file.seek(position)
            file.write(bytes([byte ^ mask]))
            assert reason_of(read_node, path) == "corrupt", position
            if position < kv_start:
                assert reason_of(read_record, path) == "corrupt", position
            else:
                # Also shows that the record is read without K and V.
                assert read_record(path)[0].node_id == "a"
            file.seek(position)
            file.write(bytes([byte]))
    assert read_node(path).node.node_id == "a"


@given(data=st.data())
@settings(max_examples=300)
def test_random_damage_is_noticed_or_without_effect(folder, good, assert_same, data):
    content, _, stored = good
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        damaged[position] = data.draw(st.integers(0, 255))
    path = folder / "damaged"
    path.write_bytes(damaged)
    try:
        got = read_node(path)
    except KVUnavailableError as error:
        # The version may have become a later one.
        assert error.reason in ("corrupt", "newer_format")
        assert damaged != content
    else:
        # One blank of JSON may have become another.
        assert_same(got, stored)


def test_every_truncation_is_noticed(tmp_path, good):
    content, _, _ = good
    path = tmp_path / "node"
    path.write_bytes(content + b"\0")
    assert reason_of(read_node, path) == "corrupt"
    for length in reversed(range(len(content))):
        os.truncate(path, length)
        assert reason_of(read_node, path) == "corrupt", length
        assert reason_of(read_record, path) == "corrupt", length


def header_only(**offsets: list[Any]) -> bytes:
    header: dict[str, Any] = {name: {"data_offsets": span} for name, span in offsets.items()}
    metadata = dict.fromkeys(("kv_xxh3_128", "record", "record_xxh3_128"), "")
    metadata |= {"format": codec.FORMAT, "version": codec.FORMAT_VERSION}
    header["__metadata__"] = metadata
    content = json.dumps({**header, "own": {"data_offsets": [0, 0]}}).encode()
    return len(content).to_bytes(8, "little") + content


@pytest.mark.parametrize(
    "content",
    [
        b"not safetensors at all",
        b"\xff" * 64,
        (2**63).to_bytes(8, "little") + b"{}",
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
        (2).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        pickle.dumps({"k": 1}),
        safetensors.torch.save({"k": torch.zeros(2)}),
        safetensors.torch.save({"k": torch.zeros(2)}, {"format": "pt"}),
        header_only(keys=[-(10**9), 0]),
        header_only(keys=[0, -1]),
        header_only(keys=[0, 0]),
        header_only(keys=["0", 0]),
    ],
)
def test_other_files_are_not_nodes(tmp_path, content):
    path = tmp_path / "node"
    path.write_bytes(content)
    assert reason_of(read_node, path) == "corrupt"
    assert reason_of(read_record, path) == "corrupt"


def test_a_missing_file_is_evicted_and_an_unreadable_one_an_io_error(tmp_path):
    assert reason_of(read_node, tmp_path / "nothing") == "evicted"
    assert reason_of(read_record, tmp_path) == "io_error"


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_a_rename_or_flush_that_fails_leaves_nothing(tmp_path, make_stored, monkeypatch, name):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, name, refuse)
    with pytest.raises(KVUnavailableError, match="No space left") as caught:
        write_node(tmp_path / "node", make_stored(), durable=True)
    assert caught.value.reason == "io_error"
    assert list(tmp_path.iterdir()) == []


def test_files_are_for_their_owner_only(tmp_path, make_stored):
    write_node(tmp_path / "node", make_stored())
    assert (tmp_path / "node").stat().st_mode & 0o077 == 0


def test_durable_flushes_the_file_before_it_appears_and_then_the_folder(
    tmp_path, make_stored, monkeypatch
):
    calls = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(descriptor: int) -> None:
        calls.append("fsync folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "fsync")
        fsync(descriptor)

    def logged_replace(source: object, target: object) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    write_node(tmp_path / "node", make_stored(), durable=True)
    assert calls == ["fsync", "replace", "fsync folder"]
    calls.clear()
    write_node(tmp_path / "node", make_stored())
    assert calls == ["replace"]


def test_positions_and_media_come_back(tmp_path, make_stored):
    stored = make_stored("a", 6)
    media = (
        Segment(Modality.IMAGE, 1, 3, 2**64 - 1, "640x480, seen as 56x28"),
        Segment(Modality.AUDIO, 3, 6, 7, "0.12 s, 16000 Hz mono"),
    )
    positions = np.arange(18).reshape(3, 6)[:, ::-1]
    node = replace(stored.node, positions=positions, media=media)
    write_node(tmp_path / "a", StoredNode(node, stored.kv))
    back = read_node(tmp_path / "a").node
    assert back.positions is not None
    assert back.positions.dtype == np.int32
    assert back.positions.tolist() == positions.tolist()
    assert back.media == media
    assert read_record(tmp_path / "a")[0].media == media


def test_features_of_a_picture_are_a_node(tmp_path):
    item = MediaItem(Modality.IMAGE, "0123456789abcdef" * 2, 6, (2, 3), "56x84", dict)
    features = torch.randn(6, 16, dtype=torch.bfloat16)
    write_node(tmp_path / "a", as_node("ns", item, features))
    back = read_node(tmp_path / "a")
    assert torch.equal(features_of(back), features)
    assert is_media(back.node)
    assert back.node.namespace == media_namespace("ns")
    assert back.node.node_id == media_id("ns", item) != media_id("other", item)
    assert back.node.media[0].content_hash == 0x0123456789ABCDEF


def test_features_of_namespaces_made_to_collide_are_apart():
    item = MediaItem(Modality.IMAGE, "ab" * 32, 6, (2, 3), "56x84", dict)
    one, other = twin_texts()
    assert media_id(one, item) != media_id(other, item)


def test_eight_bits_come_back_as_they_were(tmp_path, make_stored, assert_same):
    stored = make_stored("a", 9, heads=3, k_dim=40, v_dim=8)
    stored = replace(stored, kv=NodeKV.packed(stored.kv.k, stored.kv.v))
    write_node(tmp_path / "node", stored)
    assert_same(read_node(tmp_path / "node"), stored)
    _, types, exponents = record_of(record_bytes(stored))
    assert types["k"].shape == (2, 3, 9, 68) and torch.equal(exponents, stored.kv.k_exponents)
