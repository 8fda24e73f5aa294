"""The web page of a row: its data, and that it loads nothing from elsewhere."""

import base64
import json
import re

import numpy as np

from decant.models.text.tokenizer import Tokenizer
from decant.pipelines.inspection.row import row_tokens
from decant.pipelines.inspection.row_page import row_page
from decant.schemas.targets.attention import decode_log


def test_the_page_holds_the_row_and_needs_nothing_else(cache):
    row = int(cache.rows()[1])
    tokens = row_tokens(cache, row, Tokenizer.from_files(cache.tokenizer_path), top=3)
    page = row_page(cache, row, tokens)
    assert not re.search(r"https?:|src=|@import|<link", page)
    assert "{{" not in page
    data = json.loads(re.search(r"^const data = (.*);$", page, re.M).group(1))
    assert [token["text"] for token in data["tokens"]] == [token.text for token in tokens]
    (maps,) = data["attention"]
    codes = np.frombuffer(base64.b64decode(maps["codes"]), np.uint8)
    n = len(tokens)
    stored = cache.read([row], signals=("attention/0",))["attention/0"][0, :, :n, :n]
    decoded = decode_log(codes.reshape(maps["heads"], n, n))
    np.testing.assert_allclose(decoded, stored, rtol=1e-6)
    states = cache.read([row], signals=("hidden/1",))["hidden/1"][0, :n].astype(np.float32)
    np.testing.assert_allclose(data["norms"]["hidden/1"], np.linalg.norm(states, axis=1), atol=1e-3)


def test_markup_in_a_corpus_stays_text(cache):
    tokens = row_tokens(cache, 0, Tokenizer.from_files(cache.tokenizer_path), top=1)
    page = row_page(cache, 0, [*tokens[:1], type(tokens[0])("</script><b>", 1, None)])
    assert page.count("</script>") == 1
