"""Rows as JSON and as the table of ``docs/benchmarks.md``."""

import json
from collections.abc import Iterable
from pathlib import Path

from tests.benchmarks.race import Row

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- races: generated -->", "<!-- races: end -->"


def read(file: Path) -> list[Row]:
    """The rows of a JSON file; none if there is no such file."""
    return [Row(**entry) for entry in json.loads(file.read_text())] if file.exists() else []


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """New rows take the place of old ones of the same comparison on the same machine; in the order of races.

    A row that says that a race was not run goes as soon as there are figures from such a device.
    """
    merged = {row.key: row for row in (*old, *new)}
    run = {(row.race, row.device) for row in merged.values() if row.ratio is not None}
    kept = [row for row in merged.values() if row.ratio is not None or (row.race, row.device) not in run]
    # Stable: within a race as they were measured.
    return sorted(kept, key=lambda row: (row.race, row.device, row.machine))


def write(file: Path, rows: Iterable[Row]) -> None:
    """One row a line, so that a new measurement is a small change."""
    lines = ",\n".join(json.dumps(row._asdict()) for row in rows)
    file.write_text(f"[\n{lines}\n]\n")


def render(rows: Iterable[Row]) -> str:
    """Markdown. Where a goal was missed the ratio is followed by the goal."""
    rows = list(rows)
    places = list(dict.fromkeys((row.machine, row.versions, row.date) for row in rows if row.ratio is not None))
    lines = ["| race | what | against | ratio | goal | ours | theirs | where |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row.race, row.what, row.peer]
        if row.ratio is None:
            cells += ["", _number(row.goal), "", "", row.note or "not measured"]
        else:
            letter = chr(ord("a") + places.index((row.machine, row.versions, row.date)))
            met = row.goal is None or row.ratio <= row.goal
            ratio = f"{row.ratio:.2f}" if met else f"**{row.ratio:.2f}**"
            cells += [ratio, _number(row.goal), _time(row.ours), _time(row.theirs)]
            cells += [f"{letter}; {row.note}" if row.note else letter]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for i, (machine, versions, date) in enumerate(places):
        lines.append(f"{chr(ord('a') + i)}: {machine}; {versions}; {date}.  ")
    return "\n".join(lines).rstrip() + "\n"


def update(rows: Iterable[Row], page: Path = PAGE) -> None:
    """Put the table into the page, between its marks."""
    head, _, rest = page.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    page.write_text(f"{head}{BEGIN}\n\n{render(rows)}\n{END}{tail}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _time(milliseconds: float | None) -> str:
    if milliseconds is None:
        return ""
    if milliseconds < 1:
        return f"{milliseconds * 1e3:.0f} us"
    return f"{milliseconds:.3g} ms" if milliseconds < 1e3 else f"{milliseconds / 1e3:.3g} s"
