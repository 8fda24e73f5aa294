"""Independent formulas of the losses (LOSSES.md), over the full vocabulary in float64 numpy."""

import numpy as np

BETAS = np.array([0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8, 1])


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def divergence(p, q, kind, mix=0.5):
    """Divergence of probabilities p and q at each position, over the full vocabulary."""

    def kl(a, b):
        return np.where(a > 0, a * np.log(np.where(a > 0, a, 1) / b), 0).sum(-1)

    if kind == "forward_kl":
        return kl(p, q)
    if kind == "reverse_kl":
        return kl(q, p)
    if kind == "jsd":
        middle = mix * p + (1 - mix) * q
        return mix * kl(p, middle) + (1 - mix) * kl(q, middle)
    if kind == "uld":
        return np.abs(np.sort(p) - np.sort(q)).sum(-1)
    return 0.5 * np.abs(p - q).sum(-1)


def _slope(p, q, kind, mix):
    """∂D/∂q for each token, at fixed p."""
    if kind == "forward_kl":
        return -p / q
    if kind == "reverse_kl":
        return np.log(q / p) + 1
    if kind == "jsd":
        return (1 - mix) * np.log(q / (mix * p + (1 - mix) * q))
    if kind == "uld":
        order, slope = np.argsort(q), np.zeros(q.shape)
        np.put_along_axis(slope, order, np.sign(np.sort(q) - np.sort(p)), -1)
        return slope
    return 0.5 * np.sign(q - p)


def loss(teacher, hidden, unembedding, labels, mask, *, temperature, p=None, **settings):
    """Σ w (α·scale·D + (1−α)·CE), Σ w KL, Σ w CE, ∂/∂hidden, ∂/∂unembedding.

    `p` replaces the teacher's softmax at T as the target.
    """
    if p is None:
        p = np.exp(log_softmax(np.asarray(teacher, np.float64) / temperature))

    def soft(student, kind, mix):
        q = np.exp(log_softmax(student / temperature))
        slope = _slope(p, q, kind, mix)
        d_soft = q * (slope - (q * slope).sum(-1, keepdims=True)) / temperature
        return divergence(p, q, kind, mix), divergence(p, q, "forward_kl"), d_soft

    return _assembled(soft, hidden, unembedding, labels, mask, temperature=temperature, **settings)


def sampled_loss(
    teacher, hidden, unembedding, labels, mask, *, temperature, ids, draws, **settings
):
    """As `loss`, for `loss.tail = "sampled"`: from top-k `ids` [..., k] and tail `draws`."""
    p = np.exp(log_softmax(np.asarray(teacher, np.float64) / temperature))
    head = _at(ids, np.ones(ids.shape), p.shape) > 0
    t = np.where(head, 0, p).sum(-1)
    tail_ids, _, logweights = draws
    omega = np.take_along_axis(p, tail_ids.astype(np.int64), -1) * np.exp(
        np.asarray(logweights, np.float64)
    )
    measure = _at(tail_ids, omega, p.shape)

    def soft(student, kind, mix):
        assert kind == "forward_kl"
        q = np.exp(log_softmax(student / temperature))
        tau = np.where(head, 0, q).sum(-1)
        value = np.where(head, p * np.log(p / q), 0).sum(-1) + t * np.log(t / tau)
        value += (measure * np.log((p / t[..., None]) / (q / tau[..., None]))).sum(-1)
        excess = (omega.sum(-1) - t) / tau
        d_soft = np.where(head, q - p, q - measure + excess[..., None] * q) / temperature
        return value, value, d_soft

    return _assembled(soft, hidden, unembedding, labels, mask, temperature=temperature, **settings)


def _at(ids, values, shape):
    """Sums of `values` at their ids, which may repeat."""
    out = np.zeros(shape)
    rows = np.indices(ids.shape, sparse=True)[:-1]
    np.add.at(out, (*rows, ids.astype(np.int64)), values)
    return out


def _assembled(
    soft,
    hidden,
    unembedding,
    labels,
    mask,
    *,
    temperature,
    alpha,
    kind="forward_kl",
    mix=0.5,
    softcap=None,
):
    hidden, unembedding = np.asarray(hidden, np.float64), np.asarray(unembedding, np.float64)
    student = hidden @ unembedding
    slope = 1.0
    if softcap:
        slope = np.cosh(student / softcap) ** -2
        student = softcap * np.tanh(student / softcap)
    value, kl, d_soft = soft(student, kind, mix)
    one_hot = np.eye(student.shape[-1])[labels]
    ce = -(one_hot * log_softmax(student)).sum(-1)
    scale = alpha * (temperature if kind in ("tv", "uld") else temperature**2)
    w = np.asarray(mask, np.float64)
    d_logits = scale * d_soft + (1 - alpha) * (np.exp(log_softmax(student)) - one_hot)
    d_logits *= w[..., None] * slope
    total = (w * (scale * value + (1 - alpha) * ce)).sum()
    d_unembedding = np.einsum("btd,btv->dv", hidden, d_logits)
    return total, (w * kl).sum(), (w * ce).sum(), d_logits @ unembedding.T, d_unembedding


def with_prior(teacher, ids, nodes, *, temperature):
    """p on the top-k `ids` and t·π̃ on the tail; log π is linear in β between its nodes."""
    p = np.exp(log_softmax(np.asarray(teacher, np.float64) / temperature))
    nodes = np.asarray(nodes, np.float64)
    columns = [np.interp(1 / temperature, BETAS, nodes[:, v]) for v in range(nodes.shape[1])]
    head = _at(ids, np.ones(ids.shape), p.shape) > 0
    shape = np.where(head, 0, np.exp(np.array(columns)))
    share = shape.sum(-1, keepdims=True)
    t = np.where(head, 0, p).sum(-1, keepdims=True)
    return np.where(head, p, t * shape / np.where(share > 0, share, 1))


