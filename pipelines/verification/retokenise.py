"""Checks that the rows' ids come from the cache's tokenizer: decoding and encoding returns them.

Ids of another tokenizer also decode to some text, but encoding that text gives other ids. The check
cannot tell whether the text is the source's: a cache does not keep the text.
"""

from difflib import SequenceMatcher

import numpy as np

from decant.models.text.tokenizer import Tokenizer

_EDGE = 8
"""Tokens beside a cut that are not judged: text beyond the cut decides how they are encoded."""
_MOST = 2048
"""Tokens of a segment that are compared, at most; the time to compare grows with its square."""


class Spelling:
    """Counts the tokens that decoding and encoding again does not return."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.judged = 0
        self.wrong = 0

    def see(self, tokens: np.ndarray, *, length: int) -> None:
        """Judge a segment, int32 [n], of a row of `length` positions."""
        # A segment that fills its row may continue in another row, and one without EOS in a piece
        # of the other split. Any segment may begin in the middle of a long document.
        ends = len(tokens) < length and tokens[-1] == self._tokenizer.eos_id
        cut = not ends or len(tokens) > _MOST
        tokens = tokens[:_MOST]
        own = tokens.tolist()
        again = self._tokenizer.encode_batch([self._tokenizer.decode(own)])[0].tolist()
        returned = np.zeros(len(own), bool)
        for match in SequenceMatcher(None, own, again, autojunk=False).get_matching_blocks():
            returned[match.a : match.a + match.size] = True
        judged = slice(_EDGE, len(own) - _EDGE * cut)
        self.judged += len(returned[judged])
        self.wrong += int((~returned[judged]).sum())
