"""Open a zarr array in TensorStore, with limits that all arrays of a process share.

TensorStore aborts a process that forks after importing it; start processes with `spawn`.
"""

import functools
from typing import Any

import tensorstore

from decant.schemas.arrays.spec import ArraySpec, metadata
from decant.schemas.host import cores

_INDEX_CACHE_BYTES = 64 << 20


def open_array(kvstore: dict[str, str], spec: ArraySpec, *, context: Any) -> Any:
    """The array at `kvstore`. `spec` decides its metadata; stored metadata is not read."""
    return tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": kvstore,
            "metadata": metadata(spec),
            # Otherwise rows of zeros would not be written and missing rows would read as the fill.
            "store_data_equal_to_fill_value": True,
            "fill_missing_data_reads": False,
            # A sealed cache does not change, so each index is read once.
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
    """The TensorStore context with the limits that all arrays of a process share."""
    processors = cores()
    return tensorstore.Context(
        {
            # No cache of rows: each epoch has another order, so it would not help, and it would
            # hide damage that happens meanwhile.
            "cache_pool": {"total_bytes_limit": 0},
            # A cached shard index (16 bytes per inner chunk) saves one of two reads per row.
            "cache_pool#indices": {"total_bytes_limit": _INDEX_CACHE_BYTES},
            "data_copy_concurrency": {"limit": max(processors, 2)},
            # A file is open only while it is read, so this bounds the number of open files.
            "file_io_concurrency": {"limit": min(max(2 * processors, 8), 64)},
        }
    )
