"""File format of one stored node: a safetensors file that checks itself.

Tensors: ``keys`` (uint64 or uint32 ``[N]``), ``own`` (int64 ``[n, 2]``), ``k``, ``v`` and, where
there are any, ``positions`` (int32 ``[3, N]``), ``attention`` and ``drift`` (float32 ``[P]``),
``reads`` (int32 ``[R, 2]``), ``embedding`` (float32 ``[dim]``) and ``k_exponents`` (int8, see
`NodeKV`). The string metadata holds the rest of the node as JSON and two xxh3-128 checksums: one
over the record (all but K and V), so that a tree can be rebuilt without reading gigabytes of KV,
and one over K and V.

The safetensors library opens these files, but does not read or write them here: its `safe_open`
maps the file, and a bad sector, or another process that truncates it, then kills us with SIGBUS
where `read` raises OSError; its `save_file`, killed, leaves files whose names do not say they are
ours to remove.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from kvshare_mm.errors import KVUnavailableError
from kvshare_mm.node import Node, Piece, Span
from kvshare_mm.store.base import NodeKV, StoredNode
from kvshare_mm.stream import Modality, Segment

FORMAT = "kvshare_mm.node"
FORMAT_VERSION = "5"  # odd: a flipped last bit makes it an older one, not a newer one
TEMP_SUFFIX = ".tmp"

_KV_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I8": torch.int8,  # of `q8`
    "F8_E4M3": torch.float8_e4m3fn,  # vLLM's
}
_KV_DTYPE_NAMES = {dtype: name for name, dtype in _KV_DTYPES.items()}
_KV_NAMES = ("k", "v")
_RECORD_TENSORS = (
    "keys",
    "own",
    "positions",
    "attention",
    "drift",
    "reads",
    "embedding",
    "k_exponents",
)
_ARRAY_DTYPES = {
    "U64": "<u8",
    "U32": "<u4",
    "I64": "<i8",
    "I32": "<i4",
    "F32": "<f4",
    "I8": "|i1",
}
_ARRAY_DTYPE_NAMES = {dtype: name for name, dtype in _ARRAY_DTYPES.items()}

_Layout = dict[str, dict[str, Any]]  # tensor name -> its entry in a safetensors header


class KVType(NamedTuple):
    """Shape ``[layers, kv_heads, owned positions, head_dim]`` and dtype of a node's K or V."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Record:
    """A verified record and where the K/V bytes that belong to it lie."""

    node: Node
    embedding: np.ndarray | None
    k_exponents: torch.Tensor | None
    tensors: _Layout
    data_start: int
    kv_checksum: str


def write_node(path: Path, stored: StoredNode, *, durable: bool = False) -> int:
    """Write a node so that `path` holds it whole or is left as it was.

    Args:
        path: the file to create or to replace.
        stored: the node; K and V bfloat16, float16, float32, float8 or packed to int8, on the CPU.
        durable: also flush to the device, to survive a power cut and not only a killed process.

    Returns:
        The size of the file in bytes.

    Raises:
        KVUnavailableError: "io_error", the file could not be written; no temporary file is left.
        ValueError: K and V are not the owned positions of the node, or of another dtype or device.
    """
    _check_kv(stored)
    chunks = _encode(stored)
    try:
        try:
            return _replace_file(path, chunks, durable)
        except FileNotFoundError:
            # Another process that opens this folder clears temporary files away, for it cannot
            # know that the one of ours is in use. It does so once: the second try goes through.
            return _replace_file(path, chunks, durable)
    except OSError as error:
        message = f"cannot write node {stored.node.node_id} to {path}: {error}"
        raise KVUnavailableError("io_error", message) from error


def read_record(path: Path) -> tuple[Node, np.ndarray | None, int]:
    """Read and verify all of a node but its K and V, whose bytes are not touched.

    Returns:
        The node, its embedding (``[dim]`` float32, or None) and the bytes of its K and V.

    Raises:
        KVUnavailableError: "evicted" (no such file), "corrupt", "io_error", or "newer_format": a
            later version of this program wrote it.
    """
    with _reading(path) as file:
        record = _read_record(file, os.fstat(file.fileno()).st_size)
    spans = [record.tensors[name]["data_offsets"] for name in ("k", "v")]
    return record.node, record.embedding, sum(end - start for start, end in spans)


def read_node(path: Path) -> StoredNode:
    """Read a node and verify every byte of it; raises as `read_record` does."""
    with _reading(path) as file:
        record = _read_record(file, os.fstat(file.fileno()).st_size)
        k, v = (_read_tensor(file, record, name) for name in _KV_NAMES)
        kv = NodeKV(k, v, record.k_exponents)
    if _kv_checksum(tensor_bytes(kv.k), tensor_bytes(kv.v)) != record.kv_checksum:
        raise _corrupt(path, "the checksum of K and V does not match")
    return StoredNode(record.node, kv, record.embedding)


