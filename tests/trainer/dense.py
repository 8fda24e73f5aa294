"""The dense formula of LOSSES.md in float64 numpy: the independent side of the golden tests."""

import numpy as np


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def divergence(p, q, kind, mix=0.5):
    """Per position, over the full vocabulary; p and q are probabilities."""

    def kl(a, b):
        return np.where(a > 0, a * np.log(np.where(a > 0, a, 1) / b), 0).sum(-1)

    if kind == "forward_kl":
        return kl(p, q)
    if kind == "reverse_kl":
        return kl(q, p)
    if kind == "jsd":
        middle = mix * p + (1 - mix) * q
        return mix * kl(p, middle) + (1 - mix) * kl(q, middle)
    return 0.5 * np.abs(p - q).sum(-1)


def _slope(p, q, kind, mix):
    """∂D/∂q of each token, at fixed p."""
    if kind == "forward_kl":
        return -p / q
    if kind == "reverse_kl":
        return np.log(q / p) + 1
    if kind == "jsd":
        return (1 - mix) * np.log(q / (mix * p + (1 - mix) * q))
    return 0.5 * np.sign(q - p)


def loss(teacher, hidden, unembedding, labels, mask, *, temperature, alpha, kind, mix=0.5):
    """Returns Σ w (α·scale·D + (1−α)·CE), Σ w KL, Σ w CE, ∂/∂hidden, ∂/∂unembedding."""
    hidden, unembedding = np.asarray(hidden, np.float64), np.asarray(unembedding, np.float64)
    student = hidden @ unembedding
    p = np.exp(log_softmax(np.asarray(teacher, np.float64) / temperature))
    q = np.exp(log_softmax(student / temperature))
    one_hot = np.eye(student.shape[-1])[labels]
    ce = -(one_hot * log_softmax(student)).sum(-1)
    scale = alpha * (temperature if kind == "tv" else temperature**2)
    w = np.asarray(mask, np.float64)
    slope = _slope(p, q, kind, mix)
    d_soft = q * (slope - (q * slope).sum(-1, keepdims=True)) / temperature
    d_logits = scale * d_soft + (1 - alpha) * (np.exp(log_softmax(student)) - one_hot)
    d_logits *= w[..., None]
    total = (w * (scale * divergence(p, q, kind, mix) + (1 - alpha) * ce)).sum()
    d_unembedding = np.einsum("btd,btv->dv", hidden, d_logits)
    kl = (w * divergence(p, q, "forward_kl")).sum()
    return total, kl, (w * ce).sum(), d_logits @ unembedding.T, d_unembedding


def targets(teacher, k):
    """Top-k ids, log-probs and exact tail grid [..., 7] of float64 teacher logits."""
    logp = log_softmax(teacher)
    order = np.argsort(-logp, axis=-1, kind="stable")
    ids, rest = order[..., :k], order[..., k:]
    tail = np.take_along_axis(logp, rest, -1)
    betas = np.array([0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8, 1])
    if tail.shape[-1] == 0:
        mass = np.full((*logp.shape[:-1], 7), -np.inf)
    else:
        scaled = betas[:, None] * tail[..., None, :]
        top = scaled.max(-1)
        mass = top + np.log(np.exp(scaled - top[..., None]).sum(-1))
    values = np.take_along_axis(logp, ids, -1)
    return ids.astype(np.int32), values.astype(np.float32), mass.astype(np.float32)
