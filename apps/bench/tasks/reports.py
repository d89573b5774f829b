"""Lab reports with other numbers: does the answer follow the new number?"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from kvshare_mm.apps.bench.tasks.base import Item
from kvshare_mm.apps.bench.tasks.facts import FactTask


@dataclass(frozen=True, slots=True)
class Analyte:
    """One row of a report: a typical value fixes the range and the decimals of drawn ones."""

    name: str
    unit: str
    normal: str
    typical: str

    def draw(self, rng: random.Random) -> str:
        decimals = len(self.typical.partition(".")[2])
        return f"{float(self.typical) * rng.uniform(0.6, 1.4):.{decimals}f}"


ANALYTES = tuple(
    Analyte(*row)
    for row in (
        ("haemoglobin", "g/L", "130 to 170", "148"),
        ("white cell count", "10^9/L", "4.0 to 10.0", "6.1"),
        ("platelet count", "10^9/L", "150 to 400", "231"),
        ("sodium", "mmol/L", "135 to 145", "141"),
        ("potassium", "mmol/L", "3.5 to 5.1", "4.24"),
        ("chloride", "mmol/L", "98 to 107", "103"),
        ("creatinine", "umol/L", "60 to 110", "84"),
        ("urea", "mmol/L", "2.5 to 7.8", "5.32"),
        ("glucose", "mmol/L", "3.9 to 5.6", "5.14"),
        ("calcium", "mmol/L", "2.20 to 2.60", "2.41"),
        ("albumin", "g/L", "35 to 50", "43.5"),
        ("bilirubin", "umol/L", "3 to 21", "12.4"),
        ("ferritin", "ug/L", "30 to 400", "118"),
        ("cholesterol", "mmol/L", "3.0 to 5.0", "4.77"),
        ("magnesium", "mmol/L", "0.70 to 1.00", "0.86"),
        ("phosphate", "mmol/L", "0.80 to 1.50", "1.12"),
    )
)
_HEADS = (
    "Laboratory report {number}. Patient: {patient}. Sample: venous blood, fasting.",
    "Blood test results for {patient}, case {number}. The sample was taken in the morning.",
    "Report number {number} of the hospital laboratory. Name of the patient: {patient}.",
)
_ROWS = (
    "- {name}: {value} {unit} (reference range {normal})",
    "{name} = {value} {unit}, normal: {normal}",
    "The {name} is {value} {unit}. The reference range is {normal}.",
)
_FOOT = (
    "All values were measured on the day of collection and checked by a second person. "
    "The sample was free of haemolysis."
)
PATIENTS = ("Anna Berg", "Tom Reyes", "Li Wei", "Maria Rossi", "John Carter", "Olga Ivanova",
             "Peter Novak", "Sara Haddad", "Emma Laurent", "David Okoro")  # fmt: skip


@dataclass(frozen=True)
class Reports(FactTask):
    """Blood reports made by seed, asked for a value that is not the donor's.

    Args:
        rows: values in a report.
        changed: values that differ from the donor's; the question is for one of them.
    """

    name: ClassVar[str] = "reports"
    about: ClassVar[str] = "lab reports: the value asked for is not the donor's"
    max_new_tokens: ClassVar[int] = 14

    rows: int = 8
    changed: int = 3

    def item(self, i: int, rng: random.Random) -> Item:
        style = rng.randrange(len(_HEADS))
        panel = rng.sample(ANALYTES, self.rows)
        before = distinct_values(panel, {}, rng)
        after = dict(before)
        for analyte in rng.sample(panel, self.changed):
            # Nowhere else in either report: stating it can only mean this fact.
            after |= distinct_values([analyte], {**before, **after}, rng)
        changed = [a for a in panel if after[a.name] != before[a.name]]
        asked = rng.choice(changed)
        other = rng.choice(changed)
        patients = rng.sample(PATIENTS, 2)
        numbers = [rng.randrange(10_000, 100_000) for _ in range(2)]
        return Item(
            str(i),
            report_text(style, numbers[0], patients[0], panel, before, other),
            report_text(style, numbers[1], patients[1], panel, after, asked),
            (after[asked.name],),
            before[asked.name],
        )


def distinct_values(
    analytes: list[Analyte], taken: Mapping[str, str], rng: random.Random
) -> dict[str, str]:
    """Values that are neither equal to each other, nor to `taken`, nor to a reference limit."""
    used = {*taken.values(), *(limit for a in ANALYTES for limit in a.normal.split(" to "))}
    drawn: dict[str, str] = {}
    for analyte in analytes:
        value = analyte.draw(rng)
        while value in used:
            value = analyte.draw(rng)
        used.add(value)
        drawn[analyte.name] = value
    return drawn


def report_text(
    style: int,
    number: int,
    patient: str,
    panel: list[Analyte],
    values: Mapping[str, str],
    asked: Analyte,
) -> str:
    rows = "\n".join(
        _ROWS[style].format(name=a.name, value=values[a.name], unit=a.unit, normal=a.normal)
        for a in panel
    )
    head = _HEADS[style].format(number=number, patient=patient)
    return (
        f"{head}\n{rows}\n{_FOOT}\n\nQuestion: What is the value of {asked.name} in this report?\n"
        f"Answer: The value of {asked.name} is"
    )
