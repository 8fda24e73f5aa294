"""One row in the terminal, compared with the arrays that the cache reads."""

import numpy as np
import pytest

from decant.models.text.tokenizer import Tokenizer
from decant.pipelines.__main__ import main
from decant.pipelines.inspection.row import row_origins, row_tokens, token_texts, visible
from decant.schemas.records.rows import PADDING


@pytest.fixture(scope="module")
def tokenizer(cache):
    return Tokenizer.from_files(cache.tokenizer_path)


def test_each_token_has_the_prediction_stored_at_the_position_before_it(cache, tokenizer):
    row = int(cache.rows()[1])
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
        assert [one.text for one in prediction.alternatives] == [
            tokenizer.decode([i]) for i in ids[:3]
        ]
        is_next = ids == batch["tokens"][at]
        of_label = batch["label_logprobs"][at - 1]
        expected = float(np.exp(logprobs[is_next][0] if is_next.any() else of_label))
        assert prediction.probability == pytest.approx(expected)
        drawn = zip(batch["tail_ids"][at - 1], batch["tail_logprobs"][at - 1], strict=True)
        falling = sorted({(float(np.exp(p)), tokenizer.decode([i])) for i, p in drawn})[::-1]
        assert [p for _, p in prediction.draws] == pytest.approx([p for p, _ in falling[:3]])
        assert {text for text, _ in prediction.draws} <= {text for _, text in falling}


def test_a_student_stands_beside_the_teacher(cache, tokenizer, student):
    row = int(cache.rows()[1])
    for token in row_tokens(cache, row, tokenizer, top=3, student=student):
        if prediction := token.prediction:
            assert prediction.student_probability == pytest.approx(0.125)
            assert prediction.kl == 0.75
            for one in prediction.alternatives[:3]:
                assert one.student == pytest.approx(one.teacher / 2)
            # The student's own likeliest comes last, unless the teacher's likeliest hold it too.
            if len(prediction.alternatives) == 4:
                assert prediction.alternatives[3].text == tokenizer.decode([7])


def test_every_segment_names_its_file_and_document(cache):
    row = int(cache.rows()[1])
    segments = np.unique(cache.read([row], signals=())["segment_ids"])
    origins = row_origins(cache, row)
    assert [o.segment for o in origins] == segments[segments > 0].tolist()
    assert [(o.source, o.document, o.start) for o in origins] == cache.origins(row)


def test_spaces_at_the_ends_and_line_feeds_can_be_seen():
    assert visible(" a b\n\t") == r"␣a b\n\t"
    assert visible("  ") == "␣␣"


def test_a_row_is_shown_in_the_terminal_and_one_that_is_not_there_refused(cache, capsys, tmp_path):
    assert main(["inspect", str(cache.path), "--row", "0", "--top", "2"]) == 0
    assert "likeliest" in capsys.readouterr().out
    assert main(["inspect", str(cache.path), "--row", "0", "--html", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").stat().st_size > 5000
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
    assert main(["inspect", str(cache.path), "--row", "9999"]) == 1
    assert "row 9999 asked for" in capsys.readouterr().err


def test_a_character_of_several_tokens_is_whole_at_its_last_one(tokenizer):
    (ids,) = tokenizer.encode_batch(["once 🙂½"])
    texts = list(token_texts(ids.tolist(), tokenizer))
    assert "".join(texts) == "once 🙂½"
    assert texts[-6:] == ["", "", "", "🙂", "", "½"]
    # The second half of a character, and one that the row ends in, stay visible as such.
    assert list(token_texts(ids[-1:].tolist(), tokenizer)) == ["\ufffd"]
