"""Opening a zarr array in TensorStore, and the limits that all arrays of a process share.

TensorStore aborts a process that forks after importing it: start processes with `spawn`.
"""

import functools
import os
from typing import Any

import tensorstore

from decant.schemas.arrays.spec import ArraySpec, metadata

_INDEX_CACHE_BYTES = 64 << 20


def open_array(kvstore: dict[str, str], spec: ArraySpec, *, context: Any) -> Any:
    """The TensorStore at `kvstore`. Metadata that is there is not asked: the spec decides."""
    return tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": kvstore,
            "metadata": metadata(spec),
            # Rows of zeros would otherwise not be written, and missing ones read as the fill.
            "store_data_equal_to_fill_value": True,
            "fill_missing_data_reads": False,
            # A sealed cache does not change: indices are read once.
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
            "metadata_cache_pool": "cache_pool#indices",
        },
        open=True,
        assume_metadata=True,
        context=context,
    ).result()


@functools.cache
def shared_context() -> Any:
    """Limits that all arrays of a process share."""
    processors = os.cpu_count() or 1
    return tensorstore.Context(
        {
            # Rows come back in another order each epoch: keeping them would help nothing, and
            # damage that happens meanwhile would go unseen.
            "cache_pool": {"total_bytes_limit": 0},
            # Without its shard's index each row costs two reads; 16 bytes an inner chunk.
            "cache_pool#indices": {"total_bytes_limit": _INDEX_CACHE_BYTES},
            "data_copy_concurrency": {"limit": max(processors, 2)},
            # Files are open only while they are read: this bounds their number.
            "file_io_concurrency": {"limit": min(max(2 * processors, 8), 64)},
        }
    )
