"""Files of a work directory, and times as a person reads them."""

import pytest

from mscm import cli


def test_a_line_that_an_interruption_cut_is_left_out_and_then_replaced(tmp_path):
    """Every whole record is kept, whatever a killed writer left behind it."""
    path = tmp_path / "below" / "scores.jsonl"
    assert cli.read_json_lines(path) == []
    cli.append_json_line(path, {"step": 1})
    with open(path, "a") as file:
        file.write('{"step": 2, "sco')
    assert cli.read_json_lines(path) == [{"step": 1}]
    cli.append_json_line(path, {"step": 2})
    cli.append_json_line(path, {"step": 3})
    assert cli.read_json_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_text_is_replaced_whole(tmp_path):
    """The new text, in a folder that is made, and nothing beside it."""
    path = tmp_path / "below" / "config.json"
    cli.write_text(path, "old and long")
    cli.write_text(path, "new")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (3599.6, "1h 00m"), (3600.0 * 30 + 305, "30h 05m")],
)
def test_duration(seconds, text):
    assert cli.duration(seconds) == text
