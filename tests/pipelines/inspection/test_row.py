"""One row in the terminal, compared with the arrays that the cache reads."""

import numpy as np
import pytest

from decant.models.text.tokenizer import Tokenizer
from decant.pipelines.__main__ import main
from decant.pipelines.inspection.row import row_tokens
from decant.schemas.records.rows import PADDING


def test_each_token_has_the_prediction_stored_at_the_position_before_it(cache):
    row = int(cache.rows()[1])
    tokenizer = Tokenizer.from_files(cache.tokenizer_path)
    batch = {name: array[0] for name, array in cache.read([row]).items()}
    tokens = row_tokens(cache, row, tokenizer, top=3)
    assert len(tokens) == (batch["segment_ids"] != PADDING).sum()
    assert [t.text for t in tokens] == [tokenizer.decode([i]) for i in batch["tokens"]][
        : len(tokens)
    ]
    predicted = [i for i, token in enumerate(tokens) if token.prediction]
    assert predicted == (np.flatnonzero(batch["loss_mask"]) + 1).tolist()
    for at in predicted:
        prediction = tokens[at].prediction
        ids, logprobs = batch["topk_ids"][at - 1], batch["topk_logprobs"][at - 1]
        assert [text for text, _ in prediction.alternatives] == [
            tokenizer.decode([i]) for i in ids[:3]
        ]
        is_next = ids == batch["tokens"][at]
        expected = float(np.exp(logprobs[is_next][0])) if is_next.any() else None
        assert prediction.probability == (None if expected is None else pytest.approx(expected))


def test_a_row_is_shown_in_the_terminal_and_one_that_is_not_there_refused(cache, capsys, tmp_path):
    assert main(["inspect", str(cache.path), "--row", "0", "--top", "2"]) == 0
    assert "likeliest" in capsys.readouterr().out
    assert main(["inspect", str(cache.path), "--row", "0", "--html", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").stat().st_size > 5000
    assert main(["inspect", str(cache.path), "--row", "9999"]) == 1
    assert "row 9999 asked for" in capsys.readouterr().err
