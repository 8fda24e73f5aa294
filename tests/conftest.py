"""Shapes in signatures are checked in every test; tests run on the CPU and compile once."""

import os
import signal
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# What a shell starts in the background ignores Ctrl-C, and so would all that tests start and stop.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What one test compiles, no other needs to again, in this process or in those that tests start.
_compiled = tempfile.TemporaryDirectory(prefix="compiled-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _compiled.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
