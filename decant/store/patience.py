"""How long and how often to try again: pauses that grow, with chance in them, up to a deadline."""

import random
import time
from dataclasses import dataclass, field

from decant.store.troubles import Again


@dataclass
class Patience:
    """The pauses of one verb. Seconds."""

    long: float = 60.0
    """For a server that is busy or fails."""
    soon: float = 4.0
    """For a server that may not be there at all."""
    pause: float = 0.05
    started: float = field(default_factory=time.monotonic)

    def wait(self, again: Again) -> bool:
        """Sleep, then True; False, at once, if there is no time left or no use."""
        limit = {"soon": self.soon, "long": self.long}.get(again, 0.0)
        pause = self.pause * random.uniform(0.5, 1.5)
        if time.monotonic() - self.started + pause > limit:
            return False
        time.sleep(pause)
        self.pause = min(self.pause * 2, 5.0)
        return True
