"""What is wrong in a store folder, and putting it right; no model is loaded.

A server repairs nothing while it runs and needs none of this: what is damaged is a miss when it is
read. This is for those who want to know before, or after a disk gave them reason to ask.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

from kvshare_mm.errors import KVUnavailableError, NotFiniteError, StoreError
from kvshare_mm.node import Node, Piece
from kvshare_mm.reuse.calibration import ASIDE_SUFFIX, TEMP_SUFFIX, read_state
from kvshare_mm.reuse.tree import DeltaTree
from kvshare_mm.store.base import check_finite
from kvshare_mm.store.codec import read_node, read_record
from kvshare_mm.store.disk import NODE_SUFFIX, is_temporary, node_file
from kvshare_mm.store.lock import FolderLock, in_use
from kvshare_mm.store.media import is_media
from kvshare_mm.store.states import is_state

NODES, CALIBRATIONS, INDEXES = f"*{NODE_SUFFIX}", "calibration-*.json", "milvus-*.db"

Told = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Problem:
    """A file that cannot be used as it is.

    Attributes:
        kind: "damaged", "older_format", "newer_format", "unreadable" (the disk did not give it
            this time), "wrong_borrowing" (it names KV that its owner does not have), "temporary"
            (of a write that was cut off) or "set_aside" (a calibration that a server found
            damaged).
        tokens: whose KV it owned; None: nobody knows.
        broken: `repair` removes it.
    """

    path: Path
    kind: str
    message: str
    tokens: int | None = None
    broken: bool = True


@dataclass(slots=True)
class Report:
    """What is in a store folder.

    Attributes:
        donors: stored requests that are whole, and ``media`` encoder outputs.
        tokens_owned: whose KV is here.
        tokens_readable: of all donors, if each were stored whole.
        tokens_missing: borrowed from donors that are not here: evicted, or lost. They are computed
            again; nothing is wrong with that.
        bytes: of files by kind: "nodes", "calibration", "index", "problems".
        in_use: a server has the folder open.
    """

    folder: Path
    donors: int = 0
    media: int = 0
    tokens_owned: int = 0
    tokens_readable: int = 0
    tokens_missing: int = 0
    donors_missing_some: int = 0
    bytes: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    in_use: bool = False

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        names = [name for name in self.__slots__ if name not in ("folder", "problems", "bytes")]
        problems = [
            {
                "file": str(p.path.relative_to(self.folder)),
                "kind": p.kind,
                "message": p.message,
                "tokens": p.tokens,
                "broken": p.broken,
            }
            for p in self.problems
        ]
        values = {name: getattr(self, name) for name in names}
        return {"ok": self.ok, **values, "bytes": dict(self.bytes), "problems": problems}


def parts(folder: Path) -> list[Path]:
    """The folders of nodes in a store: ``kv``, and inside vLLM one for each rank.

    Raises:
        StoreError: it is no store folder.
    """
    found = [f for f in (folder / "kv", *sorted(folder.glob("vllm-*of*"))) if f.is_dir()]
    if not found and not any(folder.glob(CALIBRATIONS)):
        inside = f" Give {folder.parent}." if folder.name == "kv" else ""
        raise StoreError(f"{folder} is not a store folder: it has no kv/ inside.{inside}")
    return found


def num_bytes(folder: Path) -> int:
    """Bytes that `verify` reads of a folder. Raises StoreError: it is no store folder."""
    return sum(_size(path) for part in parts(folder) for path in part.glob(NODES))


def verify(folder: Path, read: Told = lambda _: None) -> Report:
    """Read every file of a store folder, byte by byte; nothing is changed.

    Args:
        read: told the bytes of each file that was read.

    Raises:
        StoreError: it is no store folder, or cannot be listed.
    """
    return _verify(folder, read, in_use)


def _verify(folder: Path, read: Told, in_use: Callable[[Path], bool]) -> Report:
    report = Report(folder)
    try:
        for part in parts(folder):
            used = in_use(part)
            report.in_use |= used
            _check_nodes(part, used, report, read)
        _check_states(folder, report)
    except OSError as error:
        raise StoreError(f"cannot read {folder}: {error}") from error
    return report


def repair(folder: Path, aside: Path | None = None, read: Told = lambda _: None) -> Report:
    """Verify a folder and remove what is broken, nothing else.

    Args:
        aside: a folder on the same file system that files are moved to instead, made if need be.
            None of those in it is replaced.

    Returns:
        What was found: `Report.problems` that are `broken` are gone.

    Raises:
        StoreError: it is no store folder, a server uses it, a file cannot be removed, or `aside` is
            the folder itself.
    """
    if aside is not None and aside.resolve() == folder.resolve():
        raise StoreError(f"{aside} is the store folder itself: give another one for broken files")
    with ExitStack() as held:
        for part in parts(folder):
            try:
                held.enter_context(closing(FolderLock(part, alone=True)))
            except BlockingIOError as error:
                message = f"a server uses {part}: stop it first, or look with `verify`"
                raise StoreError(message) from error
        report = _verify(folder, read, lambda _: False)
        try:
            for problem in report.problems:
                if problem.broken:
                    _remove(problem.path, folder, aside)
        except OSError as error:
            raise StoreError(f"cannot repair {folder}: {error}") from error
    return report


def _remove(path: Path, folder: Path, aside: Path | None) -> None:
    if aside is None:
        path.unlink(missing_ok=True)
        return
    name = aside / path.relative_to(folder)
    name.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # What was set aside before under this name stays, too.
    names = chain([name], (name.with_name(f"{name.name}.{n}") for n in count(2)))
    os.replace(path, next(free for free in names if not os.path.lexists(free)))


def _check_nodes(part: Path, used: bool, report: Report, read: Told) -> None:
    tree = DeltaTree()
    for path in sorted(part.iterdir()):
        try:
            num_bytes = path.stat().st_size
        except FileNotFoundError:
            continue  # evicted while we look
        if is_temporary(path):
            if not used:
                _add(report, Problem(path, "temporary", "a write that was cut off", 0), num_bytes)
            continue
        if not path.name.endswith(NODE_SUFFIX):
            continue
        found = _check_node(path)
        if isinstance(found, Problem):
            _add(report, found, num_bytes)
        elif found is not None:
            report.bytes["nodes"] += num_bytes
            tree.insert(found)
        read(num_bytes)
    for node in tree:
        if (wrong := _wrong_borrowing(node, tree)) is not None:
            path = part / node_file(node.node_id)
            message = f"borrows {wrong.length} tokens that {wrong.owner} does not have"
            _add(report, Problem(path, "wrong_borrowing", message, node.num_owned))
            tree.drop(node.node_id)
    requests = [node for node in tree if not (is_media(node) or is_state(node))]
    report.donors += len(requests)
    report.media += sum(map(is_media, tree))
    report.tokens_owned += tree.num_tokens_owned
    report.tokens_readable += tree.num_tokens_whole
    for node in requests:
        missing = sum(piece.length for piece in node.pieces if piece.owner not in tree)
        report.tokens_missing += missing
        report.donors_missing_some += missing > 0


def _check_node(path: Path) -> Node | Problem | None:
    """None: it is gone, evicted while we look."""
    try:
        stored = read_node(path)
        check_finite(stored.node, stored.embedding, stored.kv)
    except NotFiniteError as error:
        return Problem(path, "damaged", str(error), _tokens(path))
    except KVUnavailableError as error:
        if error.reason == "evicted":
            return None
        tokens = _tokens(path)
        if error.reason == "corrupt":
            kind = "older_format" if "format and version" in str(error) else "damaged"
            return Problem(path, kind, str(error), tokens)
        kind = "unreadable" if error.reason == "io_error" else error.reason
        return Problem(path, kind, str(error), tokens, broken=False)
    if node_file(stored.node.node_id) != path.name:
        message = f"it holds node {stored.node.node_id}: renamed?"
        return Problem(path, "damaged", message, stored.node.num_owned)
    return stored.node


def _tokens(path: Path) -> int | None:
    try:
        return read_record(path)[0].num_owned
    except KVUnavailableError:
        return None


def _wrong_borrowing(node: Node, tree: DeltaTree) -> Piece | None:
    for piece in node.pieces:
        owner = tree.get(piece.owner)
        if owner is not None and (
            owner.namespace != node.namespace
            or owner.owned_row(piece.owner_start, piece.length) is None
        ):
            return piece
    return None


def _check_states(folder: Path, report: Report) -> None:
    for path in _files(folder, CALIBRATIONS):
        report.bytes["calibration"] += _size(path)
        try:
            read_state(path)
        except ValueError as error:
            first = str(error).splitlines()[0]
            _add(report, Problem(path, "damaged", f"{path}: {first}"))
        except FileNotFoundError:
            continue  # set aside by a server while we look
        except OSError as error:
            _add(report, Problem(path, "unreadable", str(error), broken=False))
    for path in _files(folder, f"{CALIBRATIONS}.*{TEMP_SUFFIX}"):
        if not report.in_use:
            _add(report, Problem(path, "temporary", "a write that was cut off", 0))
    for path in _files(folder, f"{CALIBRATIONS}{ASIDE_SUFFIX}"):
        message = "a server could not read it, and began to learn anew"
        _add(report, Problem(path, "set_aside", message))
    for path in _files(folder, INDEXES):
        report.bytes["index"] += sum(map(_size, _inside(path)))


def _files(folder: Path, pattern: str) -> Iterator[Path]:
    return iter(sorted(folder.glob(pattern)))


def _inside(path: Path) -> Iterator[Path]:
    """A file itself, or all files of a folder; `walk` minds no folder that goes meanwhile."""
    if not path.is_dir():
        yield path
    for folder, _, names in os.walk(path):
        yield from (Path(folder, name) for name in names)


def _size(path: Path) -> int:
    """Bytes of a file; 0 if it is gone: a server evicts, and Milvus tidies up, while we look."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _add(report: Report, problem: Problem, num_bytes: int | None = None) -> None:
    report.problems.append(problem)
    report.bytes["problems"] += _size(problem.path) if num_bytes is None else num_bytes
