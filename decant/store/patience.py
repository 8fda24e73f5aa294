"""How long and how often to try again: pauses that grow, with chance in them, up to a limit.

A limit is a time and a number of tries, and both must be used up. On a busy machine, or with large
objects, one request may take all of the time.
"""

import random
import time
from collections import Counter
from dataclasses import dataclass, field

from decant.store.troubles import Again

_LEAST_TRIES = {"absent": 2, "damaged": 8, "busy": 4, "long": 4}
"""Tries that fail in this way before a verb gives up, whatever time they took."""


@dataclass
class Patience:
    """The pauses of one verb. Seconds."""

    long: float = 60.0
    """For a server that is busy or fails."""
    soon: float = 4.0
    """For a server that may not be there at all, or sends other bytes than it should."""
    pause: float = 0.05
    started: float = field(default_factory=time.monotonic)
    failed: Counter[Again] = field(default_factory=Counter)
    """Tries by how they failed."""

    def wait(self, again: Again, *, asked: float = 0.0) -> bool:
        """Sleep, then True; False, at once, if there is no time left or no use.

        `asked` is how long the server asks to be left alone: the pause is no shorter, and False if
        that is longer than the time left.
        """
        self.failed[again] += 1
        if again in ("no", "missing"):
            return False
        limit = self.long if again in ("busy", "long") else self.soon
        left = max(limit - (time.monotonic() - self.started), 0.0)
        pause = max(self.pause * random.uniform(0.5, 1.5), asked * random.uniform(1.0, 1.1))
        if asked > left or (pause > left and self.failed[again] >= _LEAST_TRIES[again]):
            return False
        time.sleep(pause)
        self.pause = min(self.pause * 2, 5.0)
        return True