def record_bytes(stored: StoredNode) -> bytes:
    """A node's file without the bytes of K and V, which it only tells the shapes of.

    Raises:
        ValueError: as `write_node`.
    """
    _check_kv(stored)
    return b"".join(_encode(stored)[: -len(_KV_NAMES)])


def record_of(content: bytes) -> tuple[Node, dict[str, KVType], torch.Tensor | None]:
    """Read what `record_bytes` wrote: the node, shape and dtype of its K and V by name, and what K
    was packed with.

    Raises:
        KVUnavailableError: "corrupt", or "newer_format".
    """
    with _checking("a record"):
        record = _read_record(BytesIO(content), len(content), record_only=True)
        entries = {name: record.tensors[name] for name in _KV_NAMES}
        types = {n: KVType(tuple(e["shape"]), _KV_DTYPES[e["dtype"]]) for n, e in entries.items()}
    return record.node, types, record.k_exponents


def _check_kv(stored: StoredNode) -> None:
    for name, tensor in (("k", stored.kv.k), ("v", stored.kv.v)):
        if tensor.dtype not in _KV_DTYPE_NAMES or tensor.device.type != "cpu":
            raise ValueError(
                f"node {stored.node.node_id}: {name} is {tensor.dtype} on {tensor.device}; the"
                " store takes bfloat16, float16, float32, float8 and packed int8 on the CPU"
            )
        if tensor.dim() != 4 or tensor.shape[2] != stored.node.num_owned:
            raise ValueError(
                f"node {stored.node.node_id}: {name} has shape {tuple(tensor.shape)}; expected"
                f" [layers, kv_heads, {stored.node.num_owned} owned positions, head_dim]"
            )


def _encode(stored: StoredNode) -> list[bytes | memoryview]:
    """Return the pieces of the file, in order; K and V are not copied."""
    node, kv, embedding = stored.node, stored.kv, stored.embedding
    # Larger elements first, none of two bytes, and K and V last: so every tensor is aligned and the
    # record together.
    arrays = {
        "own": np.array(node.own, dtype="<i8").reshape(-1, 2),
        "keys": node.align_keys,
        "positions": node.positions,
        "attention": _float32(node.attention),
        "drift": _float32(node.drift),
        "reads": node.reads,
        "embedding": _float32(embedding),
        "k_exponents": None if kv.k_exponents is None else kv.k_exponents.numpy(),
    }
    contents: dict[str, bytes | memoryview] = {}
    types: dict[str, tuple[str, Sequence[int]]] = {}
    for name, array in arrays.items():
        if array is not None:
            kind = array.dtype.newbyteorder("<")
            contents[name] = np.ascontiguousarray(array, dtype=kind).tobytes()
            types[name] = _ARRAY_DTYPE_NAMES[kind.str], array.shape
    for name, tensor in (("k", kv.k), ("v", kv.v)):
        contents[name] = tensor_bytes(tensor)
        types[name] = _KV_DTYPE_NAMES[tensor.dtype], tensor.shape

    tensors: _Layout = {}
    end = 0
    for name, (dtype, shape) in types.items():
        start, end = end, end + len(contents[name])
        tensors[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    kv_checksum = _kv_checksum(contents["k"], contents["v"])
    fields = {
        "node_id": node.node_id,
        "namespace": node.namespace,
        "pieces": [[p.owner, *map(int, p[1:])] for p in node.pieces],
        "exact_len": int(node.exact_len),
        "risk": float(node.risk),
        "parent": node.parent,
        "created_s": float(node.created_s),
        "media": [astuple(segment) for segment in node.media],
    }
    record = json.dumps(fields)
    metadata = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "record": record,
        "record_xxh3_128": _record_checksum(record, tensors, kv_checksum, contents),
        "kv_xxh3_128": kv_checksum,
    }
    header = json.dumps({"__metadata__": metadata, **tensors}).encode()
    header += b" " * (-len(header) % 8)
    return [len(header).to_bytes(8, "little"), header, *contents.values()]


def _float32(values: np.ndarray | None) -> np.ndarray | None:
    return None if values is None else values.astype(np.float32)


def _replace_file(path: Path, chunks: list[bytes | memoryview], durable: bool) -> int:
    temp = path.with_name(f"{path.name}.{secrets.token_hex(8)}{TEMP_SUFFIX}")
    try:
        with open(temp, "xb", opener=_private) as file:
            for chunk in chunks:
                file.write(chunk)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temp, path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to report
            temp.unlink()
        raise
    if durable:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return sum(map(len, chunks))


def _private(path: str, flags: int) -> int:
    # The keys of a text request are its token ids: what users wrote is for our eyes only.
    return os.open(path, flags, 0o600)


@contextmanager
def _reading(path: Path) -> Iterator[BufferedIOBase]:
    """Open `path`, turning everything that can be wrong with it into KVUnavailableError."""
    try:
        with _checking(path), open(path, "rb") as file:
            yield file
    except FileNotFoundError as error:
        raise KVUnavailableError("evicted", f"{path} is gone") from error
    except OSError as error:
        raise KVUnavailableError("io_error", f"cannot read {path}: {error}") from error


