"""Freed memory is used again: arrays of the next batch cause no page faults."""

import subprocess
import sys

import pytest

from tests.paths import environment

CODE = """
import resource, sys
import numpy as np
from decant.trainer.run.freed_memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def batch():
    return [np.ones(1 << 20, np.uint8) for _ in range(8)]  # 256 pages each
batch()
before = faults()
for _ in range(20):
    batch()
print(faults() - before)
"""


def faults(how: str, **more: str) -> int:
    env = {k: v for k, v in environment().items() if not k.startswith("MALLOC_")} | more
    command = [sys.executable, "-c", CODE, how]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_arrays_of_the_next_batch_need_no_new_pages():
    assert faults("keep") < 1000
    assert faults("leave") > 20_000


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_the_users_own_settings_stay():
    assert faults("keep", MALLOC_MMAP_THRESHOLD_="131072", MALLOC_TOP_PAD_="0") > 20_000
