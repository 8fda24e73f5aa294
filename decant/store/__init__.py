"""Where bytes lie: a directory, or a bucket behind `s3://` and `gs://`, with the same few verbs.

`open_store(url)` gives a `Store`: `get`, `head`, `create`, `swap`, `put`, `list`, `delete`. It
knows nothing of caches or corpora.
"""

from decant.store.base import ChangedError, Head, Store, StoreError
from decant.store.opening import open_store
from decant.store.urls import is_url, url_of

__all__ = ["ChangedError", "Head", "Store", "StoreError", "is_url", "open_store", "url_of"]
