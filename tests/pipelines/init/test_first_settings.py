"""First settings: what `init` sees of a corpus, what it chooses, and that its files run."""

import json
import tomllib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from decant.__main__ import main
from decant.pipelines.init.choices import choose
from decant.pipelines.init.survey import CorpusFacts, TeacherFacts, look_at_corpus, look_at_teacher
from tests.making import own_teacher

SENTENCES = ["The river walks under the old stone.", "A bird sees warm bread, and sings."]


def text(number: int) -> str:
    return " ".join(f"{SENTENCES[i % 2]} {number * 31 + i}" for i in range(4 + number % 5))


def make_corpora(root: Path) -> None:
    """The same 40 documents as a directory, one file, chats and a table."""
    (root / "texts" / "more").mkdir(parents=True)
    for number in range(40):
        folder = root / "texts" / ("more" if number % 2 else "")
        (folder / f"{number}.{'md' if number % 3 else 'txt'}").write_text(text(number))
    (root / "texts" / "picture.png").write_bytes(b"\0\1\2")
    (root / "book.txt").write_text("\n\n".join(map(text, range(40))))
    chats = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text(n)}]}
        for n in range(40)
    ]
    (root / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    pq.write_table(pa.table({"text": [text(n) for n in range(40)]}), root / "table.parquet")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    make_corpora(root)
    own_teacher.main(root / "teacher", [root / "book.txt"])
    return root


def test_a_teacher_is_described_without_its_weights(place):
    facts = look_at_teacher(str(place / "teacher"))
    assert (facts.family, facts.layers, facts.width) == ("llama", 4, 32)
    assert (facts.vocabulary, facts.positions, facts.chats) == (384, 128, True)
    # Embedding 384·32; a block has 4 matrices of 32·32, 3 of 32·64 and 2 norms; the last norm.
    assert facts.parameters == 384 * 32 + 4 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    assert facts.kinds == ("F32",)


def test_a_directory_means_the_readable_files_below_it(place):
    teacher = look_at_teacher(str(place / "teacher"))
    facts = look_at_corpus([str(place / "texts")], teacher)
    assert facts.patterns == (str(place / "texts"),)
    assert (facts.files, facts.documents, facts.kinds) == (40, 40, {"text": 40})
    assert facts.left_out == {"a picture, not text": 1}
    assert len(facts.lengths) == 40
    assert facts.tokens == sum(facts.lengths)


def test_the_length_of_a_long_document_is_scaled_up(place, tmp_path):
    teacher = look_at_teacher(str(place / "teacher"))
    (tmp_path / "long.txt").write_text("a bird sees " * 20_000)  # 240,000 characters
    (short,) = look_at_corpus([str(place / "book.txt")], teacher).lengths
    facts = look_at_corpus([str(tmp_path / "long.txt")], teacher)
    assert facts.documents == 1
    assert 30_000 < facts.lengths[0] == facts.tokens < 240_000
    assert short < 10_000


def test_what_cannot_be_a_corpus_is_refused(place, tmp_path):
    teacher = look_at_teacher(str(place / "teacher"))
    with pytest.raises(FileNotFoundError, match=r"'none\*\.txt' matches no file"):
        look_at_corpus(["none*.txt"], teacher)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="no document"):
        look_at_corpus([str(tmp_path / "empty.txt")], teacher)
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="folder' matches no file"):
        look_at_corpus([str(tmp_path / "folder")], teacher)


def facts(lengths: list[int], *, documents: int, tokens: int) -> CorpusFacts:
    return CorpusFacts(
        patterns=("a",),
        left_out={},
        files=1,
        bytes=tokens * 4,
        kinds={"text": 1},
        lengths=tuple(lengths),
        tokens=tokens,
        documents=documents,
    )


LARGE = TeacherFacts(
    name="t",
    title="t",
    family="llama",
    parameters=8_000_000_000,
    weight_bytes=16_000_000_000,
    kinds=("BF16",),
    layers=32,
    width=4096,
    vocabulary=128_256,
    positions=8192,
    chats=True,
)


