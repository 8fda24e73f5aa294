"""`align` killed at any step and run again gives the same bytes."""

import pytest

from decant.pipelines.__main__ import main
from decant.schemas import open_cache
from decant.schemas.disk.steps import Step
from tests.killing import killer
from tests.making.caches import tiny_cache, tokenizer_files, write_corpus

KILLS = (
    (Step.ROWS_NAMED, 2),
    (Step.SHARD_NAMED, 2),
    (Step.ROWS_GATHERED, 1),
    (Step.PLAN_FLUSHED, 1),
    (Step.LOGITS_NAMED, 2),
    (Step.COMMIT_NAMED, 3),
    (Step.COMMITS_CHECKED, 1),
)


@pytest.mark.slow
def test_killed_at_steps_and_rerun_the_cache_has_the_same_bytes(tmp_path):
    write_corpus(tmp_path / "corpus", files=5, words=120)
    tiny_cache(tmp_path, counts=12)
    (tmp_path / "student").mkdir()
    for name, data in tokenizer_files(300).items():
        (tmp_path / "student" / name).write_bytes(data)

    def flags(name):
        student = ["--tokenizer", str(tmp_path / "student"), "--quiet"]
        return ["align", str(tmp_path / "cache"), *student, "--output", str(tmp_path / name)]

    assert main(flags("whole")) == 0
    whole = open_cache(tmp_path / "whole").manifest
    assert len(whole.parts[0].units) > 3
    with killer(tmp_path / "log") as dying:
        for step, visit in KILLS:
            dying.kill(step, flags("killed"), visit=visit)
            with pytest.raises(ValueError, match="not sealed"):
                open_cache(tmp_path / "killed")
    assert main(flags("killed")) == 0
    assert open_cache(tmp_path / "killed").manifest.cache_id == whole.cache_id
    names = [
        sorted(
            file.relative_to(tmp_path / name).as_posix()
            for file in (tmp_path / name).rglob("*")
            if file.is_file()
        )
        for name in ("whole", "killed")
    ]
    assert names[0] == names[1]
