"""Shapes in signatures are checked in every test, and tests run on the CPU."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
