"""The losses on torch tensors equal the independent float64 formulas, and those of the trainer."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decant.schemas.targets.sketch import SketchHead
from decant.schemas.targets.unmatched import Partners
from decant.trainer.loss.attention_maps import attention_loss
from decant.trainer.loss.chunk_loss import Recipe
from decant.trainer.loss.fused_head import distillation_loss
from decant.trainer.loss.hidden_states import hidden_loss
from decant.trainer.loss.settings import Loss
from decant.trainer.loss.sketches import sketch_tables
from decant.trainer.loss.targets import BatchTargets
from tests.formulas import dense

torch = pytest.importorskip("torch")
decant_torch = pytest.importorskip("decant.torch")
loss_sum = pytest.importorskip("decant.torch.losses").loss_sum
Settings = pytest.importorskip("decant.torch.settings").Settings


pytestmark = pytest.mark.reference

B, T, D, V, K, M = 2, 7, 8, 40, 6, 5
RNG = np.random.default_rng(0)
TEACHER = RNG.normal(size=(B, T, V)) * 3
IDS, LOGPROBS, TAIL = dense.targets(TEACHER, K)
DRAWS = dense.draws(TEACHER, IDS, m=M, betas=(1, 0.25), seed=1)
HIDDEN = RNG.normal(size=(B, T, D)).astype(np.float32)
UNEMBEDDING = RNG.normal(size=(D, V)).astype(np.float32)
LABELS = RNG.integers(0, V, (B, T))
MASK = np.ones((B, T), bool)
MASK[0, 2], MASK[1, -1] = False, False
COUNT_IDS, COUNTS = dense.counts(TEACHER, N=20, seed=2)
# Row 0 has a basis of rank 3, row 1 one of rank 2; neither has anything to do with the teacher.
HEADS = [
    SketchHead(*(RNG.normal(size=size).astype(np.float32) for size in ((rank, V), V)), softcap=6.0)
    for rank in (3, 2)
]
SKETCH = RNG.normal(size=(B, T, 3)).astype(np.float32)
SKETCH[1, :, 2] = 0
SKETCHED = np.stack(
    [
        6 * np.tanh((row[:, : len(head.head)] @ np.float64(head.head) + head.bias) / 6)
        for row, head in zip(np.float64(SKETCH), HEADS, strict=True)
    ]
)
PRIOR = np.log(RNG.dirichlet(np.ones(V), 7)).astype(np.float32)
WAYS = [
    ("bucket", "forward_kl"),
    ("bucket", "reverse_kl"),
    ("bucket", "jsd"),
    ("bucket", "tv"),
    ("sampled", "forward_kl"),
    ("renormalize", "forward_kl"),
    ("prior", "forward_kl"),
    ("prior", "reverse_kl"),
    ("prior", "jsd"),
    ("prior", "tv"),
    ("sketch", "forward_kl"),
    ("sketch", "reverse_kl"),
    ("sketch", "jsd"),
    ("sketch", "tv"),
]


def a_batch(**changes):
    """The batch as tensors. Positions that do not count hold id 0 and −inf, as from a cache."""
    arrays = {
        "labels": LABELS,
        "loss_mask": MASK,
        "topk_ids": np.where(MASK[..., None], IDS, 0),
        "topk_logprobs": np.where(MASK[..., None], LOGPROBS, -np.inf).astype(np.float32),
        "tail_logmass": np.where(MASK[..., None], TAIL, -np.inf).astype(np.float32),
        "tail_ids": DRAWS[0],
        "tail_logprobs": DRAWS[1].astype(np.float32),
        "tail_logweights": DRAWS[2].astype(np.float32),
        "count_ids": np.where(MASK[..., None], COUNT_IDS, 0),
        "counts": np.where(MASK[..., None], COUNTS, 0),
        "sketch": np.where(MASK[..., None], SKETCH, 0),
        "sketch_basis": np.array([0, 1], np.int32),
        **changes,
    }
    return {name: torch.tensor(array) for name, array in arrays.items()}


def ours(batch, *, hidden=HIDDEN, dtype=torch.float32, **settings):
    """Loss summed over the positions, and its gradients by hidden states and [D, V] matrix."""
    states = torch.tensor(hidden, dtype=dtype, requires_grad=True)
    matrix = torch.tensor(UNEMBEDDING.T.copy(), requires_grad=True)
    tables = decant_torch.sketch_tables(HEADS)
    defaults = {"prior": PRIOR, "sketch": tables, "chunk_tokens": 4, "count": 1.0}
    settings = {**defaults, **settings}
    value = decant_torch.loss(states, matrix, batch, **settings)
    value.backward()
    return value.item(), states.grad.float().numpy(), matrix.grad.T.numpy()


def close(got, expected, *, within=1e-5):
    for a, b in zip(got, expected, strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= within * np.abs(np.asarray(b)).max()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0])  # nodes of the tail's mass
@pytest.mark.parametrize(("tail", "divergence"), WAYS)
def test_value_and_gradient_are_those_of_the_float64_formula(tail, divergence, temperature):
    settings = {"temperature": temperature, "alpha": 0.7, "softcap": None}
    common = TEACHER, HIDDEN, UNEMBEDDING, LABELS, MASK
    kind = {"kind": divergence, "mix": 0.3}
    if tail == "sampled":
        expected = dense.sampled_loss(*common, ids=IDS, draws=DRAWS, **settings)
    elif tail == "prior":
        p = dense.with_prior(TEACHER, IDS, PRIOR, temperature=temperature)
        expected = dense.loss(*common, p=p, **kind, **settings)
    elif tail == "sketch":
        p = dense.with_shape(TEACHER, IDS, SKETCHED, temperature=temperature)
        expected = dense.loss(*common, p=p, **kind, **settings)
    else:
        expected = merged(tail, divergence, **settings)
    got = ours(a_batch(), tail=tail, divergence=divergence, mix=0.3, **settings)
    close(got, (expected[0], *expected[-2:]))


@pytest.mark.parametrize("k", [K, 0, V])
def test_counts_are_the_target_of_the_float64_formula(k):
    """Without a head the KL is that to counts/N; else it is taken off the teacher's entropy."""
    ids, logprobs, mass = dense.targets(TEACHER, max(k, 1))
    batch = a_batch(topk_ids=ids[..., :k], topk_logprobs=logprobs[..., :k], tail_logmass=mass)
    settings = {"temperature": 1.0, "alpha": 0.7}
    p = dense.counted(COUNT_IDS, COUNTS, vocabulary=V)
    expected = dense.loss(TEACHER, HIDDEN, UNEMBEDDING, LABELS, MASK, p=p, **settings)
    got = ours(batch, tail="counts", **settings)
    value = expected[0]
    if k:
        entropies = dense.entropy(p) - dense.entropy(np.exp(dense.log_softmax(TEACHER)))
        value += 0.7 * (entropies * MASK).sum()
    # The tail's mass is interpolated in T, and here its slope is needed.
    assert got[0] == pytest.approx(value, rel=1e-5 if k in (0, V) else 1e-3)
    close(got[1:], expected[-2:])


