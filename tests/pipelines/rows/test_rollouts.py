"""Rollouts: their tokens and log-probabilities, and what is refused of them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from decant.models.text.tokenizer import Tokenizer
from decant.pipelines.config import Corpus
from decant.pipelines.rows.documents import Document, read_documents, with_kinds
from decant.pipelines.rows.marking import mark, segments
from decant.pipelines.rows.packing import Packer, pieces
from decant.pipelines.rows.records import Place
from decant.pipelines.rows.rules import NEWEST, RowRules, row_rules
from decant.pipelines.rows.sources import Kind, SourceFile, cut_shards, find_sources
from tests.making.chats import chat_tokenizer

NAN = float("nan")
PLAIN = chat_tokenizer(None, bos=False)
"""Tokens are bytes, special tokens and two spaces."""
BOS, EOS = (PLAIN.encode_batch([text])[0].tolist() for text in ("<s>", "</s>"))


def ids(text: str) -> list[int]:
    return PLAIN.encode_batch([text])[0].tolist()


def record(**changes: Any) -> dict[str, Any]:
    return {"prompt": "2+2=", "completion": "4!", "logprobs": [-0.25, -1.5], **changes}


def read(tmp_path: Path, *records: dict[str, Any]) -> tuple[list[Document], list[str]]:
    """The documents of JSON lines, and the problems of the others."""
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return read_file(tmp_path, path)


def read_file(tmp_path: Path, path: Path) -> tuple[list[Document], list[str]]:
    sources = find_sources([str(path)], max_bytes=None, memory=tmp_path / "memory.json")
    sources = with_kinds(sources, text_field="text")
    documents, refused = [], []
    for shard in cut_shards(sources, shard_bytes=1 << 20):
        documents += read_documents(
            shard, sources, text_field="text", refuse=lambda place, problem: refused.append(problem)
        )
    return documents, refused


def segment_of(tmp_path: Path, *, by: Tokenizer = PLAIN, **changes: Any) -> Any:
    ((document,), refused) = read(tmp_path, record(**changes))
    assert not refused
    (segment,) = segments([mark(document, by, None)], by)
    return segment


def test_the_completion_is_learned_and_each_token_has_its_log_probability(tmp_path):
    segment = segment_of(tmp_path)
    assert segment.tokens.tolist() == ids("2+2=4!")
    assert segment.counted.tolist() == [False] * 4 + [True] * 2
    np.testing.assert_array_equal(segment.logprobs, np.array([NAN] * 4 + [-0.25, -1.5], np.float32))


def test_one_log_probability_more_is_that_of_eos(tmp_path):
    segment = segment_of(tmp_path, logprobs=[-0.25, -1.5, -0.125])
    assert segment.tokens.tolist() == [*ids("2+2=4!"), *EOS]
    assert segment.counted[-3:].all()
    assert segment.logprobs[-1] == -0.125


def test_the_two_texts_are_tokenised_apart(tmp_path):
    """As one text, the two spaces in the middle would be one token."""
    segment = segment_of(tmp_path, prompt="a ", completion=" b")
    assert segment.tokens.tolist() == [*ids("a "), *ids(" b")] != ids("a  b")


def test_ids_are_taken_as_they_were_written(tmp_path):
    space = ids(" ")[0]
    written = {"completion": "  ", "completion_ids": [space, space]}
    segment = segment_of(tmp_path, **written)
    assert segment.tokens.tolist() == [*ids("2+2="), space, space]  # the tokenizer has one for it
    ended = {"completion_ids": [*ids("4"), *EOS], "completion": "4", "prompt_ids": ids("2+2=")}
    assert segment_of(tmp_path, **ended).tokens.tolist() == [*ids("2+2=4"), *EOS]
    # Nothing is put behind a text that its writer did not end.
    unended = {"completion_ids": ids("4!"), "prompt_ids": [*BOS, *ids("2+2=")]}
    assert segment_of(tmp_path, **unended).tokens.tolist() == [*BOS, *ids("2+2=4!")]


def test_bos_is_put_in_front_of_a_prompt_without_ids_alone(tmp_path):
    with_bos = chat_tokenizer(None)
    assert segment_of(tmp_path, by=with_bos).tokens[:2].tolist() == [*BOS, *ids("2")]
    begun = segment_of(tmp_path, by=with_bos, prompt="<s>2+2=")
    assert begun.tokens[:2].tolist() == [*BOS, *ids("2")]
    as_given = segment_of(tmp_path, by=with_bos, prompt_ids=ids("2+2="))
    assert as_given.tokens[:2].tolist() == ids("2+")


def test_an_empty_prompt_needs_a_token_to_begin_with(tmp_path):
    with pytest.raises(ValueError, match=r"the prompt is empty.*Give as prompt_ids what the model"):
        segment_of(tmp_path, prompt="")
    begun = segment_of(tmp_path, prompt="", prompt_ids=EOS)
    assert begun.tokens.tolist() == [*EOS, *ids("4!")]
    with_bos = segment_of(tmp_path, by=chat_tokenizer(None), prompt="")
    assert with_bos.tokens.tolist() == [*BOS, *ids("4!")]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"logprobs": "-1 -2"}, "'logprobs' is str, not a list of numbers"),
        ({"logprobs": {"token_logprobs": [-1]}}, "'logprobs' is dict, not a list of numbers"),
        ({"logprobs": [-1, 0.5]}, r"logprobs[1] is 0.5; expected the natural log"),
        ({"logprobs": [None, -1]}, "logprobs[0] is None; expected the natural log"),
        ({"logprobs": [True, -1]}, "logprobs[0] is True"),
        ({"logprobs": [-1, float("-inf")]}, "logprobs[1] is -inf"),
        ({"logprobs": [-1, float("nan")]}, "logprobs[1] is nan"),
        ({"logprobs": [-1, -1e300]}, "a number that float32 cannot hold"),
        ({"logprobs": []}, "logprobs is empty, so there is nothing to learn from"),
        ({"completion_ids": [1]}, "2 logprobs, but 1 completion_ids; expected one a token"),
        ({"completion_ids": "4!"}, "'completion_ids' is str, not a list of token ids"),
        ({"completion_ids": [1, -1]}, "completion_ids[1] is -1; expected a token id"),
        ({"prompt_ids": [1.5]}, "prompt_ids[0] is 1.5; expected a token id"),
        ({"prompt_ids": [1 << 40]}, "expected a token id"),
        ({"writer": 7}, "field 'writer' is 7; expected a text of at most 200 characters"),
        ({"tokenizer": "x" * 201}, "expected a text of at most 200 characters"),
    ],
)
def test_a_record_that_is_no_rollout_is_refused_with_its_line(tmp_path, changes, problem):
    _, (refused,) = read(tmp_path, record(**changes))
    assert refused.startswith("line 1: ")
    assert problem in refused


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"logprobs": [-1]}, r"1 logprobs, but its completion has 2 tokens \(3 with EOS\)"),
        ({"logprobs": [-1] * 4}, "4 logprobs, but its completion has 2 tokens"),
        ({"completion_ids": [5, 1 << 20]}, r"completion_ids\[1\] is 1048576, but the tokenizer's"),
        ({"prompt_ids": ids("2+3=")}, "prompt_ids spell '2[+]3=', but the text is '2[+]2='"),
        ({"completion_ids": ids("5!")}, "completion_ids spell '5!', but the text is '4!'"),
        ({"tokenizer": "0" * 64}, "written by a model with another tokenizer than the teacher's"),
    ],
)
def test_a_rollout_that_does_not_fit_the_teachers_tokenizer_is_refused(tmp_path, changes, problem):
    with pytest.raises(ValueError, match=problem):
        segment_of(tmp_path, **changes)


def test_the_same_tokenizer_is_known_by_its_digest(tmp_path):
    assert len(segment_of(tmp_path, tokenizer=PLAIN.digest).tokens) == 6


def test_a_cut_character_is_written_as_its_tokenizer_decodes_it(tmp_path):
    half = ids("é")[:1]
    segment = segment_of(
        tmp_path, completion="\ufffd", completion_ids=half, logprobs=[-1.0], prompt="x"
    )
    assert segment.tokens.tolist() == [*ids("x"), *half]


def test_a_rounding_above_nothing_is_nothing(tmp_path):
    assert segment_of(tmp_path, logprobs=[-1, 1e-7]).logprobs[-1] == 0


def test_many_completions_of_a_prompt_are_documents_of_their_own(tmp_path):
    other = record(logprobs=[-0.25, -1.625])
    documents, _ = read(tmp_path, record(), other, record(writer="a"), record())
    hashes = [document.content_hash for document in documents]
    assert hashes[0] == hashes[3]
    assert len(set(hashes)) == 3


def test_a_table_of_rollouts_holds_the_documents_of_json_lines(tmp_path):
    whole = record(
        prompt_ids=ids("2+2="), completion_ids=ids("4!"), writer="a", tokenizer=PLAIN.digest
    )
    of_lines, _ = read(tmp_path, whole, record(logprobs=[-0.1, -0.3]))
    nothing = dict.fromkeys(whole.keys() - record().keys())
    rows = [whole, {**record(logprobs=[-0.1, -0.3]), **nothing}]
    for kind in (pyarrow.float32(), pyarrow.float64()):
        table = pyarrow.Table.from_pylist(
            rows,
            schema=pyarrow.schema(
                {
                    "prompt": pyarrow.string(),
                    "completion": pyarrow.string(),
                    "logprobs": pyarrow.list_(kind),
                    "prompt_ids": pyarrow.list_(pyarrow.int32()),
                    "completion_ids": pyarrow.list_(pyarrow.int64()),
                    "writer": pyarrow.string(),
                    "tokenizer": pyarrow.string(),
                    "other": pyarrow.string(),
                }
            ),
        )
        pyarrow.parquet.write_table(table, tmp_path / "rollouts.parquet")
        of_table, refused = read_file(tmp_path, tmp_path / "rollouts.parquet")
        assert not refused
        assert [d.content_hash for d in of_table] == [d.content_hash for d in of_lines]


def test_a_file_of_completions_without_numbers_is_as_before(tmp_path):
    documents, refused = read(tmp_path, record(logprobs=None), record())
    assert [type(document.content).__name__ for document in documents] == ["Completion"]
    assert "this record is a rollout, but the file's first is a completion" in refused[0]


def test_texts_and_rollouts_of_a_batch_keep_their_order(tmp_path):
    (rollout,), _ = read(tmp_path, record())
    text = Document(Place(1, 0), "text")
    made = segments([mark(d, PLAIN, None) for d in (text, rollout, text)], PLAIN)
    assert [one.logprobs is None for one in made] == [True, False, True]
    assert made[1].tokens.tolist() == ids("2+2=4!")


def test_pieces_of_a_long_completion_keep_their_log_probabilities(tmp_path):
    """Rows of 5: each transition of the 12 tokens is scored once, with the number of its token."""
    numbers = [-float(n) for n in range(1, 9)]
    segment = segment_of(tmp_path, completion="abcdefgh", logprobs=numbers)
    packer = Packer(length=5, open_rows=4)
    rows = [*packer.add(segment), *packer.finish()]
    assert [piece.start for piece in pieces(segment, length=5)] == [0, 4, 8]
    assert sorted(row.written.tolist() for row in rows)[::-1] == [
        numbers[:1],
        numbers[1:5],
        numbers[5:],
    ]
    for row in rows:
        assert row.writer_logprobs is not None
        np.testing.assert_array_equal(row.loss_mask, ~np.isnan(row.writer_logprobs))


def test_rollouts_are_a_rule_of_their_own_and_others_keep_theirs():
    names = ("version", "learned", "rollouts")

    def rules(kind: Kind, *older: RowRules) -> list[Any]:
        source = SourceFile("a", "/a", 1, "", kind=kind)
        found = row_rules(Corpus(), [source], rules=older[0] if older else NEWEST)
        return [found.get(name) for name in names]

    assert rules("text") == [1, None, None]
    assert rules("completion") == [1, 2, None]
    assert rules("rollout") == [1, None, 2]
    assert rules("rollout", RowRules(rollouts=1)) == [1, None, 1]
    assert rules("text", RowRules(rollouts=1)) == [1, None, None]


def test_the_prompt_alone_decides_whether_a_rollout_is_held_out(tmp_path):
    other = record(prompt="3+3=")
    documents, _ = read(tmp_path, record(), record(logprobs=[-1, -2], writer="a"), other)
    hashes = [document.split_hash for document in documents]
    assert hashes[0] == hashes[1] == hashlib.sha256(b"2+2=").digest()
    assert hashes[2] != hashes[0]
