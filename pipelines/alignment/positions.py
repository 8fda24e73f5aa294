"""What is known of the student's positions: the teacher's position, its label, and the chain rule.

A student's position speaks of the bytes that follow it. If a teacher's token begins at the same
byte, the teacher's distribution there is over tokens that begin with these bytes. Let t₁ be the
teacher's own next token there and y the student's. If y covers the whole teacher tokens t₁ … t_m,
    P(y) = P(t₁) · Π_{i ≥ 2} P(t_i | t₁ … t_{i−1})
by the stored next-token probabilities of m consecutive positions.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Positions:
    """n positions of the student that a teacher's position speaks of.

    `following` int32 [n]: t₁, the teacher's next token in the text.
    `label` int32 [n]: y, the student's.
    `label_logprob` float64 [n]: log P(t₁), in nats; −inf if it is not stored.
    `rest` float64 [n]: Σ_{i ≥ 2} log P(t_i | …), 0 for m = 1; −inf if y does not end where a
    teacher's token ends, or if one of them is not stored.
    `first` int32 [n]: the student's id that t₁ is given to; −1 for none.
    """

    following: Int[np.ndarray, " n"]
    label: Int[np.ndarray, " n"]
    label_logprob: Float[np.ndarray, " n"]
    rest: Float[np.ndarray, " n"]
    first: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, some: slice | np.ndarray) -> "Positions":
        return Positions(*(array[some] for array in vars(self).values()))

    @property
    def moved(self) -> Float[np.ndarray, " n"]:
        """The share of P(t₁) that belongs to y and not to `first`, float64."""
        return np.where(self.first == self.label, 0.0, np.exp(self.rest))

    @property
    def known(self) -> Bool[np.ndarray, " n"]:
        """Whether the projected distribution holds the label. Elsewhere it would deny the text."""
        return (self.first == self.label) | np.isfinite(self.rest)


def positions_of(
    source: Int[np.ndarray, " n"],
    spans: Int[np.ndarray, " n"],
    label: Int[np.ndarray, " n"],
    *,
    tokens: Int[np.ndarray, " m"],
    label_logprobs: Float[np.ndarray, " m"] | None,
    first: Int[np.ndarray, " vocabulary"],
) -> Positions:
    """The positions whose `source`, an index into the teacher's `tokens`, is not negative.

    `spans` are m of the module's docstring, 0 if y ends inside a token. `label_logprobs` are the
    stored log P of the token behind each of `tokens`; None if the cache has none, so that only
    m = 1 is known. `first` is the student's id of each of the teacher's.
    """
    following = tokens[source + 1]
    stored = np.full(len(tokens), -np.inf) if label_logprobs is None else label_logprobs
    stored = stored.astype(np.float64)
    rest = np.where(spans >= 1, 0.0, -np.inf)
    for ahead in range(1, int(spans.max(initial=0))):
        longer = np.flatnonzero(spans > ahead)
        rest[longer] += stored[source[longer] + ahead]
    return Positions(
        following.astype(np.int32), label, stored[source], rest, first[following].astype(np.int32)
    )