@pytest.mark.parametrize(("tail", "divergence"), [WAYS[0], WAYS[4], WAYS[6], WAYS[10], WAYS[12]])
def test_heads_of_different_sizes_are_what_each_position_stores(tail, divergence):
    """As with an adaptive head: 1 to K ids, the others id 0 and −inf."""
    sizes = RNG.integers(1, K + 1, (B, T))
    ids, logprobs = IDS.copy(), LOGPROBS.copy()
    mass = TAIL.copy()
    logp = dense.log_softmax(TEACHER)
    for b, t in np.ndindex(B, T):
        n = sizes[b, t]
        ids[b, t, n:], logprobs[b, t, n:] = 0, -np.inf
        tail_logp = np.delete(logp[b, t], ids[b, t, :n])
        mass[b, t] = [np.log(np.exp(beta * tail_logp).sum()) for beta in dense.BETAS]
    settings = {"temperature": 2.0, "alpha": 0.7, "tail": tail, "divergence": divergence}
    batch = a_batch(topk_ids=ids, topk_logprobs=logprobs, tail_logmass=np.float32(mass))
    got = ours(batch, **settings)
    expected = [0.0, 0.0, 0.0]
    for size in range(1, K + 1):
        # Positions of one size form a batch of a head without padding.
        part = a_batch(
            loss_mask=MASK & (sizes == size),
            topk_ids=ids[..., :size],
            topk_logprobs=logprobs[..., :size],
            tail_logmass=np.float32(mass),
        )
        expected = [a + b for a, b in zip(expected, ours(part, **settings), strict=True)]
    close(got, expected)


