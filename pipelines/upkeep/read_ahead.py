"""`ReadAhead`: small files are read before they are asked for, many at once, in a known order."""

from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from itertools import islice

_AHEAD = 64
"""Files that are under way or wait to be asked for."""


class ReadAhead:
    """`read`, in a few threads, for keys that come about in an order; others are read at once."""

    def __init__(self, read: Callable[[str], bytes], order: Iterable[str], pool: Executor):
        self._read, self._order, self._pool = read, iter(order), pool
        self._begun: dict[str, Future[bytes]] = {}

    def __call__(self, key: str) -> bytes:
        """The file's bytes. Raises as `read` does."""
        for following in islice(self._order, _AHEAD - len(self._begun)):
            self._begun[following] = self._pool.submit(self._read, following)
        begun = self._begun.pop(key, None)
        return begun.result() if begun else self._read(key)
