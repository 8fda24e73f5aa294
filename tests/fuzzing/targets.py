"""Every reader of foreign files that is fuzzed, by name. To add one, add a `Target`."""

import json
from pathlib import Path

from decant.models.checkpoints.gguf_file import GgufFile
from decant.models.checkpoints.safetensors_files import SafetensorsFiles
from decant.models.families import config_to_json
from decant.models.text.gguf_tokenizer import tokenizer_files as gguf_tokenizer_files
from decant.models.text.tokenizer import Tokenizer
from tests.fuzzing.cache_targets import CACHE_TARGETS
from tests.fuzzing.companion_targets import COMPANION_TARGETS
from tests.fuzzing.target import Target
from tests.making.caches import tokenizer_files
from tests.making.models import (
    CONFIG,
    HF_CONFIG,
    hf_tensors,
    tokenizer_metadata,
    write_gguf,
    write_hf,
)
from tests.paths import GOLDEN


def configs(_: Path) -> list[bytes]:
    files = sorted((GOLDEN / "families").glob("*/config.json"))
    return [*(file.read_bytes() for file in files), json.dumps(config_to_json(CONFIG)).encode()]


def read_config(path: Path) -> None:
    config_to_json(SafetensorsFiles(path.parent).config)


def gguf_files(directory: Path) -> list[bytes]:
    # Few weights: what is fuzzed is the header.
    few = {name: tensor for name, tensor in hf_tensors().items() if tensor.ndim == 1}
    return [write_gguf(directory / "a.gguf", few).read_bytes()]


def read_gguf(path: Path) -> None:
    """All that opening a teacher reads; each part has its own chance to fail."""
    file = GgufFile(path)
    failed: Exception | None = None
    for part in (
        lambda: file.config,
        file.tokenizer,
        lambda: [file.read(name) for name in file.shapes],
    ):
        try:
            part()
        except (ValueError, OSError) as error:
            failed = error
    if failed:
        raise failed


def safetensors(directory: Path) -> list[bytes]:
    few = {name: tensor for name, tensor in hf_tensors().items() if tensor.ndim == 1}
    return [(write_hf(directory, few) / "model.safetensors").read_bytes()]


def read_safetensors(path: Path) -> None:
    (path.parent / "config.json").write_text(json.dumps(HF_CONFIG))
    files = SafetensorsFiles(path.parent)
    for name in files.shapes:
        files.read(name)


def headers(directory: Path) -> list[bytes]:
    """The JSON in the file's header, so that its values can be changed and not only its bytes."""
    (file,) = safetensors(directory)
    return [file[8 : 8 + int.from_bytes(file[:8], "little")]]


def read_header_of_safetensors(path: Path) -> None:
    header = path.read_bytes()
    file = path.with_name("model.safetensors")
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(640))
    read_safetensors(file)


def indices(_: Path) -> list[bytes]:
    return [(GOLDEN / "families" / "mistral" / "model.safetensors.index.json").read_bytes()]


def read_index(path: Path) -> None:
    (path.parent / "config.json").write_text(json.dumps(HF_CONFIG))
    for file in (GOLDEN / "families" / "mistral").glob("*.safetensors"):
        here = path.parent / file.name
        if not here.exists():
            here.write_bytes(file.read_bytes())
    files = SafetensorsFiles(path.parent)
    for name in files.shapes:
        files.read(name)


def tokenizers(_: Path) -> list[bytes]:
    return [tokenizer_files(400)["tokenizer.json"], tokenizer_files_of_gguf()]


def tokenizer_files_of_gguf() -> bytes:
    """Byte-level BPE with merges, a normaliser and a split by an expression."""
    fields = tokenizer_metadata(**{"ggml.pre": "qwen2"})
    metadata = {f"tokenizer.{name}": value for name, value in fields.items()}
    return gguf_tokenizer_files(metadata, where="here")["tokenizer.json"]


def read_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer.from_files(path.parent)
    for text in ("", "Hello, wörld 123 <|im_end|>\n", "e\u0301 字" * 50):
        (ids,) = tokenizer.encode_batch([text])
        tokenizer.decode(ids)
    tokenizer.difference(tokenizer)


TARGETS = (
    CACHE_TARGETS
    | COMPANION_TARGETS
    | {
        "config": Target("config.json", configs, read_config, is_json=True),
        "index": Target("model.safetensors.index.json", indices, read_index, is_json=True),
        "gguf": Target("model.gguf", gguf_files, read_gguf),
        "header": Target("header.json", headers, read_header_of_safetensors, is_json=True),
        "tokenizer": Target("tokenizer.json", tokenizers, read_tokenizer, is_json=True),
        "safetensors": Target("model.safetensors", safetensors, read_safetensors),
    }
)
