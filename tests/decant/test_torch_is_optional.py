"""Without torch, decant works, and decant.torch says what to install."""

import subprocess
import sys

from tests.paths import ROOT, environment

PROGRAM = """
import sys
sys.modules["torch"] = None  # as if it were not installed
import decant
try:
    import decant.torch
except ModuleNotFoundError as error:
    print(error)
assert not {"jax", "flax"} & sys.modules.keys()
"""


def test_without_torch_the_error_says_what_to_install():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "decant.torch needs torch: pip install torch\n"
