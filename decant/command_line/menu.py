"""The menu: every command by name, with one line each, in two groups."""

import difflib
from collections.abc import Mapping

CACHES = {
    "init": "look at a teacher and a corpus, and write first settings for both steps",
    "plan": "estimate a capture's bytes, hours and files before anything runs",
    "precompute": "run the teacher over a corpus once and seal a cache",
    "tokenise": "seal the rows of a corpus without running a teacher",
    "align": "make a cache for students with another tokenizer",
    "verify": "check every file of a cache, and its targets against the teacher",
    "inspect": "show what a cache holds, or one row token by token",
    "merge": "make one cache of the parts of several",
    "copy": "copy a sealed cache to a directory or a bucket",
    "forget": "take documents out of a cache",
    "remove": "unlink signals from a cache",
    "gc": "delete what a cache no longer names and overwrite what it forgot",
}
"""Commands of `decant.pipelines`."""
STUDENTS = {
    "train": "train a student, or a sweep of them, from a cache",
    "evaluate": "judge a run's student on held-out rows",
    "report": "compare runs on one page",
    "generate": "sample text from a run's student, or write rollouts",
    "export": "write a run's student as a Hugging Face directory",
}
"""Commands of `decant.trainer`."""
GROUPS = {
    "Caches: run the teacher once": CACHES,
    "Students: train from a cache, again and again": STUDENTS,
}


def menu(groups: Mapping[str, Mapping[str, str]], *, program: str = "decant") -> str:
    """The text of `--help`: usage, then each group's commands with their lines."""
    lines = [f"usage: {program} COMMAND …", f"       {program} COMMAND --help"]
    for title, commands in groups.items():
        lines += ["", title]
        lines += [f"  {name:<12}{summary}" for name, summary in commands.items()]
    return "\n".join(lines)


def unknown(name: str, commands: Mapping[str, str]) -> str:
    """The error for a command that does not exist, with the nearest one that does."""
    if name in CACHES | STUDENTS:
        return f"error: {name} is a command of another package: `decant {name}` finds it"
    near = difflib.get_close_matches(name, commands, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"error: unknown command {name!r}{hint}"
