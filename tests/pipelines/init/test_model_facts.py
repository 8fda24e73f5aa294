"""`decant plan MODEL` says what a model is, or why it cannot be run."""

import json

import pytest

from decant.pipelines.commands import COMMANDS
from tests.paths import GOLDEN

FAMILIES = GOLDEN / "families"


def test_a_models_family_parameters_and_bytes_are_printed(capsys):
    folder = FAMILIES / "llama"
    assert COMMANDS["plan"]([str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    # Embedding and head, and of each block four matrices of attention, three of the MLP, two norms.
    block = 2 * 32 * 64 + 2 * 32 * 32 + 3 * 32 * 40 + 2 * 32
    expected = 2 * 80 * 32 + 3 * block + 32
    assert (facts["family"], facts["parameters"]) == ("llama", expected)
    assert facts["weight_bytes"] == (folder / "model.safetensors").stat().st_size
    assert facts["memory_bytes"] == {"float32": 4 * expected, "bfloat16": 2 * expected}
    assert (facts["kinds"], facts["longest_row"], facts["unread_tensors"]) == (["BF16"], 128, 0)


def test_a_model_of_images_and_text_is_its_text_model(capsys):
    assert COMMANDS["plan"](["--quiet", str(FAMILIES / "tower_gemma3")]) == 0
    line = capsys.readouterr().out
    assert "family gemma3, " in line
    assert "tensors of other parts than the text model are not read" in line


def test_a_model_that_cannot_be_run_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="model_type is 'mamba', which we cannot run"):
        COMMANDS["plan"]([str(tmp_path)])
