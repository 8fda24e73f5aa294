"""The format of a corpus file, told by its suffix, and the formats that cannot be read as text."""

from typing import Literal

Format = Literal["text", "jsonl", "json", "csv", "parquet"]
"""How documents lie in a file: one text, or records in lines, in JSON or in a table."""
COMPRESSIONS = (".gz", ".zst")
_BY_SUFFIX: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
_REFUSED = {
    "a table of tabs; write it as .csv or .parquet": ".tsv .tab",
    "a document of an office; write its text to a .txt file": ".pdf .doc .docx .odt .rtf .ppt "
    ".pptx .epub .djvu .ps",
    "a sheet; write it as .csv or .parquet": ".xls .xlsx .ods",
    "an archive; unpack it": ".zip .tar .tgz .bz2 .xz .7z .rar .lz4 .jar .whl",
    "a table of another kind; write it as .parquet": ".arrow .feather .avro .orc .sqlite .db",
    "numbers, not text": ".npy .npz .pkl .pickle .pt .pth .bin .safetensors .gguf .onnx .h5 .mat "
    ".msgpack .tfrecord",
    "a program, not text": ".exe .dll .so .dylib .o .a .class .pyc .wasm",
    "a picture, not text": ".png .jpg .jpeg .gif .bmp .webp .tif .tiff .ico .heic",
    "sound or film, not text": ".mp3 .wav .flac .ogg .m4a .mp4 .mkv .avi .mov .webm",
}
_REASONS = {suffix: why for why, suffixes in _REFUSED.items() for suffix in suffixes.split()}


def compression_of(path: str) -> str:
    """`.gz` or `.zst` if the whole file is compressed, else an empty string."""
    return next((suffix for suffix in COMPRESSIONS if path.lower().endswith(suffix)), "")


def format_of(path: str) -> Format:
    """The format of a file; a suffix that says nothing else is a text's."""
    return _BY_SUFFIX.get(_suffix(path), "text")


def format_before_0_9(path: str) -> Format:
    """The format that releases before 0.9 read a file of this name in."""
    known = _suffix(path) == ".jsonl" or path.lower().endswith(".parquet")
    return format_of(path) if known else "text"


def unreadable(path: str) -> str:
    """Why a file of this name is not read; empty if it is."""
    if compression_of(path) and format_of(path) == "parquet":
        return "compressed Parquet; unpack it"
    return _REASONS.get(_suffix(path), "")


def _suffix(path: str) -> str:
    """The last suffix before that of the compression, in lower case."""
    lower = path.lower()
    name = lower.removesuffix(compression_of(lower)).rpartition("/")[2]
    return f".{name.rpartition('.')[2]}" if "." in name.lstrip(".") else ""
