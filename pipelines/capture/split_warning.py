"""Tells, before the teacher runs, that a corpus leaves too little to judge on or to train on."""

_FEW = 8
"""Held-out rows below which figures of students are rough; `train` judges on as many."""
_MORE = "documents (of rollouts: other prompts)"


def split_warning(train: int, heldout: int, *, share: float) -> str:
    """A warning if there are too few rows of a split; empty if there are enough.

    `share` is the setting `corpus.heldout`.
    """
    untold = "Students of this cache can be trained with `heldout_rows = 0`, but not judged"
    if not share:
        return f"note: corpus.heldout is 0, so no row is held out. {untold}"
    if not heldout:
        return (
            "warning: no row is held out, because the corpus has too few documents. "
            f"{untold}. To judge them, add {_MORE} or raise corpus.heldout from {share:g}"
        )
    if not train:
        return (
            "warning: every row is held out, so there is nothing to train on. Add "
            f"{_MORE} or lower corpus.heldout from {share:g}"
        )
    if heldout < _FEW:
        rows = "row is" if heldout == 1 else "rows are"
        return (
            f"warning: only {heldout} {rows} held out, so figures of students will be rough. Add "
            f"{_MORE} or raise corpus.heldout from {share:g}"
        )
    return ""