def test_a_teacher_told_whole_by_its_sketch_gives_the_textbook_loss():
    """As with rank "full": every divergence, at every T, without a prior."""
    head = SketchHead(np.eye(V, dtype=np.float32), np.zeros(V, np.float32))
    batch = a_batch(sketch=np.float32(TEACHER), sketch_basis=np.zeros(B, np.int32))
    for temperature in (1.0, 2.0, 4.0):
        for kind in ("forward_kl", "reverse_kl", "jsd", "tv"):
            settings = {"temperature": temperature, "alpha": 0.6, "mix": 0.3}
            expected = dense.loss(TEACHER, HIDDEN, UNEMBEDDING, LABELS, MASK, kind=kind, **settings)
            tables = decant_torch.sketch_tables([head])
            got = ours(batch, tail="sketch", sketch=tables, divergence=kind, **settings)
            close(got, (expected[0], *expected[-2:]))


def test_an_empty_tail_has_no_shape():
    ids, logprobs, mass = dense.targets(TEACHER, V)
    batch = a_batch(topk_ids=ids, topk_logprobs=logprobs, tail_logmass=mass)
    settings = {"temperature": 2.0, "alpha": 0.6}
    expected = dense.loss(TEACHER, HIDDEN, UNEMBEDDING, LABELS, MASK, **settings)
    for divergence in ("forward_kl", "jsd"):
        got = ours(batch, tail="sketch", divergence=divergence, mix=0.3, **settings)
        assert all(np.all(np.isfinite(x)) for x in got)
    close(ours(batch, tail="sketch", **settings), (expected[0], *expected[-2:]))


def test_an_unset_tail_is_chosen_from_the_batch():
    batch, settings = a_batch(), {"alpha": 0.7}
    close(ours(batch, **settings), ours(batch, tail="counts", **settings))
    settings["temperature"] = 4.0
    close(ours(batch, **settings), ours(batch, tail="sketch", sketch=HEADS, **settings))
    for name in ("counts", "sketch"):
        del batch[name]
    close(ours(batch, **settings), ours(batch, tail="sampled", **settings))
    del batch["tail_logweights"]
    close(ours(batch, **settings), ours(batch, tail="prior", **settings))
    settings["prior"] = None
    close(ours(batch, **settings), ours(batch, tail="bucket", **settings))


def merged(tail, divergence, *, temperature, alpha, softcap):
    """The formula on dense float64 logits, with the tail as one category or none; torch derives."""
    hidden = torch.tensor(HIDDEN, dtype=torch.float64, requires_grad=True)
    matrix = torch.tensor(UNEMBEDDING, dtype=torch.float64, requires_grad=True)
    assert softcap is None
    student = hidden @ matrix
    head = torch.zeros(B, T, V, dtype=torch.bool).scatter_(-1, torch.tensor(IDS).long(), True)
    p = torch.softmax(torch.tensor(TEACHER) / temperature, -1)
    q = torch.softmax(student / temperature, -1)

    def categories(x):
        stored = x.gather(-1, torch.tensor(IDS).long())
        return torch.cat([stored, x.masked_fill(head, 0).sum(-1, keepdim=True)], -1)

    if tail == "renormalize":
        p = p.masked_fill(~head, 0)
        p = p / p.sum(-1, keepdim=True)
    p, q = categories(p), categories(q)

    def kl(a, b):
        return torch.where(a > 0, a * (a.clamp(min=1e-300) / b).log(), 0.0).sum(-1)

    middle = 0.3 * p + 0.7 * q
    soft = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: 0.3 * kl(p, middle) + 0.7 * kl(q, middle),
        "tv": lambda: 0.5 * (p - q).abs().sum(-1),
    }[divergence]()
    ce = torch.nn.functional.cross_entropy(
        student.flatten(0, 1), torch.tensor(LABELS).flatten(), reduction="none"
    ).reshape(B, T)
    scale = temperature if divergence == "tv" else temperature**2
    value = ((alpha * scale * soft + (1 - alpha) * ce) * torch.tensor(MASK)).sum()
    value.backward()
    return value.item(), hidden.grad.numpy(), matrix.grad.numpy()


