"""A corpus of too few documents holds out pieces of its texts."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from decant.models.text.tokenizer import tokenizer_of
from decant.pipelines.capture import part
from decant.pipelines.capture.estimate import estimate
from decant.pipelines.capture.estimate_report import print_estimate
from decant.pipelines.capture.job import precompute
from decant.pipelines.capture.split_warning import split_warning
from decant.pipelines.config import Corpus
from decant.pipelines.rows.documents import with_kinds
from decant.pipelines.rows.heldout_pieces import needs_pieces, split_of, stretches
from decant.pipelines.rows.sources import find_sources
from decant.schemas import open_cache
from decant.schemas.reading.units import read_unit_rows
from decant.schemas.records.rows import Segment, next_tokens
from tests.making.caches import WORDS, tiny_settings, write_corpus

SHARE = 0.2


def segment(tokens: int) -> Segment:
    return Segment(np.arange(tokens), np.ones(tokens, bool), 3, 70, 0)


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


@pytest.mark.parametrize("tokens", [400, 1000, 1001, 5003])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_each_transition_is_scored_once_in_one_split_and_about_a_fifth_is_held_out(tokens, name):
    made = list(stretches(segment(tokens), digest(name), SHARE, length=64))
    labels = np.concatenate([piece.tokens[1:] for _, piece in made])
    assert labels.tolist() == list(range(1, tokens))
    assert all(piece.start == piece.tokens[0] for _, piece in made)
    assert {(piece.source, piece.document) for _, piece in made} == {(3, 70)}
    held = [len(piece.tokens) - 1 for split, piece in made if split == "heldout"]
    assert max(held) == 63  # one whole row each
    assert abs(sum(held) - SHARE * tokens) <= 63


def test_a_text_of_few_rows_gives_a_part_of_one():
    made = dict(stretches(segment(501), digest("a"), SHARE, length=1024))
    assert len(made["heldout"].tokens) == 101


def test_a_short_text_stays_whole():
    splits = [
        [split for split, _ in stretches(segment(60), digest(str(n)), SHARE, length=512)]
        for n in range(200)
    ]
    assert {len(one) for one in splits} == {1}
    assert 20 <= sum(one == ["heldout"] for one in splits) <= 60


def text_hashed_as(split: str, *, words: int) -> str:
    """A text of `words` words whose hash puts it, as a whole, into `split`."""
    texts = (" ".join([str(n), *(WORDS * words)[: words - 1]]) for n in range(1000))
    return next(text for text in texts if split_of(digest(text), SHARE) == split)


def needs(folder: Path, **texts: str) -> bool:
    folder.mkdir()
    for name, text in texts.items():
        (folder / name.replace("_", ".")).write_text(text)
    files = find_sources([f"{folder}/*"], max_bytes=None, memory=folder.parent / "memory.json")
    corpus = Corpus(heldout=SHARE, shard_bytes=1 << 20)
    return needs_pieces(with_kinds(files, text_field="text"), corpus)


def test_pieces_are_held_out_only_where_whole_documents_cannot_be(tmp_path):
    train, held = (text_hashed_as(split, words=300) for split in ("train", "heldout"))
    short = text_hashed_as("heldout", words=3)
    assert needs(tmp_path / "1", a_txt=train)
    assert needs(tmp_path / "2", a_txt=held)
    assert not needs(tmp_path / "3", a_txt=train, b_txt=held)
    assert needs(tmp_path / "4", a_txt=train, b_txt=short)
    lines = json.dumps({"text": train}), json.dumps({"text": held})
    assert needs(tmp_path / "5", a_jsonl=lines[0])
    assert not needs(tmp_path / "6", a_jsonl="\n".join(lines))
    many = [json.dumps({"text": f"{n} {train}"}) for n in range(60)]
    assert not needs(tmp_path / "7", a_jsonl="\n".join(many))
    assert needs(
        tmp_path / "8", a_jsonl="\n".join(many), b_txt=text_hashed_as("heldout", words=60_000)
    )
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert not needs(tmp_path / "9", a_jsonl=json.dumps({"messages": talk}))


def one_file(root: Path, **settings):
    if not (root / "corpus").exists():
        write_corpus(root / "corpus", files=1, words=4000)
    return tiny_settings(root, **settings)


@pytest.fixture(scope="module")
def one_book(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("book")
    precompute(one_file(root))
    return root


def test_of_one_text_pieces_are_held_out_and_every_label_is_in_one_split(one_book):
    cache = open_cache(one_book / "cache")
    text = next((one_book / "corpus").iterdir()).read_text()
    tokenizer = tokenizer_of(cache)
    tokens = np.array([*tokenizer.encode_batch([text])[0], tokenizer.eos_id])
    places: dict[str, list[int]] = {}
    (only,) = cache.manifest.parts
    for number, unit in only.numbered_units:
        for row in read_unit_rows(cache.path / only.path, number, unit, length=64):
            for at, (_, _, start) in enumerate(row.origins.tolist(), start=1):
                here = np.flatnonzero((row.segment_ids == at) & row.loss_mask)
                label_places = start + row.positions[here] + 1
                assert (next_tokens(row.tokens)[here] == tokens[label_places]).all()
                places.setdefault(unit.split, []).extend(label_places.tolist())
    assert sorted(places["train"] + places["heldout"]) == list(range(1, len(tokens)))
    assert 0.15 < len(places["heldout"]) / len(tokens) < 0.25
    assert len(cache.rows("train")) > len(cache.rows("heldout")) > 4


def test_a_capture_begun_before_pieces_keeps_its_rows(one_book, tmp_path, monkeypatch):
    config = one_file(one_book, output=tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(part, "needs_pieces", lambda sources, corpus: False)
        before = precompute(config)
    assert len({unit.split for unit in before.parts[0].units}) == 1
    assert precompute(config).rows_id == before.rows_id
    assert open_cache(one_book / "cache").manifest.rows_id != before.rows_id
    (tmp_path / "b.txt").write_text("another text " * 300)
    files = (*config.corpus.files, str(tmp_path / "b.txt"))
    grown = dataclasses.replace(config, corpus=dataclasses.replace(config.corpus, files=files))
    assert len(precompute(grown).parts) == 2


@pytest.mark.parametrize(
    ("counts", "share", "said"),
    [
        ((384, 0), 0.1, "warning: no row is held out"),
        ((0, 5), 0.1, "warning: every row is held out"),
        ((50, 1), 0.1, "warning: only 1 row is held out"),
        ((50, 0), 0.0, "note: corpus.heldout is 0"),
    ],
)
def test_too_few_rows_of_a_split_are_told(counts, share, said):
    assert split_warning(*counts, share=share).startswith(said)
    assert not split_warning(50, 8, share=share) or not share


def test_the_warning_comes_before_the_teacher_runs(tmp_path, capsys):
    write_corpus(tmp_path / "corpus", files=1, words=8)
    config = tiny_settings(tmp_path)
    planned = estimate(config, console=Console(quiet=True))
    print_estimate(planned, Console(width=500))
    assert "row is held out" in planned.warnings[0]
    assert planned.warnings[0] in capsys.readouterr().out
    precompute(config)
    printed = capsys.readouterr().err
    assert 0 < printed.index("row is held out") < printed.index("calibrate:")
