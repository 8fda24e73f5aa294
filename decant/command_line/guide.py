"""For the first hour with a command: three examples, and the flags to begin with."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Guide:
    """What `--help` shows before everything else."""

    examples: tuple[tuple[str, str], ...] = ()
    """Commands, each with what it does."""
    flags: tuple[str, ...] = ()
    """Flags to begin with, without dashes."""


GUIDE = {
    "init": Guide(
        (
            (
                "decant init owner/name 'books/*.txt'",
                "Look at both; write precompute.toml and train.toml.",
            ),
            (
                "decant init models/teacher data --out configs/a.toml",
                "A local teacher, the readable files of a folder, another name.",
            ),
            ("decant precompute precompute.toml", "Then: run the teacher."),
        ),
    ),
    "plan": Guide(
        (
            ("decant plan", "What the capture of `decant precompute` would cost."),
            ("decant plan precompute.toml", "The same of the capture of a config file."),
            ("decant plan precompute.toml --json", "For a script: one JSON document."),
        ),
        ("corpus.files", "teacher.model", "corpus.max-bytes", "json"),
    ),
    "precompute": Guide(
        (
            (
                "decant precompute",
                "The embedded teacher reads the code of Python's standard library, in minutes.",
            ),
            (
                "decant precompute --corpus.files 'books/*.txt' --teacher.model owner/name",
                "Your own text and a teacher from the hub, into runs/cache.",
            ),
            (
                "decant precompute precompute.toml --output runs/b",
                "Settings from a file, all but one. The same command goes on where it stopped.",
            ),
        ),
        (
            "corpus.files",
            "teacher.model",
            "output",
            "corpus.sequence-length",
            "corpus.max-bytes",
            "teacher.dtype",
        ),
    ),
    "tokenise": Guide(
        (
            (
                "decant tokenise --corpus.files 'more/*.txt'",
                "Rows like those of runs/cache, into runs/text.",
            ),
            (
                "decant tokenise --like runs/b --corpus.files 'more/*.txt' --output runs/more",
                "Rows like those of another cache.",
            ),
            (
                "decant train --data.caches.0.path runs/text",
                "A student that also reads these rows.",
            ),
        ),
        ("corpus.files", "like", "output"),
    ),
    "align": Guide(
        (
            (
                "decant align runs/cache --tokenizer models/student",
                "A cache of the student's tokens, into runs/aligned.",
            ),
            (
                "decant align runs/cache --tokenizer models/student --targets matched",
                'For loss.divergence = "uld" or "gold".',
            ),
            (
                "decant train --cache runs/aligned --student.init scratch",
                "A student with that tokenizer, with random weights.",
            ),
        ),
        ("tokenizer", "output", "targets", "special-tokens"),
    ),
    "verify": Guide(
        (
            ("decant verify runs/cache", "Every file, then 16 rows by the teacher."),
            ("decant verify runs/cache --rows 0", "Files only: needs no teacher."),
            ("decant verify runs/cache --repair", "Capture damaged units again."),
        ),
        ("rows", "repair", "teacher"),
    ),
    "inspect": Guide(
        (
            ("decant inspect runs/cache", "What the cache holds, with histograms."),
            ("decant inspect runs/cache --row 3", "One row: what the teacher said at each token."),
            ("decant inspect runs/cache --row 3 --html row.html", "The same as a web page."),
        ),
        ("row", "html"),
    ),
    "merge": Guide(
        (
            ("decant merge runs/all runs/a runs/b", "One cache of the parts of two."),
            ("decant merge runs/all runs/a runs/b", "Again, when one of them has grown."),
            ("decant train --cache runs/all", "A student of all parts."),
        ),
    ),
    "copy": Guide(
        (
            ("decant copy runs/cache s3://bucket/cache", "Into a bucket."),
            ("decant copy s3://bucket/cache runs/cache", "Out of it, or what is missing here."),
            ("decant copy runs/cache /mnt/disk/cache", "To another disk, every file checked."),
        ),
    ),
    "forget": Guide(
        (
            ("decant forget runs/cache --source a.txt", "Every document of a file."),
            ("decant forget runs/cache --source b.jsonl --document 0 812", "Two lines of a file."),
            ("decant gc runs/cache", "Then: overwrite their bytes on disk."),
        ),
        ("source", "document"),
    ),
    "remove": Guide(
        (
            ("decant remove runs/cache hidden/12", "Unlink the states of a layer."),
            ("decant remove runs/cache hidden/12 attention/3", "Unlink two signals."),
            ("decant gc runs/cache", "Then: delete their files."),
        ),
    ),
    "gc": Guide(
        (
            ("decant gc runs/cache --dry-run", "Say what would be deleted."),
            ("decant gc runs/cache", "Delete and overwrite it."),
            ("decant inspect runs/cache", "See what is left."),
        ),
        ("dry-run",),
    ),
    "train": Guide(
        (
            ("decant train", "A student of eight of the teacher's blocks, from runs/cache."),
            (
                "decant train train.toml --run runs/b --optimiser.learning-rate 3e-4",
                "Settings from a file, all but two. The same command goes on where it stopped.",
            ),
            (
                "decant train train.toml --sweep sweep.toml",
                "Every student of a sweep file, and a table that compares them.",
            ),
        ),
        (
            "cache",
            "run",
            "student.source",
            "student.layers",
            "data.epochs",
            "data.batch-rows",
            "optimiser.learning-rate",
            "loss.alpha",
            "loss.temperature",
            "loss.tail",
        ),
    ),
    "evaluate": Guide(
        (
            ("decant evaluate runs/a", "The newest checkpoint, as a table."),
            ("decant evaluate runs/a --checkpoint best --json", "Another checkpoint, as JSON."),
            ("decant evaluate runs/a --cache runs/b", "On the held-out rows of another cache."),
        ),
        ("checkpoint", "cache", "heldout-rows"),
    ),
    "report": Guide(
        (
            ("decant report runs/a", "One run."),
            ("decant report runs/a runs/b", "Two runs side by side."),
            ("decant report runs/sweep", "Every student of a sweep."),
        ),
        ("output",),
    ),
    "generate": Guide(
        (
            ("decant generate runs/a --prompt 'def main('", "Three samples."),
            ("decant generate runs/a --prompt 'Hi!' --chat", "An answer to a user's message."),
            (
                "decant generate runs/a --prompts prompts.jsonl --logprobs --output rollouts.jsonl",
                "A completion of each prompt, with log-probabilities: a corpus for precompute.",
            ),
        ),
        ("prompt", "prompts", "samples", "max-tokens", "temperature", "logprobs", "output"),
    ),
    "export": Guide(
        (
            ("decant export runs/a students/a", "For transformers' `from_pretrained`."),
            ("decant export runs/a students/a --checkpoint best", "Another checkpoint."),
            (
                "decant precompute --teacher.model students/a --output runs/next",
                "The student becomes the next teacher.",
            ),
        ),
        ("checkpoint",),
    ),
}
"""By command."""
