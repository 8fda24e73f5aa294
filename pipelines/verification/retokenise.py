"""Are a cache's ids those of its tokenizer? Decoded to text and encoded again, they should return.

It proves that the ids are what this tokenizer makes of the text they stand for; not that the text
is that of the source, which a cache does not keep. Ids of another tokenizer decode to text as well,
but that text is spelled otherwise.
"""

from difflib import SequenceMatcher

import numpy as np

from decant.models.text.tokenizer import Tokenizer

_EDGE = 8
"""Tokens beside a cut that are not judged: the text beyond it decides how they are spelled."""
_MOST = 2048
"""Tokens of a segment that are looked at; comparing sequences takes the square of it."""


class Spelling:
    """Counts, over segments, tokens that do not return."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.judged = 0
        self.wrong = 0

    def see(self, tokens: np.ndarray, *, length: int) -> None:
        """A segment, int32 [n], of a row of `length` positions."""
        # A segment that fills its row may go on in another one, or come from there; others end
        # and, unless they are what a long document leaves over, begin where the document does.
        cut = len(tokens) == length or len(tokens) > _MOST
        tokens = tokens[:_MOST]
        own = tokens.tolist()
        again = self._tokenizer.encode_batch([self._tokenizer.decode(own)])[0].tolist()
        returned = np.zeros(len(own), bool)
        for match in SequenceMatcher(None, own, again, autojunk=False).get_matching_blocks():
            returned[match.a : match.a + match.size] = True
        judged = slice(_EDGE, len(own) - _EDGE * cut)
        self.judged += len(returned[judged])
        self.wrong += int((~returned[judged]).sum())