def draws(teacher, ids, *, m, betas, seed):
    """m iid tail draws: ids, log p at T = 1, and −log(m·r) for the mixture r of tempered tails.

    All are id 0 and −inf if the tail is empty.
    """
    rng = np.random.default_rng(seed)
    logp = log_softmax(teacher)
    tail = np.where(_at(ids, np.ones(ids.shape), logp.shape) > 0, -np.inf, logp)
    if ids.shape[-1] == logp.shape[-1]:
        nothing = np.full((*ids.shape[:-1], m), -np.inf)
        return np.zeros(nothing.shape, np.int32), nothing, nothing
    tempered = [np.exp(beta * tail) for beta in betas]
    proposal = np.mean([x / x.sum(-1, keepdims=True) for x in tempered], axis=0)
    edges = np.cumsum(proposal, -1) / proposal.sum(-1, keepdims=True)
    u = rng.random((*ids.shape[:-1], m))
    tail_ids = (u[..., None] >= edges[..., None, :]).sum(-1)
    logprobs = np.take_along_axis(logp, tail_ids, -1)
    logweights = -np.log(m * np.take_along_axis(proposal, tail_ids, -1))
    return tail_ids.astype(np.int32), logprobs, logweights


def targets(teacher, k):
    """Top-k ids, log-probs and the tail's log-mass [..., 7] of float64 teacher logits."""
    logp = log_softmax(teacher)
    order = np.argsort(-logp, axis=-1, kind="stable")
    ids, rest = order[..., :k], order[..., k:]
    tail = np.take_along_axis(logp, rest, -1)
    if tail.shape[-1] == 0:
        mass = np.full((*logp.shape[:-1], 7), -np.inf)
    else:
        scaled = BETAS[:, None] * tail[..., None, :]
        top = scaled.max(-1)
        mass = top + np.log(np.exp(scaled - top[..., None]).sum(-1))
    values = np.take_along_axis(logp, ids, -1)
    return ids.astype(np.int32), values.astype(np.float32), mass.astype(np.float32)


def counts(teacher, *, N, seed):
    """Ids and counts [..., N] of N equally spaced draws: distinct ids, then slots of 0 and 0."""
    rng = np.random.default_rng(seed)
    edges = np.cumsum(np.exp(log_softmax(teacher)), -1)
    edges[..., -1] = 1
    points = (np.arange(N) + rng.random((*edges.shape[:-1], 1))) / N
    drawn = (points[..., None] >= edges[..., None, :]).sum(-1)
    ids, times = np.zeros(drawn.shape, np.int32), np.zeros(drawn.shape, np.int32)
    for at in np.ndindex(drawn.shape[:-1]):
        own, own_times = np.unique(drawn[at], return_counts=True)
        ids[at][: len(own)], times[at][: len(own)] = own, own_times
    return ids, times


def counted(ids, times, *, vocabulary):
    """The target n/N [..., vocabulary]; 0 where there are no counts."""
    total = times.sum(-1, keepdims=True)
    return _at(ids, times / np.maximum(total, 1), (*ids.shape[:-1], vocabulary))


def entropy(p):
    """−Σ p log p of each position, in nats."""
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)


def with_shape(teacher, ids, logits, *, temperature):
    """p on the top-k `ids`, and on the tail its mass times softmax(logits / T) over the tail."""
    p = np.exp(log_softmax(np.asarray(teacher, np.float64) / temperature))
    head = _at(ids, np.ones(ids.shape), p.shape) > 0
    shape = np.exp(log_softmax(np.where(head, -np.inf, np.asarray(logits) / temperature)))
    return np.where(head, p, np.where(head, 0, p).sum(-1, keepdims=True) * shape)


def on_policy_loss(logits, labels, mask, teacher, writer, *, clip, anchor, alpha, at=None):
    """The loss of `divergence = "on_policy"` from logits [..., V], and its gradient in them.

    `teacher` and `writer` are the log-probabilities of the labels. `at`: the logits from which the
    advantage is taken, which is a constant (None: `logits`).
    """

    def own(x):
        return np.take_along_axis(log_softmax(x), labels[..., None], -1)[..., 0]

    written = np.isfinite(writer)
    known = written & np.isfinite(teacher)
    logq, teacher, writer = own(logits), np.where(known, teacher, 0), np.where(known, writer, 0)
    advantage = teacher - own(logits if at is None else at)
    ratio, back = np.exp(logq - writer), np.exp(writer - logq)
    plain, within = ratio * advantage, np.clip(ratio, 1 - clip, 1 + clip) * advantage
    policy = -np.minimum(plain, within) + anchor * (back - 1 - np.log(back))
    slope = np.where(plain <= within, -plain, 0) + anchor * (1 - back)  # in log q
    each = np.where(known, alpha * policy - (1 - alpha) * logq, np.where(written, 0, -logq))
    slope = np.where(known, alpha * slope - (1 - alpha), np.where(written, 0, -1))
    away = np.eye(logits.shape[-1])[labels] - np.exp(log_softmax(logits))  # ∂log q/∂logits
    return np.where(mask, each, 0).sum(), np.where(mask, slope, 0)[..., None] * away
