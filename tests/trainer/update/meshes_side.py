"""Trains on meshes of eight simulated devices: `python -m …meshes_side CACHE OUT`.

It is a process of its own, because a process simulates a fixed number of devices. It writes to the
directory OUT the losses of `STEPS` updates by mesh and signal, the arrays that their programs
gather, and the values and gradients of the fused head alone.
"""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from decant.models import ModelConfig
from decant.models.checkpoints.adapters import Lora, add_adapter
from decant.models.mesh.execution import Execution, Remat
from decant.models.mesh.sharding import place_parameters, replicate, student_mesh
from decant.schemas import open_cache
from decant.trainer.config import AttentionLoss, Data, HiddenLoss, Loss, Optimiser
from decant.trainer.data.batches import Batches
from decant.trainer.loss.batch_fields import to_device
from decant.trainer.loss.chunk_loss import Recipe
from decant.trainer.loss.frozen import joined, trained_and_frozen
from decant.trainer.loss.fused_head import distillation_loss
from decant.trainer.loss.layer_pairs import layer_pairs, number_layers
from decant.trainer.loss.objective import Objective, Tables
from decant.trainer.loss.projections import initial_projections, with_projections
from decant.trainer.run.initial_student import teacher_config
from decant.trainer.run.loss_inputs import tail_prior
from decant.trainer.run.student_parameters import graph_and_parameters
from decant.trainer.update.step import initial_state, make_train_step
from tests.making.heads import head_inputs_with_tail, prior_nodes
from tests.making.models import random_decoder

STEPS, ROWS = 12, 8
REMAT: dict[tuple[int, int, int], Remat] = {
    (1, 1, 1): "none",
    (8, 1, 1): "none",
    (2, 2, 2): "dots",
    (1, 4, 2): "block",
}
"""`remat` by mesh (data, fsdp, tensor); it must not change losses either."""
CHUNK = {"chunk_tokens": 64}
SIGNALS = {
    "prior, hidden, attention": Loss(
        tail="prior",
        temperature=2.0,
        hidden=(HiddenLoss(weight=0.5, projection=True),),
        attention=(AttentionLoss(weight=0.5, kind="kl"),),
        **CHUNK,
    ),
    "sampled": Loss(tail="sampled", **CHUNK),
    "renormalize": Loss(tail="renormalize", **CHUNK),
    "adapter": Loss(tail="sampled", **CHUNK),
}
CASES = [
    *(((1, 1, 1), signal) for signal in SIGNALS),
    ((8, 1, 1), "prior, hidden, attention"),
    ((2, 2, 2), "prior, hidden, attention"),
    ((1, 4, 2), "sampled"),
    ((1, 4, 2), "renormalize"),
    ((2, 2, 2), "adapter"),
]
# 512 ids; the embedding has 8 more rows, on the last device, which are no ids.
STUDENT = ModelConfig(
    vocab_size=520,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=256,
    tie_embeddings=True,
)
IDS = 509
"""Ids of the fused head alone. With four devices the last one has three columns of padding."""
ROUTES = (
    ("bucket", "jsd"),
    ("bucket", "uld"),
    ("sampled", "forward_kl"),
    ("prior", "forward_kl"),
    ("prior", "reverse_kl"),
    ("counts", "forward_kl"),
    ("sketch", "forward_kl"),
    ("sketch", "jsd"),
    (None, "on_policy"),
)


def main(cache_path: str, out: Path) -> None:
    cache = open_cache(cache_path)
    batches = Batches(cache, config=Data(batch_rows=ROWS), signals=SIGNALS_READ)
    taken = [batches.next() for _ in range(STEPS)]
    batches.close()
    losses, facts = {}, {}
    for sizes, name in CASES:
        key = f"{sizes} {name}"
        adapted = name == "adapter"
        losses[key], facts[key] = run(cache, taken, SIGNALS[name], sizes, adapted=adapted)
    np.savez(out / "losses.npz", **losses)
    (out / "facts.json").write_text(json.dumps(facts))
    np.savez(out / "heads.npz", **heads())


SIGNALS_READ = ("hidden/2", "attention/0", "attention/1")