@pytest.mark.parametrize(
    ("tail", "divergence"),
    [*(WAYS[i] for i in (2, 4, 5, 6, 9, 10, 12, 13)), ("counts", "forward_kl")],
)
def test_value_and_gradient_are_those_of_the_trainer(tail, divergence):
    arrays = {name: jnp.asarray(x.numpy()) for name, x in a_batch().items()}
    targets = BatchTargets.of({**arrays, "tokens": arrays["labels"]})
    offsets = np.random.default_rng(5).normal(size=(3, V)).astype(np.float32)
    heads = [dataclasses.replace(HEADS[0], offsets=offsets), HEADS[1]]
    tables = jax.tree.map(jnp.asarray, sketch_tables(heads))
    temperature = 1.0 if tail == "counts" else 2.5
    recipe = Recipe(divergence, 0.3, tail, chunk_tokens=4, softcap=5.0)

    @jax.jit
    def trainer(hidden, unembedding):
        return distillation_loss(
            hidden,
            unembedding,
            targets,
            temperature=temperature,
            alpha=0.7,
            prior=jnp.asarray(PRIOR),
            sketch=tables,
            recipe=recipe,
        )[0]

    expected = jax.value_and_grad(trainer, argnums=(0, 1))(HIDDEN, UNEMBEDDING)
    settings = {"alpha": 0.7, "tail": tail, "divergence": divergence}
    settings |= {"temperature": temperature, "sketch": heads}
    close(ours(a_batch(), mix=0.3, softcap=5.0, **settings), (expected[0], *expected[1]))


def test_the_defaults_are_those_of_the_command_line():
    trainer = decant_torch.DistillationTrainer.__init__
    for function in (decant_torch.loss, decant_torch.loss_on_logits, trainer):
        parameters = inspect.signature(function).parameters
        for name in ("temperature", "alpha", "tail", "divergence", "mix", "clip", "anchor"):
            assert parameters[name].default == getattr(Loss(), name), name


def test_from_logits_value_and_gradient_are_the_same():
    batch, settings = a_batch(), {"temperature": 2.0, "tail": "prior", "prior": PRIOR, "count": 1.0}
    logits = torch.tensor(HIDDEN @ UNEMBEDDING, requires_grad=True)
    before = logits.detach().clone()
    value = decant_torch.loss_on_logits(logits, batch, chunk_tokens=3, **settings)
    value.backward()
    assert torch.equal(logits.detach(), before)
    by_hidden = np.einsum("btv,dv->btd", logits.grad.numpy(), UNEMBEDDING)
    fused = ours(batch, **settings)
    close((value.item(), by_hidden), fused[:2])


def test_the_gradient_in_logits_that_a_model_has_capped_passes_no_second_cap():
    settings = Settings(temperature=2.0, alpha=0.7, tail="bucket")
    got = []
    for softcap in (None, 5.0):
        logits = torch.tensor(5 * np.tanh(HIDDEN @ UNEMBEDDING / 5), requires_grad=True)
        loss_sum(logits, None, a_batch(), settings=settings, prior=None, softcap=softcap)[
            0
        ].backward()
        got.append(logits.grad)
    assert torch.equal(*got)


