"""`plan` lists documents by kind and shows one of each as students see it."""

import dataclasses
import json

from rich.console import Console

from decant.foreign import terminal
from decant.pipelines.capture.document_kinds import documents_by_kind
from decant.pipelines.capture.estimate import Estimate
from decant.pipelines.capture.estimate_report import print_estimate
from decant.pipelines.capture.step_inputs import corpus_sources
from decant.pipelines.config import Corpus
from decant.pipelines.rows.shard import TokeniseJob
from decant.pipelines.rows.sources import cut_shards
from decant.schemas.disk.atomic import write_bytes
from tests.making.chats import chat_tokenizer, dialogue

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def made(root, **files: str):
    """The documents by kind of a corpus of these files."""
    tokenizer = chat_tokenizer(TEMPLATE)
    for name, data in tokenizer.files().items():
        write_bytes(root / "tokenizer" / name, data, within=root)
    (root / "corpus").mkdir()
    for name, text in files.items():
        (root / "corpus" / name.replace("_", ".")).write_text(text)
    corpus = Corpus(files=(f"{root}/corpus",), shard_bytes=1 << 20)
    sources, _ = corpus_sources(corpus)
    job = TokeniseJob(
        part=root / "part",
        tokenizer=root / "tokenizer",
        sources=sources,
        corpus=corpus,
        unit_rows=1,
        vocabulary=1 << 20,
    )
    return documents_by_kind(job, cut_shards(sources, shard_bytes=1 << 20), scale=2.0)


def test_documents_are_counted_by_kind_with_a_sample_of_each(tmp_path):
    chats = [json.dumps({"messages": dialogue("Hi?", "Hello", "And?", "Well")})] * 3
    kinds = made(
        tmp_path,
        a_txt="plain \x1b[31mtext",
        b_jsonl="\n".join(chats),
        c_jsonl=json.dumps({"prompt": "Q" * 1000, "completion": " A"}),
    )
    assert {kind: known.documents for kind, known in kinds.items()} == {
        "text": 2,
        "chat": 6,
        "completion": 2,
    }
    assert kinds["text"].bytes == 2 * len("plain \x1b[31mtext")
    assert "«Hello<|eot|>»" in kinds["chat"].sample
    assert "Hi?" in kinds["chat"].sample.split("«")[0]
    assert kinds["completion"].learned < kinds["completion"].tokens / 100
    assert " … " in kinds["completion"].sample
    assert kinds["completion"].sample.count("Q") < 200
    assert "« A" in kinds["completion"].sample
    assert kinds["text"].sample.startswith("«")


def test_the_sample_cannot_steer_a_terminal(tmp_path, capsys):
    kinds = made(tmp_path, a_txt="plain \x1b[31mtext [bold]")
    total = Estimate(1, 1, 1, 1, 1, 1, 1, 1, 1, documents=dict(kinds))
    print_estimate(total, terminal(soft_wrap=True))
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "plain \\u001b[31mtext [bold]" in printed
    assert json.dumps(dataclasses.asdict(total))
    assert isinstance(terminal(), Console)


def test_counts_of_a_large_text_come_from_its_beginning(tmp_path):
    kinds = made(tmp_path, a_txt="word " * 600_000)
    assert kinds["text"].bytes == 6_000_000
    assert 0.9 < kinds["text"].tokens / 6_000_000 < 1.1  # a letter is a token here
