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
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)

from kvshare_mm.delta_tree import DeltaTree, Node, Piece, Span
from kvshare_mm.plan import PlannerOptions, ReusePlan, make_plan
from kvshare_mm.repair import BoundaryWindow, NoRepair, RepairPolicy

EAGER = PlannerOptions(min_run=2, min_gain_tokens=1, min_gain_share=0.0)


def to_keys(symbols) -> np.ndarray:
    return np.array(list(symbols), dtype=np.uint64)


def root(node_id: str, n: int, **fields) -> Node:
    """A request computed in full."""
    return Node(node_id, "ns", np.arange(n, dtype=np.uint64), (Span(0, n),), exact_len=n, **fields)


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


@dataclasses.dataclass
class Whole:
    """A request stored whole, and who computed each position.

    Attributes:
        kv: ``[N, 2]`` int64: content and place.
        owner: ``[N]`` names of nodes; None where the KV can no longer be read.
    """

    keys: np.ndarray
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

    @rule(node_id=nodes)
    def merge(self, node_id):
        if node_id not in self.whole:
            return
        before = self.tree[node_id]
        readable = self._readable(node_id)
        kv = np.full((len(before), 2), -1)
        for piece in self.tree.resolve(node_id, 0, len(before)):
            kv[piece.start : piece.end] = self._read(piece)
        absorbed = self.tree.merge(node_id)
        after = self.tree[node_id]
        assert sum(p.length for p in absorbed) == after.num_owned - before.num_owned
        assert all(p.owner in self.tree for p in absorbed)
        assert after.pieces == ()
        assert after.num_owned == readable.sum()
        assert (after.keys is before.keys) and after.exact_len == before.exact_len
        self.rows[node_id] = owned_rows(kv, after)
        self.stored[node_id] = after
        whole = self.whole[node_id]
        whole.owner = [node_id if r else None for r in readable]

    @rule(node_id=consumes(nodes))
    def drop(self, node_id):
        self._drop(node_id)

    @rule(node_id=nodes)
    def drop_twice_or_unknown(self, node_id):
        if node_id not in self.whole:
            assert self.tree.drop(node_id) == frozenset()
        assert self.tree.drop("unknown") == frozenset()

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
            node, readable = self.tree[node_id], np.zeros(len(whole.keys), dtype=bool)
            at = 0
            for piece in self.tree.resolve(node_id, 0, len(node)):
                assert piece.start >= at
                at = piece.end
                assert np.array_equal(self._read(piece), whole.kv[piece.start : piece.end])
                assert set(whole.owner[piece.start : piece.end]) == {piece.owner}
                readable[piece.start : piece.end] = True
            assert np.array_equal(readable, self._readable(node_id))
            assert (whole.kv[:, 1] == np.arange(len(whole.keys))).all()
            assert node.num_owned == len(self.rows[node_id])
            owners = [o for o in whole.owner if o not in (None, node_id)]
            alive = {o: n for o, n in node.owners.items() if o in self.tree}
            assert alive == {o: owners.count(o) for o in owners}

    @invariant()
    def what_is_called_exact_is(self):
        for node_id, whole in self.whole.items():
            truth = full_prefill(whole.keys)
            node, donor = self.tree[node_id], self.tree.donor(node_id)
            readable = self._readable(node_id)
            prefix = int(np.cumprod(readable).sum())
            assert node.exact_len == whole.exact
            assert np.array_equal(whole.kv[: node.exact_len, 0], truth[: node.exact_len])
            assert donor.donor_id == node_id
            assert donor.keys is node.keys
            assert donor.readable == prefix
            assert donor.exact_len == min(prefix, whole.exact)
            assert not (donor.material & ~readable).any()
            assert donor.material[: donor.exact_len].all()
            # Contents of an edited context are negative: none of them is ever material.
            assert (whole.kv[donor.material, 0] >= 0).all()
            # And nothing that the owner has exactly is refused.
            for p in np.flatnonzero(readable & ~donor.material):
                owner = self.whole[whole.owner[p]]
                found = np.flatnonzero(owner.kv[: owner.exact, 0] == whole.kv[p, 0])
                assert not len(found) or whole.owner[p] == node_id

    @invariant()
    def sums_and_lineage_are_right(self):
        tree = self.tree
        assert len(tree) == len(self.whole)
        assert {n.node_id for n in tree} == set(self.whole)
        assert tree.num_tokens_owned == sum(map(len, self.rows.values()))
        whole = sum(int(self._readable(n).sum()) for n in self.whole)
        assert tree.num_tokens_whole == whole >= tree.num_tokens_owned
        for node in tree:
            assert tree.depth(node.node_id) < len(tree)
            relatives = tree.relatives(node.node_id)
            assert node.node_id not in relatives
            assert len(set(relatives)) == len(relatives)
            if node.parent in tree:
                assert node.parent in relatives
                assert node.node_id in tree.relatives(node.parent)

    @invariant()
    def nothing_is_kept_of_who_is_gone(self):
        borrowers = {o for n in self.tree for o in n.owners}
        assert set(self.tree._borrowers) == borrowers

    # -- the model --------------------------------------------------------------------------

    def _edit(self, data, base: str) -> np.ndarray:
        keys = self.whole[base].keys.tolist()
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
        first = next((r.start for r in plan.runs if not r.exact), n)
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
        approximate = [r.start for r in plan.runs if not r.exact]
        self.rows[node_id] = owned_rows(kv, node)
        assert node.parent is None or node.parent in plan.donors
        meanwhile()
        self.tree.insert(node)
        self.stored[node_id] = node
        owner = [o if o == node_id or o in self.whole else None for o in owner]
        exact = approximate[0] if approximate else len(keys)
        self.whole[node_id] = Whole(keys, kv, owner, exact)
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
        parents = {n.node_id: n.parent for n in self.tree}
        expected = {n for n, w in self.whole.items() if n != node_id and node_id in w.owner}
        assert self.tree.drop(node_id) == expected
        assert node_id not in self.tree
        assert self.tree.get(node_id) is None
        for records in (self.whole, self.rows, self.stored):
            del records[node_id]
        for whole in self.whole.values():
            whole.owner = [None if o == node_id else o for o in whole.owner]
        for node in self.tree:
            assert node.parent != node_id
            if parents[node.node_id] == node_id:
                assert node.parent == parents[node_id]


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=60, stateful_step_count=25)


