"""The command `export`: write a run's student as a Hugging Face directory with a model card.

transformers, another run (`student.source`) and another capture (`teacher.model`) can load it.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax import nnx

from decant.models import save_directory
from decant.models.checkpoints.adapters import merged
from decant.models.checkpoints.hf_layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, WEIGHTS
from decant.models.checkpoints.hub import without_commit
from decant.models.checkpoints.peft_saving import save_adapter
from decant.models.checkpoints.safetensors_files import SafetensorsFiles
from decant.models.text.tokenizer import GENERATION, Tokenizer
from decant.schemas import open_cache
from decant.store import is_url, open_store
from decant.store.objects import ObjectStore
from decant.trainer.config import Export
from decant.trainer.results.model_card import model_card
from decant.trainer.run.adapter import AdapterRecord, open_base, read_adapter
from decant.trainer.run.binding import cache_at_start, read_run_settings
from decant.trainer.run.data_facts import cache_facts, read_data_facts
from decant.trainer.run.saved_initial import INITIAL, open_initial
from decant.trainer.run.trained_student import load_checkpoint, weights_sha256

CARD = "README.md"
_WEIGHTS = (WEIGHTS, ADAPTER_WEIGHTS, ADAPTER_CONFIG)
"""With the file by which transformers knows an adapter."""


def export(config: Export) -> Path:
    """Write the student of a checkpoint into `config.output`; returns that directory or address.

    The files are made in a folder of their own and moved when all are complete: if making them
    fails, an earlier export stays as it was. A kill while they are moved, or sent to a bucket,
    leaves no weights, and the same command makes all of it. Other files there are left alone.
    """
    # A bucket that cannot be written to is found before the work.
    store = open_store(config.output, writing=True) if is_url(config.output) else None
    adapter = read_adapter(config.run / INITIAL)
    base = _base(config, adapter)
    graph, params, step = load_checkpoint(config.run, dtype="float32", checkpoint=config.checkpoint)
    model = nnx.merge(graph, params)
    tokenizer = open_initial(config.run).tokenizer()
    caches = read_data_facts(config.run) or [_facts_of_old_run(config)]
    text = model_card(
        model.config,
        name=config.output.name,
        run=config.run,
        step=step,
        weights=weights_sha256(params),
        settings=read_run_settings(config.run),
        caches=caches,
    )
    # Without it transformers would not know which tokens end a text. The teacher's own, which is
    # among the tokenizer's files, may also hold settings that suit only the teacher.
    generation = json.dumps(_special_ids(tokenizer), indent=2) + "\n"
    files = tokenizer.files() | {GENERATION: generation.encode()}
    with _folder(None if store else config.output) as made:
        if adapter and base:
            shape = {"lora": adapter.lora, "alpha": adapter.alpha, "root": adapter.root}
            save_adapter(model, made, files, base=base, **shape)
        else:
            whole = merged(model) if adapter else model
            save_directory(whole, made, files, special_ids=_special_ids(tokenizer))
        (made / CARD).write_text(text, "utf-8")
        if isinstance(store, ObjectStore):
            _send_files(made, store)
        else:
            _move_files(made, config.output)
    return config.output


@contextlib.contextmanager
def _folder(inside: Path | None) -> Iterator[Path]:
    """A temporary folder in the directory `inside`, which is made; None: where this machine has
    its temporary files."""
    if inside:
        inside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=inside) as made:
        yield Path(made)


def _base(config: Export, adapter: AdapterRecord | None) -> str | None:
    """Path or hub id of the model under an adapter that is written apart; None: it is not.

    ValueError if PEFT could not load it.
    """
    if adapter is None or config.adapter == "merged":
        return None
    if adapter.base is None:
        return str((config.run / INITIAL).resolve())
    source = str(read_run_settings(config.run)["student.source"])
    base = open_base(adapter, source, run=config.run)
    if not isinstance(base.files, SafetensorsFiles) or is_url(base.name):
        raise ValueError(
            f"{config.run}: its adapter stands on {base.name}, which PEFT cannot load; write a "
            "whole model with --adapter merged"
        )
    return base.name if without_commit(base.name) else str(base.path.resolve())


def _move_files(source: Path, target: Path) -> None:
    """Move all files into `target`, replacing files of the same names.

    Earlier weights are taken away first, and the new ones come last: a kill in between leaves a
    directory that cannot be loaded, and not weights beside another student's config.
    """
    files = _weights_last(source)
    earlier = [name for name in _WEIGHTS if (target / name).exists()]
    for name in earlier:
        (target / name).replace(source / f".earlier-{name}")
    try:
        for file in files:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            (source / file).replace(target / file)
    except OSError:
        for name in earlier:
            (source / f".earlier-{name}").replace(target / name)
        raise


def _send_files(source: Path, store: ObjectStore) -> None:
    """As `_move_files`, into a bucket."""
    for name in _WEIGHTS:
        store.delete(name)
    for file in _weights_last(source):
        store.upload(file.as_posix(), source / file)


def _weights_last(folder: Path) -> list[Path]:
    """All files in the folder, relative to it."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(files, key=lambda file: (file.name in _WEIGHTS, file))


def _facts_of_old_run(config: Export) -> dict[str, Any]:
    """Facts of the cache that a run of a release before 0.5 learned from.

    ValueError if `config.cache` is another one.
    """
    cache = cache_at_start(open_cache(config.cache), run=config.run)
    learned_from = read_run_settings(config.run).get("rows_id")
    if cache.manifest.rows_id != learned_from:
        raise ValueError(
            f"{config.cache}: holds rows {cache.manifest.rows_id[:12]}, but {config.run} learned "
            f"from {str(learned_from)[:12]}; name the run's own cache with --cache, for the card"
        )
    return cache_facts(cache)


def _special_ids(tokenizer: Tokenizer) -> dict[str, int | list[int]]:
    """Ids of BOS and of the tokens that end a text, as transformers names them."""
    ends = list(tokenizer.end_ids)
    bos = {} if tokenizer.bos_id is None else {"bos_token_id": tokenizer.bos_id}
    return {**bos, "eos_token_id": ends if len(ends) > 1 else ends[0]}
