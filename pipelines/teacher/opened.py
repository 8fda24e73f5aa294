"""The teacher as the driver opens it: config and tokenizer, no weights. Workers load it later."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from decant.models import Checkpoint, open_checkpoint
from decant.models.checkpoints import hub
from decant.models.families import config_to_json
from decant.models.text.tokenizer import Tokenizer
from decant.pipelines import config
from decant.pipelines.teacher.identity import teacher_id_of
from decant.schemas.disk.identity import digest_memory
from decant.schemas.disk.stand_in import exists
from decant.schemas.manifest.plan import read_plan
from decant.schemas.manifest.tokenizer_files import write_tokenizer_files


@dataclass(frozen=True)
class OpenedTeacher:
    """A checkpoint with its tokenizer, and the settings to run it with; no weights are loaded."""

    asked: config.Teacher
    checkpoint: Checkpoint
    tokenizer: Tokenizer

    @property
    def model(self) -> str:
        """The absolute path, the address or the hub id by which workers open the teacher."""
        name, path = self.checkpoint.name, self.checkpoint.path
        return str(path.absolute()) if Path(name) == path else name

    @property
    def vocabulary(self) -> int:
        """Number of ids that it predicts, without padding ids that the tokenizer does not have."""
        return min(self.tokenizer.size, self.checkpoint.config.vocab_size)

    @cached_property
    def teacher_id(self) -> str:
        """The teacher's identity. The first access hashes the weights."""
        return teacher_id_of(
            self.checkpoint,
            dtype=self.asked.dtype,
            quantize=self.asked.quantize,
            vocabulary=self.vocabulary,
            memory=digest_memory(),
        )

    def write_tokenizer_and_config(self, cache: Path) -> None:
        """Write both below `cache`, so that it can be read on a machine without the teacher."""
        config = json.dumps(config_to_json(self.checkpoint.config), indent=2, sort_keys=True)
        files = {**self.tokenizer.files(), "config.json": config.encode()}
        write_tokenizer_files(cache, files)


def open_teacher(asked: config.Teacher, *, plan: Path) -> OpenedTeacher:
    """Open the teacher. A hub id gets the commit that an earlier run fixed in the file `plan`.

    ValueError if it has no embedding for the tokens that begin and end documents.
    """
    checkpoint = open_checkpoint(_pinned(asked.model, plan))
    teacher = OpenedTeacher(asked, checkpoint, checkpoint.tokenizer())
    tokenizer = teacher.tokenizer
    for name, token in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        if token is not None and token >= teacher.vocabulary:
            raise ValueError(
                f"{checkpoint.files.where}: {name} has id {token}, but the embedding has only "
                f"{teacher.vocabulary} rows; this tokenizer belongs to another model"
            )
    return teacher


def _pinned(model: str, plan: Path) -> str:
    """`model`, with the commit in `plan` if `plan` exists and names the same hub id."""
    planned = read_plan(plan).teacher.model if exists(plan) else ""
    return planned if hub.without_commit(planned) == model and not Path(model).exists() else model
