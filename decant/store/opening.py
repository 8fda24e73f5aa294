"""`open_store`: the store of an address, tried before it is written to."""

import contextlib
import secrets
from functools import partial
from pathlib import Path

from decant.store.base import Store, StoreError
from decant.store.clients import client_of
from decant.store.objects import ObjectStore
from decant.store.posix import PosixStore
from decant.store.urls import bucket_url, is_url


def open_store(url: str | Path, *, writing: bool = False) -> Store:
    """The store below a directory or an `s3://` or `gs://` address, with keys relative to it.

    `writing` tries a bucket's conditional writes first, with an object that is deleted again.
    ValueError for another scheme. StoreError without credentials, and for a server that ignores
    conditions.
    """
    if not is_url(url):
        return PosixStore(Path(url))
    parts = bucket_url(str(url))
    try:
        # A part that is sent twice does no harm, and a file of many should not begin anew for one.
        store = ObjectStore(
            client_of(parts), url=str(parts), parts_client=partial(client_of, parts, tries=8)
        )
    except StoreError as error:
        raise StoreError(f"{parts}: {error}") from None
    if writing:
        require_conditions(store)
    return store


def require_conditions(store: ObjectStore) -> None:
    """StoreError unless the store creates an object once and swaps only the right version."""
    key = f".decant-probe-{secrets.token_hex(8)}"
    first = store.create(key, b"first")
    try:
        again = store.create(key, b"second")
        swapped = store.swap(key, b"third", store.wrong_version)
        kept = store.get(key) == b"first"
    finally:
        with contextlib.suppress(StoreError):  # who may write need not have the right to delete
            store.delete(key)
    if not first or again or swapped or not kept:
        raise StoreError(
            f"{store.url}: this server ignores conditions of writes (If-None-Match and If-Match), "
            "so two workers would overwrite each other. Use one that keeps them: S3, Google Cloud "
            "Storage, SeaweedFS, MinIO and Ceph do"
        )
