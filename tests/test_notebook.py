"""The notebook, from its first cell to its last."""

import json
import re
import tokenize
from io import StringIO
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "launch" / "colab_demo.ipynb"


@pytest.fixture  # of each test its own: to run it writes outputs into it
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_a_notebook_without_what_a_run_left(notebook):
    nbformat.validate(notebook)
    assert not any(cell.outputs or cell.execution_count for cell in code_of(notebook))
    text = NOTEBOOK.read_text()
    assert text == json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n"


def test_its_lines_are_like_ours(notebook):
    for cell in notebook.cells:
        assert all(len(line) <= 130 for line in cell.source.splitlines())
    for cell in code_of(notebook):
        list(tokenize.generate_tokens(StringIO(cell.source).readline))


@pytest.mark.slow  # three trainings, though short ones, and a comparison
def test_it_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    """With a tenth of the training, and fewer steps of the teacher; what it would show is there, without a warning."""
    shorter = {r"LENGTH = 0\.5": "LENGTH = 0.05", r"teacher_steps=\([\d,]+\)": "teacher_steps=(1,2)"}
    for pattern, text in shorter.items():
        found = [cell for cell in code_of(notebook) if re.search(pattern, cell.source)]
        assert found
        for cell in found:
            cell.source = re.sub(pattern, text, cell.source)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    outputs = [output for cell in code_of(notebook) for output in cell.outputs]
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    pictures = [output for output in outputs if "image/png" in output.get("data", ())]
    assert len(pictures) == 5 and "Warning" not in said and "Traceback" not in said
    for name in ("demo", "samples", "runs/digits_cd4/report/samples", "runs/compare/compare"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 40
    assert re.search(r"\| digits_cd4 .*ddim", said)
