"""The DELTA tree against a model that stores every request whole.

The model's KV is made so that every mistake shows. A position has two numbers, like a key and a
value have parts that rotate and parts that do not:

* `content`: what a full prefill would give is a hash of all keys up to there. What was computed in
  an edited context gets a number that nothing else has.
* `place`: where the position was when it was computed; moving it adds the shift, as re-rotation
  does.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from kvshare_mm.node import Node, Piece
from kvshare_mm.reuse.plan import ReusePlan
from kvshare_mm.reuse.planner import make_plan
from kvshare_mm.reuse.tree import DeltaTree

from .plans import EAGER, to_keys


def full_prefill(keys: np.ndarray) -> np.ndarray:
    """``[N]`` the content that a full prefill gives: it depends on all keys up to the position."""
    contents, so_far = [], 0
    for key in keys.tolist():
        so_far = (so_far * 1_000_003 + key + 1) % (2**61 - 1)
        contents.append(so_far)
    return np.array(contents, dtype=np.int64)


def owned_rows(kv: np.ndarray, node: Node) -> np.ndarray:
    """The rows a node owns of a whole request's KV, as the pool of donors cuts them."""
    return np.concatenate([kv[s.start : s.end] for s in node.own] or [kv[:0]])


def first_reused(plan: ReusePlan, n: int) -> int:
    """Up to here nothing approximate has been seen; of `n` positions."""
    return next((i for i in range(plan.num_tokens) if plan.reused[i]), n)


@dataclasses.dataclass
class Whole:
    """A request stored whole, and who computed each position.

    Attributes:
        kv: ``[N, 2]`` int64: content and place.
        owner: ``[N]`` names of nodes; None where the KV can no longer be read.
    """

    align_keys: np.ndarray
    kv: np.ndarray
    owner: list[str | None]
    exact: int