def test_columns_that_pad_the_vocabulary_get_no_probability_and_no_gradient():
    batch = decant_torch.Batch(a_batch(), vocabulary=V)
    padded = torch.tensor(np.concatenate([UNEMBEDDING.T, np.full((3, D), 9, np.float32)]))
    padded.requires_grad_()
    hidden = torch.tensor(HIDDEN, requires_grad=True)
    value = decant_torch.loss(hidden, padded, batch, prior=PRIOR, tail="prior", count=1.0)
    value.backward()
    expected = ours(batch, tail="prior", alpha=0.9)
    close((value.item(), hidden.grad, padded.grad.T[:, :V]), expected)
    assert not padded.grad[V:].any()


def test_positions_without_targets_are_learned_from_their_labels_alone():
    batch = a_batch()
    for name in ("topk_logprobs", "tail_logmass", "tail_logprobs", "tail_logweights"):
        batch[name] = torch.full_like(batch[name], -torch.inf)
    batch["counts"] = torch.zeros_like(batch["counts"])
    value, d_hidden, _ = ours(batch, alpha=0.9)
    expected = dense.loss(TEACHER, HIDDEN, UNEMBEDDING, LABELS, MASK, temperature=1.0, alpha=0.0)
    close((value, d_hidden), (expected[0], expected[3]))


def test_with_every_token_stored_all_tails_give_the_textbook_loss():
    ids, logprobs, mass = dense.targets(TEACHER, V)
    batch = a_batch(
        loss_mask=np.ones((B, T), bool), topk_ids=ids, topk_logprobs=logprobs, tail_logmass=mass
    )
    settings = {"temperature": 3.0, "alpha": 0.6}
    everywhere = np.ones((B, T))
    expected = dense.loss(TEACHER, HIDDEN, UNEMBEDDING, LABELS, everywhere, **settings)
    for tail in ("bucket", "prior", "renormalize"):
        close(ours(batch, tail=tail, **settings), (expected[0], *expected[-2:]))


def test_metrics_are_means_over_the_batch():
    batch = decant_torch.Batch(a_batch(), vocabulary=V)
    states, matrix = torch.tensor(HIDDEN), torch.tensor(UNEMBEDDING.T.copy())
    value, metrics = decant_torch.loss(
        states, matrix, batch, alpha=0.7, tail="prior", prior=PRIOR, return_metrics=True
    )
    p = dense.with_prior(TEACHER, IDS, PRIOR, temperature=1.0)
    total, kl, ce, *_ = dense.loss(
        TEACHER, HIDDEN, UNEMBEDDING, LABELS, MASK, temperature=1.0, alpha=0.7, p=p
    )
    count = MASK.sum()
    agreement = ((HIDDEN @ UNEMBEDDING).argmax(-1) == TEACHER.argmax(-1))[MASK].mean()
    close([value, metrics["kl_loss"], metrics["ce_loss"]], [total / count, kl / count, ce / count])
    assert metrics["tokens"] == count
    assert metrics["agreement"].item() == pytest.approx(agreement)


def test_a_prior_that_the_stored_tokens_hold_almost_all_of_loses_no_precision():
    nodes = np.full((7, V), -30.0, np.float32)
    nodes[:, IDS[0, 0]] = -0.1
    p = dense.with_prior(TEACHER, IDS, nodes, temperature=1.0)
    expected = dense.loss(
        TEACHER, HIDDEN, UNEMBEDDING, LABELS, MASK, temperature=1.0, alpha=1.0, p=p
    )
    got = ours(a_batch(), tail="prior", prior=nodes, alpha=1.0)
    close(got, (expected[0], *expected[-2:]))


def test_the_loss_is_a_mean_over_the_counted_positions_of_all_microbatches():
    batch = a_batch()
    states, matrix = torch.tensor(HIDDEN), torch.tensor(UNEMBEDDING.T.copy())
    whole = decant_torch.loss(states, matrix, batch)
    halves = [
        decant_torch.loss(
            states[i : i + 1],
            matrix,
            {name: x[i : i + 1] for name, x in batch.items()},
            count=float(MASK.sum()),
        )
        for i in range(B)
    ]
    torch.testing.assert_close(sum(halves), whole)


