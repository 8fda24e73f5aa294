"""The web page of a row: its data, and that it loads nothing from elsewhere."""

import base64
import html
import json
import re

import numpy as np
import pytest

from decant.models.text.tokenizer import Tokenizer
from decant.pipelines.inspection.row import Origin, Token, row_origins, row_tokens
from decant.pipelines.inspection.row_page import Neighbours, row_page
from decant.pipelines.inspection.row_page import style as pages_style
from decant.schemas.targets.attention import decode_log
from tests.pipelines.inspection.pages import Page, numbers_of


@pytest.fixture(scope="module")
def row(cache):
    return int(cache.rows()[1])


@pytest.fixture(scope="module")
def tokenizer(cache):
    return Tokenizer.from_files(cache.tokenizer_path)


def data_of(page):
    return json.loads(re.search(r"^const data = (.*);$", page, re.M).group(1))


def test_the_page_holds_the_row_and_needs_nothing_else(cache, row, tokenizer):
    tokens = row_tokens(cache, row, tokenizer, top=3)
    page = row_page(cache, row, tokens, origins=row_origins(cache, row))
    assert not re.search(r"https?:|src=|@import|<link|url\(", page)
    assert "{{" not in page
    (maps,) = data_of(page)["attention"]
    codes = np.frombuffer(base64.b64decode(maps["codes"]), np.uint8)
    n = len(tokens)
    stored = cache.read([row], signals=("attention/0",))["attention/0"][0, :, :n, :n]
    decoded = decode_log(codes.reshape(maps["heads"], n, n))
    np.testing.assert_allclose(decoded, stored, rtol=1e-6)
    states = cache.read([row], signals=("hidden/1",))["hidden/1"][0, :n].astype(np.float32)
    norms = data_of(page)["norms"]["hidden/1"]
    np.testing.assert_allclose(norms, np.linalg.norm(states, axis=1), atol=1e-3)


def test_the_text_and_all_numbers_are_there_without_a_script(cache, row, tokenizer, student):
    tokens = row_tokens(cache, row, tokenizer, top=2, student=student)
    page = row_page(cache, row, tokens, origins=row_origins(cache, row), student="of runs/a")
    pieces = re.findall(r'<div class="text">(.*?)</div>', page, re.S)
    shown = html.unescape("".join(re.findall(r"<span[^>]*>([^<]*)</span>", "".join(pieces))))
    assert shown == "".join(token.text for token in tokens)
    assert "of runs/a" in page
    lines = numbers_of(page)
    assert len(lines) == len(tokens)
    for line, token in zip(lines, tokens, strict=True):
        assert int(line[0]) == token.position
        if prediction := token.prediction:
            assert line[3] == f"{prediction.entropy:.2f}"
            assert line[7:] == ["0.125", "0.75"]
            assert prediction.alternatives[0].text.strip() in line[5]
    for origin in row_origins(cache, row):
        assert f"<h2>{origin.source} " in page


def test_previous_next_and_overview_are_links(cache, row, tokenizer):
    tokens = row_tokens(cache, row, tokenizer, top=1)
    between = Neighbours((3, "three.html"), (9, "nine.html"), "../index.html")
    page = Page(row_page(cache, row, tokens, neighbours=between))
    assert page.links == ["../index.html", "three.html", "nine.html"]
    first = Page(row_page(cache, row, tokens, neighbours=Neighbours(None, None, "../index.html")))
    assert first.links == ["../index.html"]


def test_markup_in_a_corpus_stays_text(cache, row, tokenizer):
    hostile = "</script><b onclick=alert(1)>\u202e\x1b[31m"
    (first, *_) = row_tokens(cache, row, tokenizer, top=1)
    tokens = [first, Token(1, hostile, 1, None)]
    origins = [Origin(1, f"{hostile}.txt", 0, 0)]
    page = row_page(cache, row, tokens, origins=origins, student=hostile)
    assert page.count("</script>") == 1
    assert not re.search(r"<b onclick|[\u202e\x1b]", page)
    assert page.count("&lt;/script&gt;") == 4  # text, table, name of the file, student


def test_a_document_that_was_forgotten_does_not_move_the_others(cache, row, tokenizer):
    tokens = row_tokens(cache, row, tokenizer, top=1)
    kept = tokens[2:5]
    data = data_of(row_page(cache, row, kept))
    whole = data_of(row_page(cache, row, tokens))
    assert data["norms"]["hidden/1"] == whole["norms"]["hidden/1"][2:5]
    codes = np.frombuffer(base64.b64decode(data["attention"][0]["codes"]), np.uint8)
    all_codes = np.frombuffer(base64.b64decode(whole["attention"][0]["codes"]), np.uint8)
    n = len(tokens)
    np.testing.assert_array_equal(codes.reshape(-1, 3, 3), all_codes.reshape(-1, n, n)[:, 2:5, 2:5])


def test_every_text_can_be_read_on_its_background_in_both_schemes():
    """Contrast by WCAG 2: at least 4.5 for text."""
    style = pages_style()
    light, dark = re.findall(r":root \{(.*?)\}", style, re.S)
    for scheme in (light, dark):
        colours = dict(re.findall(r"--(\w+): (#\w{6})", scheme))
        for name, back in colours.items():
            if re.fullmatch(r"s\d", name):
                assert contrast(colours["text"], back) >= 4.5, name
        for name in ("text", "quiet", "accent"):
            for back in ("back", "soft"):
                assert contrast(colours[name], colours[back]) >= 4.5, name
        for name in ("teacher", "student", "hit"):
            assert contrast(colours[name], colours["soft"]) >= 3, name


def contrast(first, second):
    lighter, darker = sorted((luminance(first), luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
