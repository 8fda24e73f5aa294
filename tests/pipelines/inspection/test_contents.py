"""What `inspect` says of a cache, against dense float64 and the cache itself."""

import base64
import json
import re

import numpy as np
import pytest

from decant.models.text.tokenizer import Tokenizer
from decant.pipelines.__main__ import main
from decant.pipelines.config import Attention, Hidden
from decant.pipelines.inspection.contents import entropies, tokens_of
from decant.pipelines.inspection.row_page import row_page
from decant.schemas.records.rows import PADDING
from decant.schemas.targets.attention import decode_log
from tests.formulas import sampling
from tests.making.caches import tiny_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    root = tmp_path_factory.mktemp("inspected")
    return tiny_cache(root, hidden=Hidden(layers=(1,)), attention=Attention(layers=(0,)))


@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_the_entropy_of_a_stored_distribution_is_that_of_the_dense_one(spread):
    logits = np.random.default_rng(0).normal(size=(50, 3000)) * spread
    targets = sampling.with_draws(logits, np.zeros(50), k=8, m=1)
    logp = sampling.log_softmax(logits)
    exact = -(np.exp(logp) * logp).sum(1)
    found = entropies(targets.logprobs, targets.tail_logmass)
    np.testing.assert_allclose(found, exact, atol=0.01)


def test_an_empty_tail_adds_no_entropy():
    logprobs = np.log(np.full((1, 4), 0.25, np.float32))
    assert entropies(logprobs, np.full((1, 7), -np.inf, np.float32)) == pytest.approx(np.log(4))


def test_each_token_stands_beside_what_was_said_before_it_was_read(cache):
    row = int(cache.rows()[1])
    tokenizer = Tokenizer.from_files(cache.tokenizer_path)
    batch = {name: array[0] for name, array in cache.read([row]).items()}
    tokens = tokens_of(cache, row, tokenizer, top=3)
    assert len(tokens) == (batch["segment_ids"] != PADDING).sum()
    assert [t.text for t in tokens] == [tokenizer.decode([i]) for i in batch["tokens"]][
        : len(tokens)
    ]
    predicted = [i for i, token in enumerate(tokens) if token.prediction]
    assert predicted == (np.flatnonzero(batch["loss_mask"]) + 1).tolist()
    for at in predicted:
        said = tokens[at].prediction
        ids, logprobs = batch["topk_ids"][at - 1], batch["topk_logprobs"][at - 1]
        assert [text for text, _ in said.alternatives] == [tokenizer.decode([i]) for i in ids[:3]]
        came = ids == batch["tokens"][at]
        expected = float(np.exp(logprobs[came][0])) if came.any() else None
        assert said.probability == (None if expected is None else pytest.approx(expected))


def test_the_page_holds_the_row_and_needs_nothing_else(cache):
    row = int(cache.rows()[1])
    tokens = tokens_of(cache, row, Tokenizer.from_files(cache.tokenizer_path), top=3)
    page = row_page(cache, row, tokens)
    assert not re.search(r"https?:|src=|@import|<link", page)
    assert "{{" not in page
    data = json.loads(re.search(r"^const data = (.*);$", page, re.M).group(1))
    assert [token["text"] for token in data["tokens"]] == [token.text for token in tokens]
    (maps,) = data["attention"]
    codes = np.frombuffer(base64.b64decode(maps["codes"]), np.uint8)
    n = len(tokens)
    stored = cache.read([row], signals=("attention/0",))["attention/0"][0, :, :n, :n]
    found = decode_log(codes.reshape(maps["heads"], n, n))
    np.testing.assert_allclose(found, stored, rtol=1e-6)
    states = cache.read([row], signals=("hidden/1",))["hidden/1"][0, :n].astype(np.float32)
    np.testing.assert_allclose(data["norms"]["hidden/1"], np.linalg.norm(states, axis=1), atol=1e-3)


def test_markup_in_a_corpus_stays_text(cache):
    tokens = tokens_of(cache, 0, Tokenizer.from_files(cache.tokenizer_path), top=1)
    page = row_page(cache, 0, [*tokens[:1], type(tokens[0])("</script><b>", 1, None)])
    assert page.count("</script>") == 1


def test_the_bytes_of_all_signals_are_those_on_disk(cache, capsys):
    assert main(["inspect", str(cache.path)]) == 0
    printed = capsys.readouterr().out
    units = [unit for part in cache.manifest.parts for unit in part.units]
    scored = sum(unit.scored for unit in units)
    for name in ("rows", "logits", "hidden/1", "attention/0"):
        size = sum(unit.files[name].bytes for unit in units)
        (line,) = [x for x in printed.splitlines() if x.startswith(f"│ {name} ")]
        assert f"│ {size / scored:,.1f} " in line
    assert f"│ {len(cache.rows(split='train'))} " in printed
    of_fields = [
        float(x.split("│")[4].replace(",", ""))
        for x in printed.splitlines()
        if x.startswith("│  ") and "│   " in x
    ]
    logits = sum(unit.files["logits"].bytes for unit in units) / scored
    assert sum(of_fields) == pytest.approx(logits, abs=0.3)


def test_a_row_is_shown_in_the_terminal_and_one_that_is_not_there_refused(cache, capsys, tmp_path):
    assert main(["inspect", str(cache.path), "--row", "0", "--top", "2"]) == 0
    assert "likeliest" in capsys.readouterr().out
    assert main(["inspect", str(cache.path), "--row", "0", "--html", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").stat().st_size > 5000
    assert main(["inspect", str(cache.path), "--row", "9999"]) == 1
    assert "row 9999 asked for" in capsys.readouterr().err
