"""Tasks: their prompts, and their metrics against values computed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshare_mm import ConfigError
from kvshare_mm.apps.bench.tasks import TASKS, Item
from kvshare_mm.apps.bench.tasks.base import similar_examples
from kvshare_mm.apps.bench.tasks.facts import leaks, states
from kvshare_mm.apps.bench.tasks.multidoc import f1
from kvshare_mm.apps.bench.tasks.summaries import rouge_l


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture
def translations(tmp_path: Path) -> Path:
    return write(
        tmp_path / "wmt20_de-en.jsonl",
        [{"source": f"Satz Nummer {i}", "reference": f"This is sentence {i}."} for i in range(60)],
    )


@pytest.fixture
def dialogues(tmp_path: Path) -> Path:
    return write(
        tmp_path / "d.jsonl",
        [
            {
                "dialogue": f"Anna: Hello number {i}, how are you today?\nBen: Fine, and you {i}?",
                "summary": f"Anna greets Ben and asks him how he is, for time {i}.",
            }
            for i in range(40)
        ],
    )


@pytest.fixture
def passages(tmp_path: Path) -> Path:
    rows: list[dict[str, object]] = [
        {
            "question": f"Who is {i}?",
            "answers": [f"Name {i}", "N"],
            "docs": [
                {"title": f"T{i}.{k}", "text": f"Text {i} {k}", "support": k == 7}
                for k in range(10)
            ],
        }
        for i in range(5)
    ]
    return write(tmp_path / "q.jsonl", rows)


def data_for(name: str, request: pytest.FixtureRequest) -> Path | None:
    fixtures = {"translation": "translations", "summaries": "dialogues", "multidoc": "passages"}
    return request.getfixturevalue(fixtures[name]) if name in fixtures else None


def common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))


@pytest.mark.parametrize("name", list(TASKS))
def test_requests_are_similar_but_no_prefix_hit(name: str, request: pytest.FixtureRequest) -> None:
    task, path = TASKS[name], data_for(name, request)
    items = task.items(path, 5, seed=3)
    assert len(items) == 5
    assert len({item.id for item in items}) == 5
    assert items == task.items(path, 5, seed=3)
    assert items != task.items(path, 5, seed=4)
    for item in items:
        shared = set(item.donor.split("\n")) & set(item.target.split("\n"))
        assert sum(map(len, shared)) > 0.4 * len(item.target)
        assert common_prefix(item.donor, item.target) < 0.25 * len(item.target)


@pytest.mark.parametrize("name", [n for n, t in TASKS.items() if t.needs_data])
def test_tasks_say_what_is_wrong_with_their_data(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--data"):
        TASKS[name].items(None, 1, 0)
    with pytest.raises(ConfigError, match="nowhere"):
        TASKS[name].items(tmp_path / "nowhere-de-en.jsonl", 1, 0)
    other = write(tmp_path / "x-de-en.jsonl", [{"a": 1}])
    with pytest.raises(ConfigError, match=r"x-de-en\.jsonl:1 has no field"):
        TASKS[name].items(other, 1, 0)


def test_translation_needs_languages_and_enough_sentences(
    translations: Path, tmp_path: Path
) -> None:
    task = TASKS["translation"]
    assert "translate German sentences into English" in task.items(translations, 1, 0)[0].target
    with pytest.raises(ConfigError, match="languages"):
        task.items(translations.rename(tmp_path / "sentences.jsonl"), 1, 0)
    few = write(tmp_path / "few_de-en.jsonl", [{"source": "a", "reference": "b " * 20}] * 3)
    with pytest.raises(ConfigError, match="no question left"):
        task.items(few, 1, 0)


@settings(max_examples=50)
@given(st.integers(2, 6), st.integers(0, 1000))
def test_similar_examples(count: int, seed: int) -> None:
    target, donor = similar_examples(range(10), count, np.random.default_rng(seed))
    assert len(set(target)) == len(set(donor)) == len(target) == len(donor) == count
    assert len(set(target) & set(donor)) == count - 1
    assert target != donor


# -- metrics ------------------------------------------------------------------------------------


def test_bleu_is_sacrebleu_s_of_the_corpus() -> None:
    task = TASKS["translation"]
    answers = ["the cat sat on the mat", "a dog barks loudly at night", ""]
    references = ["the cat is on the mat", "a dog barks at night", "nothing was said"]
    items = [Item(str(i), "d", "t", (r,)) for i, r in enumerate(references)]
    totals = np.sum([task.statistics(a, i) for a, i in zip(answers, items, strict=True)], axis=0)
    expected = sacrebleu.corpus_bleu(answers, [references]).score
    assert task.score(totals, 3) == pytest.approx(expected)
    twice = sacrebleu.corpus_bleu(answers * 2, [references * 2]).score
    both = task.score(np.stack([totals, 2 * totals]), 3)
    assert both.tolist() == pytest.approx([expected, twice])
    same = "one two three four"
    perfect = np.array(task.statistics(same, Item("", "d", "t", (same,))))
    assert task.score(perfect, 1) == pytest.approx(100)


def test_rouge_l_by_hand() -> None:
    # The longest common subsequence is "police killed gunman": 3 of 4 and of 5 words.
    assert rouge_l("police killed the gunman", "police have killed a gunman") == pytest.approx(
        2 * (3 / 5) * (3 / 4) / (3 / 5 + 3 / 4)
    )
    assert rouge_l("a b", "c d") == 0


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("The Beatles", "beatles.", 1),
        ("Paris France", "Paris", 2 / 3),
        ("a b c d", "b d e", 2 * (2 / 3) * (2 / 3) / (4 / 3)),  # "a" is an article
        ("red red blue", "red", 0.5),
        ("yes", "yes it is", 0),
        ("Rome", "", 0),
        ("Rome", "Milan", 0),
    ],
)
def test_f1_by_hand(reference: str, answer: str, expected: float) -> None:
    assert f1(reference, answer) == pytest.approx(expected)


def test_the_best_reference_counts() -> None:
    item = Item("x", "d", "t", ("Milan", "Rome"))
    assert TASKS["multidoc"].statistics("Rome", item) == [1]
    assert TASKS["multidoc"].score(np.array([3.0]), 4) == 75


@pytest.mark.parametrize(
    ("answer", "fact", "expected"),
    [
        ("The value is 4.1 mmol/L.", "4.1", True),
        ("4.1.", "4.1", True),
        ("14.1", "4.1", False),
        ("4.15", "4.1", False),
        ("4.1", "4", False),
        ("124, not 12", "12", True),
        ("0.124", "124", False),
        ("lead.", "Lead", True),
        ("Leader", "Lead", False),
        ("carbon dioxide", "Carbon dioxide", True),
    ],
)
def test_states(answer: str, fact: str, expected: bool) -> None:
    assert states(answer, fact) is expected


def test_leaks_are_donor_facts_where_full_recompute_is_right() -> None:
    item = Item("x", "d", "t", ("121",), stale="148")
    assert leaks("148 g/L", "121 g/L", item)
    assert not leaks("121 g/L", "121 g/L", item)
    assert not leaks("77 g/L", "121 g/L", item)
    assert not leaks("148 g/L", "148 g/L", item)  # full recompute is wrong itself
    assert not leaks("148 g/L", "121", Item("x", "d", "t", ("121",)))
    task = TASKS["reports"]
    assert task.statistics("121", item) == [1]
    assert task.statistics("148", item) == task.statistics("121 or 148", item) == [0]


def test_answers_end_at_a_stop_string() -> None:
    task = TASKS["reports"]
    assert task.clean(" \n 121 g/L\n- next row") == "121 g/L"
    assert not task.ends("\n 121")  # what comes before the answer does not end it
    assert task.ends("121\n")


# -- generated facts ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "before_question"), [("reports", "\n\n"), ("exams", "\n\n"), ("letters", "\n")]
)
def test_every_fact_differs_and_can_come_from_nowhere_else(name: str, before_question: str) -> None:
    items = TASKS[name].items(None, 320, seed=0)
    assert len({item.target for item in items}) == 320
    for item in items:
        [fact] = item.references
        assert item.stale is not None
        assert fact != item.stale
        rows, question = item.target.rsplit(before_question, 1)
        assert states(rows, fact)
        assert not states(item.target, item.stale), "the target must not say the donor's fact"
        assert states(item.donor, item.stale)
        assert not states(question, fact), "the question gives it away"
