"""The task of the demonstration: its answers and its tokenizer."""

import json

import numpy as np

from benchmarks.on_policy import (
    DIGITS,
    MOST_TOKENS,
    SPLITS,
    TEACHER,
    answer,
    is_right,
    tokenizer_files,
    write_tasks,
)
from decant.models.text.tokenizer import Tokenizer


def test_any_order_of_swaps_of_neighbours_that_ends_sorted_is_right():
    for right in ("1342,1324,1234", "3124,1324,1234"):
        assert is_right("3142:", right)
    no_swap, two_at_once, backwards = "1342,1342,1324,1234", "1324,1234", "1342,3142,1342,1324,1234"
    unfinished, elsewhere, nothing = "1342,1324", "1342,1324,1235", ""
    for wrong in (no_swap, two_at_once, backwards, unfinished, elsewhere, nothing):
        assert not is_right("3142:", wrong)
    assert is_right("1121:", "1112")


def test_answers_of_the_teachers_corpus_are_right_and_differ():
    draws = np.random.default_rng(1)
    answers = {answer("4321:", draws) for _ in range(100)}
    assert all(is_right("4321:", one) for one in answers)
    assert len(answers) == 16  # reduced words of the longest permutation of four
    assert {len(one) + 1 for one in answers} == {MOST_TOKENS}


def test_a_token_is_a_byte(tmp_path):
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    for name, data in tokenizer_files().items():
        (directory / name).write_bytes(data)
    tokenizer = Tokenizer.from_files(directory)
    assert tokenizer.size == TEACHER.vocab_size
    assert len(tokenizer.encode_batch(["3142:"])[0]) == DIGITS + 1


def test_no_prompt_is_in_two_files(tmp_path):
    write_tasks(tmp_path)
    prompts = [
        json.loads(line)["prompt"]
        for name in SPLITS
        for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()
    ]
    assert len(set(prompts)) == len(prompts) == sum(SPLITS.values())
