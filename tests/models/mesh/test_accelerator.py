"""An accelerator that this jax cannot use is reported, with the remedy."""

import shutil

from decant.models.mesh import accelerator


def test_a_gpu_under_a_cpu_only_jax_is_reported_with_the_remedy(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name)
    notice = accelerator.unused_accelerator()
    assert notice is not None
    assert "make setup ACCEL=cuda13" in notice


def test_a_machine_without_an_accelerator_gets_no_notice(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(accelerator.Path, "exists", lambda path: False)
    assert accelerator.unused_accelerator() is None


def test_an_accelerator_in_use_is_not_reported(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(accelerator.jax, "default_backend", lambda: "gpu")
    assert accelerator.unused_accelerator() is None