def test_a_large_corpus_on_an_accelerator():
    corpus = facts([500] * 90 + [900] * 10, documents=40_000_000, tokens=20_000_000_000)
    chosen = choose(LARGE, corpus, platform="gpu")
    assert chosen.sequence_length.value == 512
    assert (chosen.dtype.value, chosen.heldout.value) == ("bfloat16", 0.005)
    assert (chosen.student_layers.value, chosen.batch_rows.value) == (8, 64)
    assert (chosen.epochs.value, chosen.learning_rate.value) == (1, 3e-4)
    assert (chosen.k.value, chosen.counts.value, chosen.sketch_rank.value) == (8, 100, 256)


def test_rows_are_no_longer_than_the_teacher_takes_or_the_corpus_fills():
    books = facts([90_000] * 10, documents=10_000, tokens=900_000_000)
    assert choose(LARGE, books, platform="gpu").sequence_length.value == 4096
    assert choose(LARGE, books, platform="cpu").sequence_length.value == 1024
    small = facts([900] * 10, documents=10, tokens=9_000)
    chosen = choose(LARGE, small, platform="cpu")
    assert chosen.sequence_length.value == 128
    assert chosen.heldout.value == 0.25
    assert chosen.epochs.value > 1


def run(capsys, *words: object) -> str:
    status = main([str(word) for word in words])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return printed.out


def test_the_help_names_both_arguments(capsys):
    with pytest.raises(SystemExit):
        main(["init", "--help"])
    assert "usage: decant init TEACHER CORPUS… " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("corpus", ["book.txt", "texts", "chats.jsonl", "table.parquet"])
def test_the_files_that_init_writes_run(corpus, place, tmp_path, capsys, monkeypatch):
    """From a directory outside the repository, with nothing but what `init` says to type."""
    monkeypatch.chdir(tmp_path)
    said = run(capsys, "init", place / "teacher", place / corpus)
    assert "next: decant plan precompute.toml" in said
    before = Path("train.toml").read_text()
    assert tomllib.loads(before)["student"]["layers"] == 1
    assert main(["init", str(place / "teacher"), str(place / corpus)]) == 1
    assert "precompute.toml: is there already" in capsys.readouterr().err
    assert Path("train.toml").read_text() == before
    run(capsys, "plan", "precompute.toml")
    said = run(capsys, "precompute", "precompute.toml")
    assert "      decant train train.toml" in said
    sealed = json.loads(run(capsys, "precompute", "precompute.toml", "--json"))
    assert 0 < sealed["heldout_rows"] < sealed["rows"] / 2
    trained = run(capsys, "train", "train.toml", "--data.steps=4", "--heldout-rows=4", "--json")
    assert json.loads(trained)["finished"]
    judged = json.loads(run(capsys, "evaluate", "--run", "runs/student", "--json"))
    assert judged["rows"] == sealed["heldout_rows"]
    run(capsys, "export", "--run", "runs/student", "--output", "student")
    assert look_at_teacher("student").layers == 1


def test_the_files_may_be_written_elsewhere_and_name_their_paths_in_full(
    place, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(place)
    out = tmp_path / "new" / "first.toml"
    (place / "runs").mkdir()
    (place / "runs" / "a.txt").write_text(text(0))
    corpus = "book.txt", "runs/a.txt", "[b]ook.txt"
    result = json.loads(run(capsys, "init", "teacher", *corpus, "--out", out, "--json"))
    assert result["files"] == [str(out), str(tmp_path / "new" / "train.toml")]
    capture, train = (tomllib.loads(Path(file).read_text()) for file in result["files"])
    assert capture["teacher"]["model"] == train["student"]["source"] == str(place / "teacher")
    assert capture["corpus"]["files"] == [str(place / name) for name in corpus]
    assert capture["output"] == train["cache"] == str(tmp_path / "new" / "runs/cache")


def test_a_fetch_from_the_hub_is_told_before_it_begins(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    out = tmp_path / "p.toml"
    command = ["init", "owner/none", str(place / "book.txt"), f"--out={out}"]
    assert main(command) == 1
    told, error = capsys.readouterr().err.splitlines()
    assert told.startswith("owner/none: not a path here, so its files are fetched from the hub")
    assert error.startswith("error: owner/none")
    out.write_text("mine")  # nothing is fetched for a file that cannot be written
    assert main(command) == 1
    (only,) = capsys.readouterr().err.splitlines()
    assert "is there already and is not overwritten" in only
