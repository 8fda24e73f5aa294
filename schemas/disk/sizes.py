"""Bytes as text for people."""


def size_text(size: int) -> str:
    """`size` bytes in the largest unit of at least one: `712 bytes`, `3.4 kB`, `1.2 TB`."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size:,} bytes"
