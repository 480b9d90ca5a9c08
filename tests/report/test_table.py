"""Tables: aligned as text, valid as Markdown."""

import numpy as np
import pytest

from mscm.report.table import format_table


def test_alignment():
    table = format_table(
        ["run", "steps", "distance"],
        [["teacher", 256, 1.70096], ["student", 4, np.float32(12.5)], ["none", None, "3.10"]],
    )
    assert table == "\n".join([
        "| run     | steps | distance |",
        "| ------- | ----: | -------: |",
        "| teacher |   256 |    1.701 |",
        "| student |     4 |     12.5 |",
        "| none    |       |     3.10 |",
    ])


def test_lines_have_equal_length_and_pipes_are_escaped():
    lines = format_table(["a", "b|c"], [["x|y", 1], ["two\nlines", "-"]]).split("\n")
    assert len({len(line) for line in lines}) == 1 and len(lines) == 4
    assert r"x\|y" in lines[2] and "two lines" in lines[3]
    assert lines[1] == "| --------- | ---- |"  # '-' is no number: the column stays left-aligned


def test_no_rows():
    assert format_table(["a"], []) == "| a   |\n| --- |"


def test_ragged_rows_are_refused():
    with pytest.raises(ValueError, match="row 1 has 1 cells, expected 2"):
        format_table(["a", "b"], [[1, 2], [3]])
