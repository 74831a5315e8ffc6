"""Rows as JSON and as the table of ``docs/benchmarks.md``."""

import json
from collections.abc import Iterable
from pathlib import Path

from tests.benchmarks.race import Row

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
TITLES = {
    "B1": "CIFAR-10 to 94 %",
    "B2": "many networks at once",
    "B3": "a training step of ResNet-50",
    "B4": "inference",
    "B5": "per-sample gradients",
    "B6": "the host's cost of a small network",
    "B7": "an optimizer's step, ResNet-50's parameters",
    "B8": "time to the first compiled step",
    "B9": "a CPU: initialisation, evaluation, training step",
}
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
    """Markdown: for each race a table of ratios, with a column for each place where it was run.

    A ratio in bold missed its goal. Times stand only beside a GPU's ratios; all are in the file.
    """
    rows = list(rows)
    places = list(dict.fromkeys(_place(row) for row in rows if row.ratio is not None))
    letters = {place: chr(ord("a") + i) for i, place in enumerate(places)}
    lines = []
    for race in dict.fromkeys(row.race for row in rows):
        lines += [f"### {race}: {TITLES[race]}", ""]
        measured = [row for row in rows if row.race == race and row.ratio is not None]
        columns = [place for place in places if any(_place(row) == place for row in measured)]
        if columns:
            lines.append(f"| what | against | goal | {' | '.join(letters[place] for place in columns)} |")
            lines.append("|---|---|---|" + "---|" * len(columns))
        for what in dict.fromkeys(row.what for row in measured):
            first = what  # said once
            for peer in dict.fromkeys(row.peer for row in measured if row.what == what):
                own = [row for row in measured if (row.what, row.peer) == (what, peer)]
                notes = ", ".join(dict.fromkeys(row.note for row in own if row.note))
                cells = [first, f"{peer} ({notes})" if notes else peer, _number(own[-1].goal)]
                cells += ["".join(_cell(row) for row in own if _place(row) == place) for place in columns]
                lines.append(f"| {' | '.join(cells)} |")
                first = ""
        if columns:
            lines.append("")
        for row in rows:
            if row.race == race and row.ratio is None:
                lines += [f"{row.what[0].upper()}{row.what[1:]}: {row.note or 'not measured'}.", ""]
    for machine, versions, date in places:
        lines.append(f"{letters[machine, versions, date]}: {machine}; {versions}; {date}.  ")
    return "\n".join(lines).rstrip() + "\n"


def _place(row: Row) -> tuple[str, str, str]:
    return row.machine, row.versions, row.date


def _cell(row: Row) -> str:
    ratio = _number(row.ratio)
    met = row.goal is None or row.ratio is None or row.ratio <= row.goal
    times = f" ({_time(row.ours)}, {_time(row.theirs)})" if row.device != "cpu" else ""
    return f"{ratio if met else f'**{ratio}**'}{times}"


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
