"""Output of the commands: tables and notes for people, JSON for scripts."""

import json
import math
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

# A pipe has no width, so rich would cut tables to 80 columns.
# Markup is off, because a file or a class may be called "[bold]".
screen = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
notes = Console(stderr=True, highlight=False, markup=False)


def table(*columns: str) -> Table:
    """A plain table; columns whose names end in ``>`` are aligned to the right, for numbers."""
    result = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        result.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left", no_wrap=True)
    return result


def print_json(value: Any) -> None:
    """Print JSON to standard output, without colours and wrapping; NaN and infinities become null, as JSON has none."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, (list, tuple)) else value