# -- case by case -----------------------------------------------------------------------------


def serve(tree: DeltaTree, node_id: str, keys, donors=(), options=EAGER, repair=None) -> Node:
    """Plan a request with `donors` of the tree and insert it."""
    keys = to_keys(keys)
    plan = make_plan(keys, [tree.donor(d) for d in donors], options)
    policy: RepairPolicy = repair or NoRepair()
    node = tree.derive(node_id, "ns", keys, plan.with_repair(policy.positions(plan, None)), 0.0)
    tree.insert(node)
    return node


def test_a_child_owns_only_what_was_computed():
    tree = DeltaTree()
    serve(tree, "a", range(20))
    child = serve(tree, "b", [*range(8), 50, 51, *range(8, 20), 60], ["a"])
    assert child.own == (Span(8, 10), Span(22, 23))
    assert child.pieces == (Piece("a", 0, 0, 8), Piece("a", 8, 10, 12))
    assert child.exact_len == 10
    assert child.parent == "a"
    assert (tree.num_tokens_owned, tree.num_tokens_whole) == (23, 43)


def test_pieces_name_the_owner_and_not_who_pointed_on():
    tree = DeltaTree()
    serve(tree, "a", range(20))
    serve(tree, "b", [50, *range(20), 60], ["a"])
    grandchild = serve(tree, "c", [51, 52, *range(20), 60], ["b"])
    assert grandchild.pieces == (Piece("a", 0, 2, 20),)
    assert grandchild.pieces[0].shift == 2
    assert grandchild.parent == "b"
    tree.drop("b")
    assert tree["c"].parent == "a"
    assert tree.resolve("c", 0, 23) == [
        Piece("c", 0, 0, 2),
        Piece("a", 0, 2, 20),
        Piece("c", 22, 22, 1),
    ]


def test_what_was_repaired_is_owned_and_is_no_material():
    tree = DeltaTree()
    serve(tree, "a", range(20))
    child = serve(tree, "b", [50, *range(20), 60], ["a"], repair=BoundaryWindow(2))
    assert child.own == (Span(0, 3), Span(21, 22))
    assert np.flatnonzero(~tree.donor("b").material).tolist() == [1, 2, 21]


