"""The documented Dataset for PyTorch reads the same arrays as the cache, in worker processes."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.making.caches import tiny_cache
from tests.paths import ROOT

PYTHON = os.environ.get("DECANT_REFERENCE_PYTHON", sys.executable)
EXAMPLE = re.compile(r"```python\n(import torch\n.*?)```", re.S)
PROGRAM = """

if __name__ == "__main__":
    import sys, numpy
    rows = Rows(sys.argv[1], signals=("logits", "hidden/2"))
    loader = torch.utils.data.DataLoader(
        rows, batch_size=3, num_workers=2, multiprocessing_context="spawn"
    )
    batches = list(loader)
    arrays = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    numpy.savez(sys.argv[2], **{name: x.numpy() for name, x in arrays.items()})
    assert not {"jax", "flax", "apache_beam"} & sys.modules.keys()
"""


@pytest.mark.reference
def test_the_readmes_dataset_reads_a_cache_in_worker_processes(tmp_path):
    from decant.pipelines.config import Hidden

    cache = tiny_cache(tmp_path, draws=4, hidden=Hidden(layers=(2,), dtype="int8"))
    (example,) = EXAMPLE.findall((ROOT / "docs" / "pytorch.md").read_text(encoding="utf-8"))
    assert len([line for line in example.splitlines() if line]) <= 15
    program = tmp_path / "program.py"
    program.write_text(example + PROGRAM)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [PYTHON, str(program), str(cache.path), str(tmp_path / "arrays.npz")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = cache.read(cache.rows(split="train"), signals=("logits", "hidden/2"))
    with np.load(tmp_path / "arrays.npz") as arrays:
        assert set(arrays) == set(expected)
        for name, array in expected.items():
            np.testing.assert_array_equal(arrays[name], array, err_msg=name)
