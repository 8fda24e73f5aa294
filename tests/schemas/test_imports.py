"""Reading a cache imports no jax, flax or Beam."""

import subprocess
import sys


def test_schemas_imports_neither_jax_nor_flax_nor_beam():
    code = (
        "import sys, decant.schemas; "
        "sys.exit(str({'jax', 'flax', 'apache_beam', 'torch'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