def test_resolve_part_of_a_node_at_another_place():
    tree = DeltaTree()
    serve(tree, "a", range(20))
    serve(tree, "b", [*range(8), 50, 51, *range(8, 20), 60], ["a"])
    # Positions 6..11 of b, wanted at 106.
    assert tree.resolve("b", 106, 6, shift=100) == [
        Piece("a", 6, 106, 2),
        Piece("b", 8, 108, 2),
        Piece("a", 8, 110, 2),
    ]
    assert tree.resolve("b", 0, 0) == []


def test_a_dropped_donor_leaves_a_hole_and_what_is_behind_it_stays_readable():
    tree = DeltaTree()
    serve(tree, "a", range(20))
    serve(tree, "x", range(100, 120))
    serve(tree, "b", [*range(20), *range(100, 120), 60], ["a", "x"])
    assert tree.drop("a") == {"b"}
    donor = tree.donor("b")
    assert (donor.readable, donor.exact_len) == (0, 0)
    assert np.flatnonzero(donor.material).tolist() == list(range(20, 40))
    assert tree.num_tokens_whole == 20 + 21


def test_a_request_whose_donor_is_gone_owns_all_of_it():
    """Between the plan and the capture of a request lies its whole answer: donors get evicted."""
    tree = DeltaTree()
    serve(tree, "a", range(20))
    serve(tree, "x", range(100, 120))
    keys = to_keys([*range(20), *range(100, 120), 60])
    plan = make_plan(keys, [tree.donor("a"), tree.donor("x")], EAGER)
    tree.drop("a")
    node = tree.derive("b", "ns", keys, plan, 0.0)
    assert node.own == (Span(0, 20), Span(40, 41))
    assert node.pieces == (Piece("x", 0, 20, 20),)
    assert node.parent is None


def test_an_answer_behind_the_prompt_is_owned():
    tree = DeltaTree()
    serve(tree, "a", range(20))
    keys = to_keys([*range(20), 50])
    plan = make_plan(keys, [tree.donor("a")], EAGER)
    node = tree.derive("b", "ns", to_keys([*range(20), 50, 51, 52]), plan, 0.0)
    assert node.own == (Span(20, 23),)
    assert node.exact_len == 23


@pytest.mark.parametrize("max_owners", [1, 2, 3])
def test_a_node_borrows_from_few_and_from_those_that_give_most(max_owners):
    tree = DeltaTree(max_owners)
    names = "abc"
    for i, name in enumerate(names):
        serve(tree, name, range(100 * i, 100 * i + 10 + i))
    wanted = [k for i in range(3) for k in (*range(100 * i, 100 * i + 10 + i), 99)]
    node = serve(tree, "n", wanted, names)
    assert set(node.owners) == set("cba"[:max_owners])
    assert node.num_owned == len(wanted) - sum(node.owners.values())


def test_at_least_one_owner():
    with pytest.raises(ValueError, match="max_owners"):
        DeltaTree(0)


def test_merge_absorbs_what_can_be_read():
    tree = DeltaTree()
    serve(tree, "a", range(20))
    serve(tree, "x", range(100, 120))
    child = serve(tree, "b", [50, *range(20), *range(100, 120), 60], ["a", "x"])
    tree.drop("x")
    assert tree.merge("b") == (child.pieces[0],)
    assert tree["b"].own == (Span(0, 21), Span(41, 42))
    assert tree["b"].exact_len == 1
    assert tree.drop("a") == frozenset()
    # What it absorbed is approximate where it stands now.
    assert np.flatnonzero(tree.donor("b").material).tolist() == [0]


def test_a_node_is_inserted_once():
    tree = DeltaTree()
    tree.insert(root("a", 5))
    with pytest.raises(ValueError, match="in the tree already"):
        tree.insert(root("a", 5))


def test_parent_children_and_siblings_are_relatives():
    tree = DeltaTree()
    for name, parent in [("a", None), ("b", "a"), ("c", "a"), ("d", "b"), ("e", None)]:
        tree.insert(root(name, 3, parent=parent))
    assert sorted(tree.relatives("b")) == ["a", "c", "d"]
    assert sorted(tree.relatives("a")) == ["b", "c"]
    assert tree.relatives("e") == []
    assert [tree.depth(n) for n in "abcde"] == [0, 1, 1, 2, 0]
    tree.drop("a")
    assert [tree.depth(n) for n in "bcde"] == [0, 0, 1, 0]


