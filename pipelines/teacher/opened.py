"""The teacher that was asked for, looked up once on the driver; workers open it for themselves."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from decant.models import Checkpoint, open_checkpoint
from decant.models.checkpoints import hub
from decant.models.families import config_to_json
from decant.models.text.tokenizer import Tokenizer
from decant.pipelines import config
from decant.pipelines.teacher.identity import digest_memory, teacher_id_of
from decant.schemas.disk.atomic import write_bytes
from decant.schemas.disk.layout import TOKENIZER
from decant.schemas.manifest.plan import read_plan


@dataclass(frozen=True)
class OpenedTeacher:
    """What a capture needs to know of it, without its weights."""

    asked: config.Teacher
    checkpoint: Checkpoint
    tokenizer: Tokenizer

    @property
    def model(self) -> str:
        """What opens the teacher, wherever a worker runs."""
        name, path = self.checkpoint.name, self.checkpoint.path
        return str(path.absolute()) if Path(name) == path else name

    @property
    def vocabulary(self) -> int:
        """Ids that it predicts: padding behind the tokenizer's is cut."""
        return min(self.tokenizer.size, self.checkpoint.config.vocab_size)

    @cached_property
    def teacher_id(self) -> str:
        """Its identity; hashes the weights once."""
        return teacher_id_of(
            self.checkpoint,
            dtype=self.asked.dtype,
            quantize=self.asked.quantize,
            vocabulary=self.vocabulary,
            memory=digest_memory(),
        )

    def write_tokenizer_and_config(self, cache: Path) -> None:
        """Tokenizer and teacher config: the cache is readable on a machine without the teacher."""
        config = json.dumps(config_to_json(self.checkpoint.config), indent=2, sort_keys=True)
        for name, content in {**self.tokenizer.files(), "config.json": config.encode()}.items():
            write_bytes(cache / TOKENIZER / name, content)


def open_teacher(asked: config.Teacher, *, plan: Path) -> OpenedTeacher:
    """The teacher; of a hub's the commit that an earlier run's plan at `plan` has, if there is."""
    checkpoint = open_checkpoint(_pinned(asked.model, plan))
    return OpenedTeacher(asked, checkpoint, checkpoint.tokenizer())


def _pinned(model: str, plan: Path) -> str:
    """The hub id with the commit that an earlier run's plan has, if that is of the same one."""
    planned = read_plan(plan).teacher.model if plan.exists() else ""
    return planned if hub.without_commit(planned) == model and not Path(model).exists() else model
