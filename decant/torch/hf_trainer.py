"""Hugging Face's Trainer, learning from a cache."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.logging import get_logger

from decant.schemas import Cache, open_cache
from decant.schemas.reading.held import draws_of_token, held_by, loss_targets
from decant.served_losses import Asked, Divergence, Tail
from decant.torch.batching import fingerprint
from decant.torch.judging import SUMS, Judge, row_sums
from decant.torch.losses import loss_sum
from decant.torch.packing import packed_inputs, require_separate_segments
from decant.torch.rows import Rows
from decant.torch.settings import Settings
from decant.torch.sketches import sketch_tables
from decant.torch.targets import require_targets


class DistillationTrainer(Trainer):
    """A `transformers.Trainer` for a causal language model that learns from a cache.

    ```python
    trainer = DistillationTrainer(student, TrainingArguments("runs/hf"), train_dataset="runs/cache")
    trainer.train()
    ```

    Batches, gradient accumulation, mixed precision, checkpoints and callbacks are the Trainer's
    own. The loss is `decant.torch.loss`, a mean over the counted tokens of all of an update's
    microbatches and processes. If the model's head is a plain matrix, logits of a whole batch are
    never computed; else, and under FSDP, DeepSpeed or DataParallel, they are.

    Evaluation reports eval_loss at the training's settings, and at T = 1: eval_kl, the best
    estimate that the cache allows, and the same under its own name (eval_kl_unbiased, for
    instance); eval_kl_bound, eval_ce, eval_perplexity, eval_agreement and eval_tokens. To keep the
    best model, set metric_for_best_model="kl" and greater_is_better=False.

    A checkpoint is bound to the rows and the teacher that it learned from, and to the tail if
    `tail` is unset.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        train_dataset: Cache | str | Path | Rows,
        eval_dataset: Cache | str | Path | Rows | None = None,
        temperature: float = 1.0,
        alpha: float | None = None,
        tail: Tail | None = None,
        divergence: Divergence = "forward_kl",
        mix: float = 0.5,
        clip: float = 0.2,
        anchor: float = 0.0,
        chunk_tokens: int | None = None,
        **kwargs: Any,
    ):
        """`kwargs` are other arguments of the Trainer, except for data_collator, compute_metrics
        and compute_loss_func.

        Args:
            model: a causal language model with the teacher's tokenizer.
            args: as for the Trainer. Unused columns are kept, whatever it says.
            train_dataset: a cache, its path, or `Rows` of it.
            eval_dataset: as `train_dataset`; a cache stands for its held-out rows. None: the
                held-out rows of `train_dataset`, if there are any.
            temperature, alpha, tail, divergence, mix, clip, anchor, chunk_tokens: as in `loss`. The
                choice for an unset `tail` is logged, and is `trainer.distillation.tail`.

        ValueError if student and cache do not fit, or if the model lets the documents of a packed
        row see each other.
        """
        cache = _cache_of(train_dataset)
        held = held_by([cache])
        arguments: Any = TrainingArguments("tmp_trainer") if args is None else args
        # What an unset tail was in releases before 0.16.3, which did not ask for the update's size.
        self._chosen_before: Tail | None = None
        if tail is None:
            read = train_dataset.targets if isinstance(train_dataset, Rows) else None
            draws = _draws_of_token(cache, arguments) if read is None else None
            choose = Asked(divergence, None, (temperature,)).best_tail
            tail, self._chosen_before = choose(held, draws_of_token=draws), choose(held)
            _LOG.info("tail = %s, chosen from %s for T = %g", tail, held, temperature)
        self.distillation = Settings(
            temperature, alpha, tail, divergence, mix, chunk_tokens, clip, anchor
        )
        asked = self.distillation.asked
        asked.require_held(held, where=str(cache.path))
        if tail and (weakness := asked.weakness(tail, held)):
            _LOG.warning("tail = %s: %s", tail, weakness)
        learned = loss_targets(tail, divergence)
        rows = _rows(train_dataset, cache, split="train", targets=learned)
        require_targets(rows[[0]], self.distillation)
        judged = cache if eval_dataset is None else _cache_of(eval_dataset)
        # `eval_loss` is at the training's settings.
        asked.require_held(held_by([judged]), where=str(judged.path))
        self._judge = Judge(judged)
        if eval_dataset is not None or len(cache.rows(split="heldout")):
            targets = tuple(dict.fromkeys((*learned, *self._judge.targets)))
            eval_dataset = _rows(eval_dataset, judged, split="heldout", targets=targets)
        arguments.remove_unused_columns = False
        if arguments.dataloader_num_workers and not arguments.dataloader_multiprocessing_context:
            arguments.dataloader_multiprocessing_context = "spawn"
        super().__init__(
            model,
            arguments,
            train_dataset=rows,
            eval_dataset=eval_dataset,
            data_collator=default_collate,
            compute_metrics=self._means,
            **kwargs,
        )
        # Else the Trainer divides the loss by the number of microbatches, as if it were their mean.
        self.model_accepts_loss_kwargs = True
        self._rows = rows
        self._prior = cache.tail_prior() if tail == "prior" else None
        self._partners = cache.partners() if divergence == "gold" else None
        self._sketch = None
        if tail == "sketch":
            self._sketch = sketch_tables(cache.sketch_heads(), device=arguments.device)
        config = self.model.config
        self._softcap = getattr(config, "final_logit_softcapping", None)
        # With several rows FlashAttention ignores where documents begin.
        self._flatten = "flash" in str(getattr(config, "_attn_implementation", None))
        self._check()
        self._fused = self._head_is_a_matrix()
        self._data = {**fingerprint(rows), "teacher_id": rows.cache.manifest.logits.teacher_id}
        self.add_callback(_SavesData({**self._data, _TAIL: tail}))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As the Trainer's.

        ValueError if the checkpoint learned from other rows or targets, or if `tail` is unset and
        the choice differs from the checkpoint's.
        """
        checkpoint: Any = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(str(self.args.output_dir))
            if checkpoint is None:
                raise ValueError(f"{self.args.output_dir}: holds no checkpoint to go on from")
        if checkpoint:
            saved = _saved_data(Path(checkpoint))
            _require_same_data(checkpoint, saved, self._data)
            if self._chosen_before:
                learned = saved.get(_TAIL, self._chosen_before)
                _require_same_choice(checkpoint, learned, self.distillation.tail)
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def get_batch_samples(self, *args: Any) -> tuple[list, Any]:
        """Microbatches of an update, and the number of counted tokens in all of them."""
        batches, _ = super().get_batch_samples(*args)
        if not batches:
            return batches, None
        counts = [batch["loss_mask"].sum() for batch in batches]
        count = torch.stack(counts).sum().to(self.args.device)
        if self._over_processes:
            count = self.accelerator.gather(count).sum()
        return batches, count.clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a microbatch: its sum divided by the counted tokens of the whole update."""
        states, unembedding = self._forward(model, inputs)
        total, _ = self._loss_sum(states, unembedding, inputs)
        counted = inputs["loss_mask"].sum().clamp(min=1)
        loss = total / (counted if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self._over_processes:
            loss = loss * self.accelerator.num_processes  # DDP takes the mean of gradients
        return (loss, {"logits": states}) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """No loss; for each row, in place of logits, the sums that `_means` divides."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            states, unembedding = self._forward(model, inputs)
            sums = self._judge.row_sums(states, unembedding, inputs, softcap=self._softcap)
            _, parts = self._loss_sum(states, unembedding, inputs)
        trained = row_sums(inputs, parts)[:, :1]
        return None, torch.cat([sums, trained], -1), inputs["loss_mask"].sum(-1)

    def _means(self, prediction: EvalPrediction) -> dict[str, Any]:
        *sums, trained = np.asarray(prediction.predictions, np.float64).sum(0).tolist()
        means = self._judge.means(sums)
        means.pop("kl_by")  # loggers take numbers only
        return {"loss": trained / max(sums[SUMS.index("tokens")], 1), **means}

    def _loss_sum(self, states: Tensor, unembedding: Tensor | None, batch: dict) -> Any:
        return loss_sum(
            states,
            unembedding,
            batch,
            settings=self.distillation,
            prior=self._prior,
            sketch=self._sketch,
            partners=self._partners,
            vocabulary=self._rows.vocabulary,
            softcap=self._softcap,
        )

    def _forward(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Hidden states and unembedding, or logits and None."""
        shape = batch["tokens"].shape
        inputs = packed_inputs(batch, flatten=self._flatten)
        if not self._fused:
            return model(**inputs).logits.reshape(*shape, -1), None
        plain = self.accelerator.unwrap_model(model)
        with _last_hidden_state(plain) as caught:
            # Through the whole model, because DDP and others act in its forward pass.
            model(**inputs, logits_to_keep=1)
        return caught[0].reshape(*shape, -1), plain.get_output_embeddings().weight

    @property
    def _over_processes(self) -> bool:
        return self.args.average_tokens_across_devices and self.args.world_size > 1

    def _check(self) -> None:
        rows = self._rows
        size = self.model.get_input_embeddings().weight.shape[0]
        if size < rows.vocabulary:
            raise ValueError(
                f"{rows.cache.path}: its tokenizer has {rows.vocabulary} tokens, but the student "
                f"has {size}; token ids would not line up. Use a student with the teacher's "
                "tokenizer"
            )
        if not self.is_deepspeed_enabled:  # whose weights may not be here yet
            require_separate_segments(self.model, flatten=self._flatten)

    @torch.no_grad()
    def _head_is_a_matrix(self) -> bool:
        """Whether the last hidden states times the head's weight are the model's logits."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False  # the head's weight is not whole outside of the forward pass
        if self.args.n_gpu > 1:
            return False  # torch.nn.DataParallel gathers what a model returns, and nothing else
        head = self.model.get_output_embeddings()
        if type(head) is not nn.Linear or head.bias is not None:
            return False
        tokens = torch.arange(4, device=head.weight.device)[None]
        training = self.model.training
        self.model.eval()
        try:
            with _last_hidden_state(self.model) as caught:
                theirs = self.model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits
        except TypeError:  # a model without logits_to_keep computes all logits anyway
            return False
        finally:
            self.model.train(training)
        ours = head(caught[0][:, -1:]).float()
        if self._softcap is not None:
            ours = self._softcap * torch.tanh(ours / self._softcap)
        return torch.allclose(ours, theirs.float(), rtol=1e-3, atol=1e-3 * float(ours.abs().max()))


def _cache_of(dataset: Cache | str | Path | Rows) -> Cache:
    if isinstance(dataset, Rows):
        return dataset.cache
    return dataset if isinstance(dataset, Cache) else open_cache(dataset)


def _draws_of_token(cache: Cache, arguments: Any) -> float | None:
    rows = arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    return draws_of_token([cache], tokens=rows * cache.manifest.sequence_length)


def _rows(
    dataset: Any, cache: Cache, *, split: Literal["train", "heldout"], targets: Sequence[str]
) -> Rows:
    """The given rows; or those of the cache, with these targets."""
    return dataset if isinstance(dataset, Rows) else Rows(cache, split=split, targets=targets)


_LOG = get_logger(__name__)
_DATA = "decant-data.json"
"""File of a checkpoint that says which data it learned from."""
_TAIL = "tail"
"""Its tail in that file, which releases before 0.16.4 did not write."""


class _SavesData(TrainerCallback):
    def __init__(self, data: dict[str, Any]):
        self._data = data

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:  # with save_on_each_node, the first process of each node
            directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (directory / _DATA).write_text(json.dumps(self._data, indent=1))


def _saved_data(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / _DATA
    if not path.exists():
        raise ValueError(f"{path}: missing; {checkpoint} is no checkpoint of a DistillationTrainer")
    return json.loads(path.read_text())


def _require_same_data(checkpoint: str, saved: dict[str, Any], data: dict[str, Any]) -> None:
    differing = [f"{n} {saved.get(n)!r}, now {x!r}" for n, x in data.items() if saved.get(n) != x]
    if differing:
        raise ValueError(
            f"{checkpoint}: learned from other data: {'; '.join(differing)}. To go on with the "
            "student on this data, load the model from there and begin a new run"
        )


def _require_same_choice(checkpoint: str, learned: Tail, chosen: Tail | None) -> None:
    if learned != chosen:
        raise ValueError(
            f"{checkpoint}: learned with tail = {learned}, but an unset tail is {chosen} for this "
            f'cache and this size of update. Pass tail="{learned}" to go on as before, or '
            f'tail="{chosen}" to change it'
        )


@contextlib.contextmanager
def _last_hidden_state(model: Any) -> Iterator[list[Tensor]]:
    """A list that gets the last hidden states of the forward passes inside the block."""
    caught: list[Tensor] = []
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    hook = whole.base_model.register_forward_hook(
        lambda _module, _inputs, output: caught.append(output[0])
    )
    try:
        yield caught
    finally:
        hook.remove()