@st.composite
def nodes(draw):
    n = draw(st.integers(1, 30))
    mask = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    edges = np.flatnonzero(np.diff([0, *mask, 0])).reshape(-1, 2)
    return Node("a", "ns", np.zeros(n, np.uint64), tuple(Span(int(a), int(b)) for a, b in edges))


@given(nodes(), st.integers(0, 30), st.integers(1, 10))
def test_rows_of_owned_positions(node, start, length):
    rows = {}
    for span in node.own:
        for position in range(span.start, span.end):
            rows[position] = len(rows)
    assert node.num_owned == len(rows)
    wanted = range(start, start + length)
    whole = all(p in rows for p in wanted)
    assert node.owned_row(start, length) == (rows[start] if whole else None)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"own": (Span(0, 3), Span(2, 5))}, "overlap"),
        ({"own": (Span(0, 0),)}, "empty"),
        ({"own": (Span(3, 2),)}, "empty"),
        ({"own": (Span(-1, 2),)}, "overlap"),
        ({"own": (Span(0, 11),)}, "beyond"),
        ({"own": (Span(5, 6), Span(0, 2))}, "ascending"),
        ({"own": (Span(0, 4),), "pieces": (Piece("b", 0, 3, 2),)}, "overlap"),
        ({"own": (), "pieces": (Piece("b", 0, 8, 3),)}, "beyond"),
        ({"own": (), "pieces": (Piece("b", 0, 5, 1), Piece("b", 0, 1, 2))}, "ascending"),
        ({"own": (), "exact_len": 11}, "beyond"),
        ({"own": (), "exact_len": -1}, "beyond"),
    ],
)
def test_a_node_that_cannot_be_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        Node("a", "ns", np.zeros(10, np.uint64), **fields)


# -- what it is for ---------------------------------------------------------------------------


def lab_reports(count: int) -> list[np.ndarray]:
    """Reports of one form, about 400 words each, that differ in their numbers."""
    analytes = [
        "haemoglobin", "haematocrit", "leukocytes", "thrombocytes", "sodium", "potassium",
        "calcium", "creatinine", "urea", "glucose", "bilirubin", "albumin", "ferritin", "CRP",
        "TSH",
    ]  # fmt: skip
    form = (
        "you are a careful assistant of a hospital laboratory . explain the report below to a "
        "patient in plain words , say which values need attention and why , and never guess a "
        "diagnosis . \n report of the central laboratory , taken in the morning , fasting : \n "
    )
    lines = [
        f"{name} measured in venous blood by the standard method : {{}} . {{}} in the unit of it , "
        f"reference range of adults \n"
        for name in analytes
    ]
    end = " please explain what this means and what i should ask my doctor next week ."
    rng = np.random.default_rng(0)
    words: dict[str, int] = {}
    reports = []
    for _ in range(count):
        filled = (line.format(rng.integers(1, 300), rng.integers(10)) for line in lines)
        text = form + " ".join(filled) + end
        reports.append(to_keys(words.setdefault(w, len(words)) for w in text.split()))
    return reports


@pytest.mark.parametrize("repair", [NoRepair(), BoundaryWindow(1)], ids=["no repair", "window"])
def test_a_hundred_lab_reports_take_a_fifth_of_the_room(repair):
    """Served each by the latest report, and by the one that owns most of what that one shows.

    The second matters with repairs: a repaired position is no material, so reports that know only
    the one before them would repair more and more of it.
    """
    tree = DeltaTree()
    computed = []
    for i, keys in enumerate(lab_reports(100)):
        donors = []
        if i:
            borrowed = tree[f"r{i - 1}"].owners
            donors = [f"r{i - 1}", *sorted(borrowed, key=lambda o: -borrowed[o])[:1]]
        computed.append(serve(tree, f"r{i}", keys, donors, PlannerOptions(), repair).num_owned)
    lengths = [len(node) for node in tree]
    assert 380 <= np.mean(lengths) <= 420
    assert tree.num_tokens_whole == sum(lengths)
    assert tree.num_tokens_owned == sum(computed)
    assert tree.num_tokens_owned * 5 <= tree.num_tokens_whole
    # Reuse does not wear out with the generations.
    assert np.mean(computed[-20:]) <= 1.1 * np.mean(computed[1:21])
    # The first report is read by all, and nobody's KV is needed through more than one step.
    assert all("r0" in node.owners for node in tree if node.node_id != "r0")