@contextmanager
def _checking(name: Path | str) -> Iterator[None]:
    """Turn everything that can be wrong with what is read into KVUnavailableError."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _corrupt(name, f"{type(error).__name__}: {error}") from error


def _read_record(file: BufferedIOBase, size: int, record_only: bool = False) -> _Record:
    """Args:
    size: bytes that there are.
    record_only: those of K and V are not there.
    """
    header_len = int.from_bytes(_read_exactly(file, 8), "little")
    data_start = 8 + header_len
    if data_start > size:
        raise ValueError("the header goes beyond the end of the file")
    tensors = json.loads(_read_exactly(file, header_len))
    metadata = tensors.pop("__metadata__")
    found = metadata["format"], metadata["version"]
    if found != (FORMAT, FORMAT_VERSION):
        message = f"format and version are {found}, expected {(FORMAT, FORMAT_VERSION)}"
        if found[0] == FORMAT and int(found[1]) > int(FORMAT_VERSION):
            raise KVUnavailableError("newer_format", f"a stored node: {message}")
        raise ValueError(message)
    there = _RECORD_TENSORS if record_only else tensors
    offsets = [entry["data_offsets"] for name, entry in tensors.items() if name in there]
    if not all(0 <= start <= end for start, end in offsets):
        raise ValueError("a tensor lies outside the file")
    expected = data_start + max(end for _, end in offsets)
    if size != expected:
        raise ValueError(f"the file has {size} bytes, expected {expected}")

    contents: dict[str, bytes] = {}
    for name in _RECORD_TENSORS:
        if name in tensors:
            start, end = tensors[name]["data_offsets"]
            file.seek(data_start + start)
            contents[name] = _read_exactly(file, end - start)
    kv_checksum = metadata["kv_xxh3_128"]
    checksum = _record_checksum(metadata["record"], tensors, kv_checksum, contents)
    if checksum != metadata["record_xxh3_128"]:
        raise ValueError("the checksum of the record does not match")

    fields = json.loads(metadata["record"])
    arrays = {
        # Copied because arrays over bytes are read-only, which torch warns about.
        name: np.frombuffer(content, dtype=_ARRAY_DTYPES[tensors[name]["dtype"]])
        .reshape(tensors[name]["shape"])
        .copy()
        for name, content in contents.items()
    }
    node = Node(
        node_id=fields["node_id"],
        namespace=fields["namespace"],
        align_keys=arrays["keys"],
        own=tuple(Span(int(start), int(end)) for start, end in arrays["own"]),
        pieces=tuple(Piece(*piece) for piece in fields["pieces"]),
        exact_len=fields["exact_len"],
        risk=fields["risk"],
        attention=arrays.get("attention"),
        parent=fields["parent"],
        created_s=fields["created_s"],
        positions=arrays.get("positions"),
        media=tuple(Segment(Modality(m), *rest) for m, *rest in fields.get("media", ())),
        drift=arrays.get("drift"),
        reads=arrays.get("reads"),
    )
    exponents = arrays.get("k_exponents")
    k_exponents = None if exponents is None else torch.from_numpy(exponents)
    return _Record(node, arrays.get("embedding"), k_exponents, tensors, data_start, kv_checksum)


def _read_tensor(file: BufferedIOBase, record: _Record, name: str) -> torch.Tensor:
    entry = record.tensors[name]
    tensor = torch.empty(entry["shape"], dtype=_KV_DTYPES[entry["dtype"]])
    file.seek(record.data_start + entry["data_offsets"][0])
    if file.readinto(tensor_bytes(tensor)) != tensor.nbytes:
        raise ValueError(f"the file ends inside tensor {name}")
    return tensor


def _read_exactly(file: BufferedIOBase, num_bytes: int) -> bytes:
    content = file.read(num_bytes)
    if len(content) != num_bytes:
        raise ValueError(f"the file ends {num_bytes - len(content)} bytes early")
    return content


def _record_checksum(
    record: str, tensors: _Layout, kv_checksum: str, contents: Mapping[str, bytes | memoryview]
) -> str:
    # The layout and the checksum of K and V are covered too: a header that gives K another shape
    # or dtype of the same width must not pass.
    layout = json.dumps(tensors, sort_keys=True)
    digest = xxhash.xxh3_128(json.dumps([record, layout, kv_checksum]).encode())
    for name in _RECORD_TENSORS:
        digest.update(contents.get(name, b""))
    return digest.hexdigest()


def _kv_checksum(k: bytes | memoryview, v: bytes | memoryview) -> str:
    digest = xxhash.xxh3_128(k)
    digest.update(v)
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a CPU tensor as bytes; a tensor with gaps is copied."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


def _corrupt(path: Path | str, why: str) -> KVUnavailableError:
    return KVUnavailableError("corrupt", f"{path} is damaged or not a stored node: {why}")