class TreeMachine(RuleBasedStateMachine):
    nodes = Bundle("nodes")

    @initialize(max_owners=st.integers(1, 3))
    def start(self, max_owners):
        self.tree = DeltaTree(max_owners)
        self.whole: dict[str, Whole] = {}
        self.rows: dict[str, np.ndarray] = {}
        self.stored: dict[str, Node] = {}
        self.count = 0

    # -- what is done to a tree -------------------------------------------------------------

    @rule(target=nodes, symbols=st.lists(st.integers(0, 3), min_size=1, max_size=30))
    def insert_a_root(self, symbols):
        keys = to_keys(symbols)
        return self._store(keys, ReusePlan(len(keys)), self._prefill(keys, ReusePlan(len(keys))))

    @rule(target=nodes, base=nodes, data=st.data())
    def insert_a_child(self, base, data):
        if base not in self.whole:
            return base
        keys = self._edit(data, base)
        others = [n for n in self.whole if n != base]
        more = data.draw(st.lists(st.sampled_from(others), max_size=3)) if others else []
        donors = [self.tree.donor(n) for n in [base, *more]]
        options = dataclasses.replace(
            EAGER,
            exact_only=data.draw(st.integers(0, 5)) == 0,
            min_run=data.draw(st.integers(1, 4)),
        )
        plan = make_plan(keys, donors, options)
        for run in plan.runs:
            # A plan is carried out only if every kept position can be read.
            pieces = self.tree.resolve(run.donor, run.start, run.length, run.shift)
            assert sum(p.length for p in pieces) == run.length
        positions = st.lists(st.integers(0, len(keys) - 1), max_size=10)
        plan = plan.with_repair(np.array(data.draw(positions), dtype=np.int64))
        answer = data.draw(st.lists(st.integers(0, 3), max_size=3))
        keys = np.concatenate((keys, to_keys(answer)))
        kv = self._prefill(keys, plan)
        # While the request runs, and while its KV is being written, donors may be evicted.
        self._drop_some(data)
        return self._store(keys, plan, kv, lambda: self._drop_some(data))

    @rule(node_id=consumes(nodes))
    def drop(self, node_id):
        self._drop(node_id)

    @rule(node_id=nodes)
    def drop_twice_or_unknown(self, node_id):
        if node_id not in self.whole:
            self.tree.drop(node_id)
        self.tree.drop("unknown")
        assert set(self.whole) == {n.node_id for n in self.tree}

    @rule(random=st.randoms(use_true_random=False))
    def restart(self, random):
        """Nodes come back as they were written, in any order."""
        nodes = list(self.stored.values())
        random.shuffle(nodes)
        tree = DeltaTree(self.tree.max_owners)
        for node in nodes:
            tree.insert(node)
        for node_id in self.whole:
            n = len(tree[node_id])
            assert tree.resolve(node_id, 0, n) == self.tree.resolve(node_id, 0, n)
        assert tree.num_tokens_owned == self.tree.num_tokens_owned
        assert tree.num_tokens_whole == self.tree.num_tokens_whole
        self.tree = tree

    # -- what must hold ---------------------------------------------------------------------

    @invariant()
    def every_node_reads_as_if_stored_whole(self):
        for node_id, whole in self.whole.items():
            node, readable = self.tree[node_id], np.zeros(len(whole.align_keys), dtype=bool)
            at = 0
            for piece in self.tree.resolve(node_id, 0, len(node)):
                assert piece.start >= at
                at = piece.end
                assert np.array_equal(self._read(piece), whole.kv[piece.start : piece.end])
                assert set(whole.owner[piece.start : piece.end]) == {piece.owner}
                readable[piece.start : piece.end] = True
            assert np.array_equal(readable, self._readable(node_id))
            assert (whole.kv[:, 1] == np.arange(len(whole.align_keys))).all()
            assert node.num_owned == len(self.rows[node_id])
            owners = [o for o in whole.owner if o not in (None, node_id)]
            alive = {o: n for o, n in node.owners.items() if o in self.tree}
            assert alive == {o: owners.count(o) for o in owners}

    @invariant()
    def what_is_called_exact_is(self):
        for node_id, whole in self.whole.items():
            truth = full_prefill(whole.align_keys)
            node, donor = self.tree[node_id], self.tree.donor(node_id)
            readable = self._readable(node_id)
            prefix = int(np.cumprod(readable).sum())
            assert node.exact_len == whole.exact
            assert np.array_equal(whole.kv[: node.exact_len, 0], truth[: node.exact_len])
            assert donor.donor_id == node_id
            assert donor.align_keys.dtype == np.uint64
            assert np.array_equal(donor.align_keys, node.align_keys)
            assert donor.readable == prefix
            assert donor.exact_len == min(prefix, whole.exact)
            assert not (donor.reusable & ~readable).any()
            assert donor.reusable[: donor.exact_len].all()
            # Contents of an edited context are negative: none of them is ever reusable.
            assert (whole.kv[donor.reusable, 0] >= 0).all()
            # And nothing that the owner has exactly is refused.
            for p in np.flatnonzero(readable & ~donor.reusable):
                owner = self.whole[whole.owner[p]]
                found = np.flatnonzero(owner.kv[: owner.exact, 0] == whole.kv[p, 0])
                assert not len(found) or whole.owner[p] == node_id

    @invariant()
    def sums_are_right(self):
        tree = self.tree
        assert len(tree) == len(self.whole)
        assert {n.node_id for n in tree} == set(self.whole)
        assert tree.num_tokens_owned == sum(map(len, self.rows.values()))
        whole = sum(int(self._readable(n).sum()) for n in self.whole)
        assert tree.num_tokens_whole == whole >= tree.num_tokens_owned

    # -- the model --------------------------------------------------------------------------

    def _edit(self, data, base: str) -> np.ndarray:
        keys = self.whole[base].align_keys.tolist()
        for _ in range(data.draw(st.integers(0, 3))):
            a, b = sorted(data.draw(st.tuples(*[st.integers(0, len(keys))] * 2)))
            new = data.draw(st.lists(st.integers(4, 6), max_size=3))
            keys = data.draw(
                st.sampled_from(
                    [keys[:a] + keys[b:], keys[:a] + new + keys[a:], keys[b:] + new + keys[:b]]
                )
            )[:40]
        return to_keys(keys or [0])

    def _readable(self, node_id: str) -> np.ndarray:
        return np.array([o is not None for o in self.whole[node_id].owner], dtype=bool)

    def _read(self, piece: Piece) -> np.ndarray:
        row = self.tree[piece.owner].owned_row(piece.owner_start, piece.length)
        assert row is not None
        return self.rows[piece.owner][row : row + piece.length] + np.array([0, piece.shift])

    def _prefill(self, keys: np.ndarray, plan: ReusePlan) -> np.ndarray:
        """The slot of a request served with `plan`."""
        n = len(keys)
        edited = -1 - np.arange(n) - 1000 * self.count
        first = first_reused(plan, n)
        kv = np.stack((full_prefill(keys), np.arange(n)), axis=1)
        kv[first:, 0] = edited[first:]
        kept = plan.kept
        kept[plan.repair] = False
        for run in plan.runs:
            donor = self.whole[run.donor].kv[run.donor_start : run.donor_start + run.length]
            at = run.start + np.flatnonzero(kept[run.start : run.end])
            kv[at] = donor[at - run.start] + np.array([0, run.shift])
        return kv

    def _store(self, keys, plan: ReusePlan, kv: np.ndarray, meanwhile=lambda: None) -> str:
        node_id = f"n{self.count}"
        self.count += 1
        owner: list[str | None] = [node_id] * len(keys)
        for run in plan.runs:
            if run.donor in self.whole:
                for i in range(run.length):
                    source = self.whole[run.donor].owner[run.donor_start + i]
                    owner[run.start + i] = source or node_id
        for position in plan.repair:
            owner[position] = node_id
        node = self.tree.derive(node_id, "ns", keys, plan, created_s=1.0)
        self._check_owners(node, owner)
        owner = [o if o in node.owners else node_id for o in owner]
        self.rows[node_id] = owned_rows(kv, node)
        assert node.parent == (plan.edited_from if plan.edited_from in self.tree else None)
        meanwhile()
        self.tree.insert(node)
        self.stored[node_id] = node
        owner = [o if o == node_id or o in self.whole else None for o in owner]
        self.whole[node_id] = Whole(keys, kv, owner, first_reused(plan, len(keys)))
        return node_id

    def _check_owners(self, node: Node, owner: list[str | None]) -> None:
        """It borrows all it can, from those that give most, and not from too many."""
        could = {o: owner.count(o) for o in owner if o != node.node_id}
        assert len(node.owners) == min(len(could), self.tree.max_owners)
        assert all(could[o] == n for o, n in node.owners.items())
        refused = [n for o, n in could.items() if o not in node.owners]
        assert max(refused, default=0) <= min(node.owners.values(), default=0)
        assert node.num_owned + sum(node.owners.values()) == len(node)

    def _drop_some(self, data) -> None:
        if self.whole and data.draw(st.integers(0, 3)) == 0:
            self._drop(data.draw(st.sampled_from(sorted(self.whole))))

    def _drop(self, node_id: str) -> None:
        if node_id not in self.whole:
            return
        self.tree.drop(node_id)
        assert node_id not in self.tree
        assert self.tree.get(node_id) is None
        for records in (self.whole, self.rows, self.stored):
            del records[node_id]
        for whole in self.whole.values():
            whole.owner = [None if o == node_id else o for o in whole.owner]


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=60, stateful_step_count=25)
