"""What the DELTA tree is for: many similar requests take little room."""

from __future__ import annotations

import numpy as np
import pytest

from kvshare_mm.reuse.plan import PlannerOptions
from kvshare_mm.reuse.repair import BoundaryWindow, NoRepair
from kvshare_mm.reuse.tree import DeltaTree

from .plans import to_keys
from .trees import serve


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

    The second matters with repairs: a repaired position is no reusable, so reports that know only
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
