"""Where compiled programs are stored."""

import jax
import pytest

from decant.trainer.run.compilation_cache import keep_compiled_programs


@pytest.fixture(autouse=True)
def unset():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_runs_in_one_directory_share_their_compiled_programs(tmp_path):
    keep_compiled_programs(tmp_path / "runs" / "one")
    first = jax.config.jax_compilation_cache_dir
    assert first.startswith(str(tmp_path / "runs" / "compiled"))
    jax.config.update("jax_compilation_cache_dir", None)
    keep_compiled_programs(tmp_path / "runs" / "two")
    assert jax.config.jax_compilation_cache_dir == first


def test_a_directory_that_jax_was_given_is_kept(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "given"))
    keep_compiled_programs(tmp_path / "runs" / "one")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "given")
