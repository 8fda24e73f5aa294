"""Independent formulas of ULD and GOLD in float64 numpy, for one position at a time."""

import numpy as np

from tests.formulas.dense import BETAS, divergence, log_softmax


def known_uld(p, q, k):
    """Σ |p_(i) − q_(i)| over the k largest p, and the difference of what is left of both."""
    p, q = np.sort(p)[::-1], np.sort(q)[::-1]
    q = np.pad(q, (0, max(0, k - len(q))))
    return np.abs(p[:k] - q[:k]).sum() + abs(p[k:].sum() - q[k:].sum())


def uld(p, q):
    """Σ |p_(i) − q_(i)|, the shorter list filled up with 0."""
    size = max(len(p), len(q))
    p, q = (np.sort(np.pad(x, (0, size - len(x)))) for x in (p, q))
    return np.abs(p - q).sum()


def known_gold(p, q, k, *, partner, mix, temperature):
    """w·T²·JSD + (1 − w)·T·ULD of the others, from the k largest p.

    `partner` is the student's id of each of the teacher's tokens, or −1.
    """
    head = np.argsort(-p, kind="stable")[:k]
    own = head[partner[head] >= 0]
    a = np.append(p[own], 1 - p[own].sum())
    b = np.append(q[partner[own]], 1 - q[partner[own]].sum())
    matched = divergence(a.clip(1e-300), b.clip(1e-300), "jsd", mix)
    alone = np.sort(p[head[partner[head] < 0]])[::-1]
    others = np.sort(np.delete(q, partner[partner >= 0]))[::-1]
    others = np.pad(others, (0, max(0, len(alone) - len(others))))
    n = len(alone)
    unmatched = np.abs(alone - others[:n]).sum() + max(
        0, others[n:].sum() - np.delete(p, head).sum()
    )
    share = (partner >= 0).mean()
    return share * temperature**2 * matched + (1 - share) * temperature * unmatched


def loss(teacher, hidden, unembedding, targets, soft, *, temperature, alpha):
    """Σ α·soft(p, q) + (1 − α)·CE over the counted positions, with p and q at the temperature."""
    student = np.asarray(hidden, np.float64) @ np.asarray(unembedding, np.float64)
    total = 0.0
    for at in np.argwhere(targets.mask):
        at = tuple(at)
        p, q = (np.exp(log_softmax(x[at] / temperature)) for x in (teacher, student))
        total += alpha * soft(p, q) - (1 - alpha) * log_softmax(student[at])[targets.labels[at]]
    return total


def split_targets(targets, teacher, *, k, partner):
    """`targets` as `Cache.read` gives them for matched targets of this teacher."""
    logp = log_softmax(teacher)
    shape = (*logp.shape[:-1], k)
    ids, own, alone = np.zeros(shape, np.int32), np.full(shape, -np.inf), np.full(shape, -np.inf)
    masses = np.full((*logp.shape[:-1], len(BETAS)), -np.inf)
    for at in np.argwhere(targets.mask):
        at = tuple(at)
        head = np.argsort(-logp[at], kind="stable")[:k]
        mine, others = head[partner[head] >= 0], head[partner[head] < 0]
        ids[at][: len(mine)], own[at][: len(mine)] = partner[mine], logp[at][mine]
        alone[at][: len(others)] = logp[at][others]
        rest = np.delete(logp[at], mine)
        if len(rest):
            masses[at] = np.log(np.exp(BETAS[:, None] * rest).sum(-1))
    arrays = (own, masses, alone)
    own, masses, alone = (x.astype(np.float32) for x in arrays)
    return targets._replace(topk_ids=ids, topk_logprobs=own, tail_logmass=masses, unmatched=alone)
