"""Plain text tables that are valid Markdown too."""

import numbers
from collections.abc import Sequence
from typing import Any


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An aligned table with pipes; columns that hold only numbers are aligned to the right.

    A float is shown with four significant digits (give a string to choose otherwise) and None as an empty cell.
    """
    for index, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(
                f"format_table: row {index} has {len(row)} cells, expected {len(header)}, one for each title."
            )
    texts = [[_cell(value) for value in row] for row in rows]
    right = [is_numeric([row[c] for row in texts]) for c in range(len(header))]
    titles = [_cell(title) for title in header]
    widths = [max(3, *(len(row[c]) for row in [titles, *texts])) for c in range(len(header))]
    rule = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)]
    lines = []
    for row in [titles, rule, *texts]:
        cells = [t.rjust(w) if r else t.ljust(w) for t, w, r in zip(row, widths, right, strict=True)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        return f"{float(value):.4g}"
    return str(value).replace("|", r"\|").replace("\n", " ")  # a bare pipe would end the cell


def is_numeric(texts: Sequence[str]) -> bool:
    """Whether the cells of a column, where they are not empty, are read as numbers by a person."""
    filled = [text for text in texts if text]
    return bool(filled) and all(_is_number(text) for text in filled)


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "").rstrip("%x"))  # 1,797 and 98.5% and 4x are read as numbers by a person
    except ValueError:
        return False
    return True