def test_in_bfloat16_the_loss_is_that_of_the_rounded_states():
    rounded = torch.tensor(HIDDEN).bfloat16()
    value, d_hidden, _ = ours(a_batch(), dtype=torch.bfloat16)
    exact = ours(a_batch(), hidden=rounded.float().numpy())
    assert abs(value - exact[0]) < 3e-3 * exact[0]
    assert np.abs(d_hidden - exact[1]).max() < 2e-2 * np.abs(exact[1]).max()


@pytest.mark.parametrize(
    ("tail", "divergence"),
    [
        *((tail, "forward_kl") for tail in ("bucket", "counts", "sketch")),
        *((None, divergence) for divergence in ("uld", "gold", "on_policy")),
    ],
)
def test_no_array_has_the_size_of_all_logits(tail, divergence):
    rows, length, vocabulary = 4, 64, 512
    shape = (rows, length)
    batch = {
        "labels": torch.zeros(shape, dtype=torch.long),
        "loss_mask": torch.ones(shape, dtype=torch.bool),
        "topk_ids": torch.arange(8).expand(*shape, 8),
        "topk_logprobs": torch.full((*shape, 8), -3.0),
        "tail_logmass": torch.full((*shape, 7), -1.0),
        "count_ids": torch.arange(20).expand(*shape, 20),
        "counts": torch.ones((*shape, 20), dtype=torch.int32),
        "sketch": torch.randn(*shape, 4),
        "sketch_basis": torch.zeros(rows, dtype=torch.int32),
        "unmatched_logprobs": torch.full((*shape, 8), -9.0),
        "label_logprobs": torch.full(shape, -2.0),
        "writer_logprobs": torch.full(shape, -2.0),
    }
    alone = np.arange(vocabulary) % 2
    others = {"partners": Partners(np.float32(alone), np.float32(0.5)), "divergence": divergence}
    head = SketchHead(np.ones((4, vocabulary), np.float32), np.ones(vocabulary, np.float32))
    tables = decant_torch.sketch_tables([head])
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    hidden = torch.randn(*shape, 4, requires_grad=True)
    matrix = torch.randn(vocabulary, 4, requires_grad=True)
    with Sizes():
        decant_torch.loss(
            hidden, matrix, batch, tail=tail, sketch=tables, chunk_tokens=16, **others
        ).backward()
    assert largest == 16 * vocabulary


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tail": "counts", "temperature": 2.0}, "say nothing about another T"),
        ({"tail": "counts", "divergence": "tv"}, "right on average only where"),
        ({"tail": "sketch", "sketch": None}, "needs sketch=cache.sketch_heads"),
        ({"temperature": 0.5}, "temperature is 0.5; expected 1 to 1,000"),
        ({"tail": "sampled", "divergence": "jsd"}, "right on average only where"),
        ({"tail": "prior", "prior": None}, "needs prior=cache.tail_prior()"),
        ({"tail": "sampled", "temperature": 3.0}, "drawn from at T up to 2"),
        ({"vocabulary": V + 1}, f"the student has {V} tokens"),
        ({"tail": "sketch", "divergence": "uld"}, "sorted probabilities have no ids"),
        ({"divergence": "gold"}, "does not say which of the teacher's tokens"),
        ({"divergence": "on_policy"}, "holds no teacher's log-probabilities of the texts' own"),
        ({"divergence": "on_policy", "temperature": 2.0}, "are those at T = 1"),
        ({"divergence": "on_policy", "tail": "sketch"}, "reads no tail"),
        ({"clip": 0.0}, "clip is 0.0; expected 1e-06 to 1,000,000"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, says):
    batch = decant_torch.Batch(a_batch(), vocabulary=V, highest_temperature=2.0)
    with pytest.raises(ValueError, match=says.replace("(", r"\(").replace(")", r"\)")):
        ours(batch, **settings)