def run(cache, batches, loss, sizes, *, adapted):
    """The losses of the updates on a mesh, and facts about their compiled program.

    `adapted`: only an adapter is trained.
    """
    mesh = student_mesh(
        **dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)),
        devices=jax.devices()[: np.prod(sizes)],
    )
    teacher = teacher_config(cache)
    loss = number_layers(loss, cache=cache, teacher=teacher, student=STUDENT)
    compared = layer_pairs(loss, cache=cache, student=STUDENT)
    model = random_decoder(STUDENT)
    place_parameters(model, mesh)
    if adapted:
        add_adapter(model, Lora(4, 4.0, ("all-linear",)), seed=0, mesh=mesh)
    graph, params = graph_and_parameters(model)
    params, frozen = trained_and_frozen(params)
    projections = initial_projections(compared, width=32, run=Path("/nowhere"), seed=0)
    there = {name: replicate(x, mesh) for name, x in projections.items()}
    state = initial_state(with_projections(params, there), config=Optimiser(), mesh=mesh)
    step = make_train_step(
        Objective(
            graph,
            loss,
            vocabulary=512,
            pairs=compared,
            execution=Execution(mesh, REMAT[sizes]),
        ),
        optimiser=Optimiser(),
        steps=STEPS,
        tables=Tables(prior=tail_prior(cache, loss=loss, mesh=mesh), frozen=frozen or None),
        places=jax.tree.map(lambda x: x.sharding, state),
    )
    first = to_device(batches[0], mesh=mesh, tail=loss.tail, signals=compared.signals)
    program = step.lower(state, first).compile()
    memory = program.memory_analysis()
    facts = {
        "gathers": re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", program.as_text()),
        "state": sum(x.addressable_data(0).nbytes for x in jax.tree.leaves(state)),
        "donated": memory.alias_size_in_bytes,
        **{
            "/".join(path): x.addressable_data(0).shape
            for path, x in flatten_dict(joined(state.params, frozen)).items()
        },
    }
    before = jax.tree.map(lambda x: x.sharding, state)
    consumed, losses = state, []
    for batch in batches:
        batch = to_device(batch, mesh=mesh, tail=loss.tail, signals=compared.signals)
        state, metrics = program(state, batch, step.tables)
        losses.append(float(metrics["loss"]))
    facts["deleted"] = all(x.is_deleted() for x in jax.tree.leaves(consumed))
    facts["stays"] = before == jax.tree.map(lambda x: x.sharding, state)
    return np.array(losses), facts


def heads():
    """Value, sums and gradients of the fused head alone on mesh (1, 2, 4)."""
    mesh, arrays = student_mesh(data=1, fsdp=2, tensor=4), {}
    for tail, kind in ROUTES:
        _, hidden, unembedding, targets, tables = head_inputs_with_tail(tail, **shape(tail))
        recipe = Recipe(kind, 0.3, tail, 16, softcap=3.0 if tail == "bucket" else None)

        @jax.jit
        def step(hidden, unembedding, targets, tables, recipe=recipe):
            def of(hidden, unembedding):
                # Two columns of padding, as in a padded checkpoint.
                padded = jnp.pad(unembedding, ((0, 0), (0, 2)), constant_values=9.0)
                return distillation_loss(
                    hidden,
                    padded,
                    targets,
                    temperature=2.0,
                    alpha=0.7,
                    **tables,
                    recipe=recipe,
                    vocabulary=IDS,
                    mesh=mesh,
                )

            return jax.value_and_grad(of, argnums=(0, 1), has_aux=True)(hidden, unembedding)

        variants = {"": tables}
        if (tail, kind) == ("prior", "forward_kl"):
            variants["exhausted "] = {"prior": exhausted(targets)}
        for name, given in variants.items():
            (value, sums), (d_hidden, d_unembedding) = step(hidden, unembedding, targets, given)
            parts = (value, *sums, d_hidden, d_unembedding)
            arrays |= {f"{name}{tail} {kind} {i}": np.asarray(x) for i, x in enumerate(parts)}
    return arrays


def shape(tail):
    """For the bucket every token is stored (the dense formula); other tails need a tail."""
    return {"vocabulary": IDS, "k": IDS if tail == "bucket" else 8}


def exhausted(targets):
    """A prior that one position's stored token nearly exhausts."""
    nodes = prior_nodes(1, vocabulary=IDS, spread=0.5)
    nodes[:, targets.topk_ids[0, 3]] += 27.0
    return nodes


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    main(sys.argv[1], Path(sys.argv[2]))
