"""The example notebook, executed in a kernel on a tiny corpus."""

import json

import nbclient
import nbformat
import pytest

from tests.making.caches import write_corpus, write_teacher
from tests.paths import ROOT, environment

NOTEBOOK = ROOT / "examples" / "notebook.ipynb"


def test_the_notebook_is_kept_without_outputs():
    for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Jupyter's own
def test_the_notebook_runs_and_prints_little(tmp_path):
    write_corpus(tmp_path / "corpus")
    write_teacher(tmp_path / "teacher")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    parameters.source = (
        'CORPUS, TEACHER = "corpus/*.txt", "teacher"\n'
        'CACHE, RUN = "cache", "run"\nSEQUENCE_LENGTH, UPDATES = 64, 12'
    )
    client = nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment())
    shown = {number: texts(cell) for number, cell in enumerate(notebook.cells)}
    everything = "\n".join(text for cell in shown.values() for text in cell)
    assert "held out; " in everything
    assert "heldout_ce" in everything
    assert "agreement" in everything
    # Progress: a line every half minute at most, and the last.
    assert len(everything.splitlines()) < 60, everything


def texts(cell):
    """Every text that a cell shows."""
    for output in cell.get("outputs", ()):
        if output.output_type == "stream":
            yield output.text
        elif "data" in output:
            yield output.data.get("text/plain", "")
