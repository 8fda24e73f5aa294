"""The task of the demonstration: its answers and its tokenizer."""

from benchmarks.on_policy import DIGITS, TEACHER, answer, tokenizer_files, write_tasks
from decant.models.text.tokenizer import Tokenizer


def test_an_answer_is_the_running_sum_of_the_digits():
    assert answer("573128=") == "525686"
    assert answer("000009=") == "000009"


def test_a_token_is_a_byte(tmp_path):
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    for name, data in tokenizer_files().items():
        (directory / name).write_bytes(data)
    tokenizer = Tokenizer.from_files(directory)
    assert tokenizer.size == TEACHER.vocab_size
    assert len(tokenizer.encode_batch(["573128="])[0]) == DIGITS + 1


def test_no_prompt_of_the_judgement_is_taught(tmp_path):
    write_tasks(tmp_path)
    heldout, taught = (
        set((tmp_path / f"{name}.jsonl").read_text().splitlines()) for name in ("heldout", "taught")
    )
    assert not heldout & taught
