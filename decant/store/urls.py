"""Addresses such as `s3://bucket/cache`: what is one, and the error for one that is unsupported."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

BUCKETS = ("s3", "gs")
"""Schemes that `open_store` opens."""
# pathlib turns `gs://b` into `gs:/b`, and `gs://` into `gs:`. One letter is a drive of Windows.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?:/+|$)")


class BucketUrl(NamedTuple):
    """`s3://bucket/a/b` in parts."""

    scheme: str
    bucket: str
    prefix: str
    """`a/b`; empty for the whole bucket."""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")


def is_url(text: str | Path) -> bool:
    """Whether it is an address such as `gs://bucket/cache`, also after pathlib took a slash."""
    return bool(_URL.match(str(text)))


def url_of(text: str | Path) -> str | None:
    """The address, with both slashes; None for a path on this machine."""
    found = _URL.match(str(text))
    return f"{found[1].lower()}://{str(text)[found.end() :]}" if found else None


def scheme_of(text: str | Path) -> str:
    """`s3` of `s3://bucket/cache`; empty for a path on this machine."""
    found = _URL.match(str(text))
    return found[1].lower() if found else ""


def bucket_url(url: str) -> BucketUrl:
    """The parts of an `s3://` or `gs://` address. ValueError if it is none, or has no bucket."""
    require_scheme(url, BUCKETS)
    bucket, _, prefix = str(url_of(url)).partition("://")[2].partition("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}", bucket):
        raise ValueError(
            f"{url}: {bucket!r} cannot be the name of a bucket; expected "
            f"{scheme_of(url)}://BUCKET/NAME"
        )
    return BucketUrl(scheme_of(url), bucket, prefix.strip("/"))


def require_scheme(text: str | Path, supported: Sequence[str], *, name: str = "") -> None:
    """ValueError if the address has another scheme than the `supported` ones; paths are fine.

    `name` is the setting that holds it.
    """
    scheme = scheme_of(text)
    if scheme and scheme not in supported:
        known = ", ".join(["a local path", *(f"{one}://" for one in supported)])
        where = f"{name} is {url_of(text)}" if name else f"{url_of(text)}"
        raise ValueError(f"{where}: '{scheme}://' is not supported here; supported: {known}")