@pytest.mark.parametrize(
    ("tail", "says"),
    [("counts", "no counts, which tail = counts"), ("sketch", "no sketch, which tail = sketch")],
)
def test_a_tail_that_the_batch_lacks_is_refused_with_what_to_add(tail, says):
    batch = a_batch()
    del batch["counts"], batch["sketch"]
    with pytest.raises(ValueError, match=rf"this batch: .*{says} .* config with --signals"):
        ours(batch, tail=tail)


def test_a_cache_without_a_head_can_teach_by_counts_only():
    batch = a_batch()
    batch["topk_ids"], batch["topk_logprobs"] = (
        batch["topk_ids"][..., :0],
        batch["topk_logprobs"][..., :0],
    )
    with pytest.raises(ValueError, match="and no top-k, which tail = bucket learns"):
        ours(batch, tail="bucket")


def test_a_transposed_unembedding_is_refused():
    # Unwrapped, because in tests jaxtyping would refuse it first.
    loss = inspect.unwrap(decant_torch.loss)
    with pytest.raises(ValueError, match=r"expected \[vocabulary, 8\]"):
        loss(torch.tensor(HIDDEN), torch.tensor(UNEMBEDDING), a_batch())


@pytest.mark.parametrize(("kind", "scale"), [("mse", "mean"), ("mse", "sum"), ("cosine", "mean")])
def test_hidden_states_are_compared_as_by_the_trainer(kind, scale):
    teacher = RNG.normal(size=(B, T, 5)).astype(np.float32)
    matrix = RNG.normal(size=(D, 5)).astype(np.float32)
    states = torch.tensor(HIDDEN, requires_grad=True)
    value = decant_torch.hidden_loss(
        states,
        torch.tensor(teacher),
        a_batch(),
        kind=kind,
        scale=scale,
        matrix=torch.tensor(matrix),
        count=1.0,
    )
    value.backward()
    expected = jax.value_and_grad(
        lambda x: hidden_loss(
            x,
            jnp.asarray(teacher),
            jnp.asarray(MASK),
            kind=kind,
            scale=scale,
            matrix=jnp.asarray(matrix),
        )
    )(jnp.asarray(HIDDEN))
    close((value.item(), states.grad), expected)


@pytest.mark.parametrize(
    ("kind", "average", "scale"),
    [("mse", False, "mean"), ("kl", False, "mean"), ("mse", True, "mean"), ("mse", False, "pairs")],
)
def test_attention_maps_are_compared_as_by_the_trainer(kind, average, scale):
    segments = np.array([[1, 1, 1, 2, 2, 2, 0], [1] * 7])
    mask = MASK & (segments != 0)
    student, teacher = RNG.random((2, B, 3, T, T)).astype(np.float32)
    maps = torch.tensor(student, requires_grad=True)
    batch = a_batch(segment_ids=segments, loss_mask=mask)
    options = {"kind": kind, "normalize": True, "average_heads": average, "scale": scale}
    value = decant_torch.attention_loss(maps, torch.tensor(teacher), batch, count=1.0, **options)
    value.backward()
    expected = jax.value_and_grad(
        lambda x: attention_loss(
            x, jnp.asarray(teacher), jnp.asarray(segments), jnp.asarray(mask), **options
        )
    )(jnp.asarray(student))
    close((value.item(), maps.grad), expected)


def test_pairs_of_microbatches_add_up():
    segments = np.array([[1, 1, 1, 2, 2, 2, 0], [1] * 7])
    batch = a_batch(segment_ids=segments, loss_mask=MASK & (segments != 0))
    # By hand: in each document the queries that count, times its tokens.
    assert decant_torch.pair_count(batch) == 2 * 3 + 3 * 3 + 6 * 7
    student, teacher = torch.tensor(RNG.random((2, B, 3, T, T)).astype(np.float32))
    whole = decant_torch.attention_loss(student, teacher, batch, scale="pairs")
    pieces = [
        decant_torch.attention_loss(
            student[i : i + 1],
            teacher[i : i + 1],
            {name: x[i : i + 1] for name, x in batch.items()},
            scale="pairs",
            count=57.0,
        )
        for i in range(B)
    ]
    torch.testing.assert_close(sum(pieces), whole)
