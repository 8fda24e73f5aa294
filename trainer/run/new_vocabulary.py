"""A student with another vocabulary than the model that it is cut from: its first embeddings.

A token starts with the embedding of the source's token that is the same text, or else of the
source's first token of its text. What has neither starts with the mean of all embeddings.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from decant.models import Decoder
from decant.models.parameters import parameters_by_path
from decant.models.text.projection import project_vocabulary
from decant.models.text.tokenizer import Tokenizer

_EMBEDDING, _LAYERS, _HEAD = "embedding", "layer_embedding", "head"


def with_vocabulary(student: Decoder, *, own: Tokenizer, new: Tokenizer, size: int) -> Decoder:
    """The student with `size` tokens, of the tokenizer `new`; its own tokenizer is `own`.

    ValueError if a tokenizer does not keep the text, so that tokens cannot be compared.
    """
    like = project_vocabulary(new, own).first[:size]
    like = np.append(like, np.full(size - len(like), -1, like.dtype))
    like = np.where(like < student.config.vocab_size, like, -1)
    config = student.config.with_vocabulary(size)
    types = {"dtype": student.dtype, "param_dtype": student.param_dtype}
    changed = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **types))
    before = parameters_by_path(student)
    for path, parameter in parameters_by_path(changed).items():
        array = before[path].get_value()
        if path == _EMBEDDING:
            array = _rows_like(array, like)
        elif path == _LAYERS:
            array = _rows_like(array, np.where(like < len(array), like, 0))
        elif path == _HEAD:
            array = _rows_like(array.T, like).T
        parameter.set_value(array)
    return changed


def _rows_like(
    table: Float[Array, " vocab *embed"], like: Int[np.ndarray, " size"]
) -> Float[Array, " size *embed"]:
    mean = jnp.mean(table.astype(jnp.float32), axis=0).astype(table.dtype)
    known = (like >= 0).reshape(-1, *[1] * mean.ndim)
    return jnp.where(known, table[np.maximum(like, 0)], mean)
