"""One text as two tokenizers' tokens, laid over the same bytes."""

import numpy as np

from decant.models.text.alignment import align_segment
from decant.models.text.projection import project_vocabulary
from decant.models.text.spelling import token_spelling
from tests.models.text.test_tokenizer import rebuilt


def test_with_one_tokenizer_every_position_speaks_of_itself():
    tokenizer = rebuilt()
    spelling, projection = token_spelling(tokenizer), project_vocabulary(tokenizer, tokenizer)
    (ids,) = tokenizer.encode_batch(["ab 12 ab<|end|>"])
    made = align_segment(
        ids,
        np.ones(len(ids), bool),
        teacher=spelling,
        student=tokenizer,
        student_spelling=spelling,
        mapping=projection.special,
        begins=True,
    )
    n = len(ids)
    assert made.tokens.tolist() == ids.tolist()
    assert made.source.tolist() == [*range(n - 1), -1]
    assert made.spans.tolist() == [1] * (n - 1) + [0]
    assert made.counted.all()
    assert projection.first.tolist() == [*range(tokenizer.size)]
    assert projection.exact.all()
    assert projection.overlap == projection.teacher_overlap == 1
