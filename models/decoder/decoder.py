"""The decoder: embedding, L blocks of attention and MLP, a final norm, a head.

Blocks are stacked: each parameter has a leading `layers` axis, over which the forward pass scans.
Compared with 30 unrolled blocks this runs as fast and compiles in less than half the time. Blocks
of two kinds lie in two stacks; if the kinds repeat, an outer scan goes over the repetitions
(`decoder/schedule.py`). The scan also goes over the settings that differ between blocks
(`BlockPattern`). Norms, softmax and the residual stream are float32; matrix products take operands
in `dtype` and sum in float32.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int, Shaped

from decant.models.config import ModelConfig
from decant.models.decoder import altup
from decant.models.decoder.activations import cutoff
from decant.models.decoder.attention import attention_probabilities
from decant.models.decoder.blocks import (
    BlockPattern,
    Blocks,
    KeysAndValues,
    Past,
    Rotation,
    Rotations,
)
from decant.models.decoder.initializer import Initializer
from decant.models.decoder.linear_attention import LinearState
from decant.models.decoder.norms import add_norm, norm, norm_parameters
from decant.models.decoder.schedule import schedule
from decant.models.mesh.execution import WITHOUT_MESH, Execution
from decant.models.numerics import contract
from decant.models.rotary import attention_factor, cos_and_sin, frequencies, grown

# Callers may pass batches as numpy arrays.
Rows = Array | np.ndarray


class Memory(NamedTuple):
    """What a decoder keeps of rows that it has read, so that each new token costs one position.

    Rows have slots for all the tokens that they may get. Every row is filled up to the same slot:
    shorter ones begin with padding.
    """

    kept: dict[str, KeysAndValues | LinearState | None]
    """Of each stack of blocks: keys and values [layers, batch, slots, kv_heads, head_dim], or of
    linear attention the state after the last token, [layers, batch, …]. None if the blocks read
    those of another stack."""
    segment_ids: Int[Array, "batch slots"]
    """0 is padding; all slots that are still to be filled have 1."""
    length: Int[Array, ""]
    """Slots that are filled."""


def _of_keys(function: Callable[..., Array], of: Any, *others: Any) -> Any:
    """`function` of keys and of values; other things, or nothing, as they are."""
    return tuple(map(function, of, *others)) if type(of) is tuple else of


class Decoder(nnx.Module):
    """A decoder-only language model up to its final hidden states; `numerics.logits` does the rest.

    Every parameter has `axes` metadata, its logical axis names; see `mesh/sharding.py`.

    Args:
        config: shape of the model.
        rngs: for new weights.
        dtype: of the operands of matrix products.
        param_dtype: in which weights are kept.
    """

    blocks: Blocks
    first_blocks: Blocks
    linear_blocks: Blocks

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.config = config
        self.blocks: Blocks
        self.first_blocks: Blocks
        self.dtype = jnp.dtype(dtype)
        self.param_dtype = jnp.dtype(param_dtype)
        new = Initializer(rngs, self.param_dtype)
        c = config
        self.embedding = new.normal(vocab=c.vocab_size, embed=c.hidden_size)
        if c.learned_positions:
            self.positions = new.normal(positions=c.max_positions, embed=c.hidden_size)
        for name, stack in c.stacks.items():
            setattr(self, name, Blocks(stack.config, new=new, dtype=self.dtype))
        if c.layer_input_dim:
            own = {"layers": c.num_layers}
            rows = {"rows": c.layer_input_rows or c.vocab_size}
            self.layer_embedding = new.normal(**rows, **own, rank=c.layer_input_dim)
            self.layer_projection = new.normal(embed=c.hidden_size, **own, rank=c.layer_input_dim)
            add_norm(self, "layer_input_norm", new=new, config=c, norm=c.layer_input_dim)
        if c.stream_copies > 1:
            altup.add_projections(self, new=new)
        add_norm(self, "final_norm", new=new, config=c, norm=c.hidden_size)
        if not c.tie_embeddings:
            self.head = new.normal(embed=c.hidden_size, vocab=c.vocab_size)

    def __call__(
        self,
        tokens: Int[Rows, "batch time"],
        segment_ids: Int[Rows, "batch time"],
        positions: Int[Rows, "batch time"],
        *,
        hidden_layers: Sequence[int] = (),
        execution: Execution = WITHOUT_MESH,
    ) -> tuple[Float[Array, "batch time embed"], dict[int, Float[Array, "batch time embed"]]]:
        """The states that the head reads, in `dtype`, and those of chosen layers by number.

        Layer 0 is the embedding's output and layer i the output of the i-th block, both in float32
        as the next block reads them; of a stream of several copies, the first. Layer L (or −1) is
        the states after the final norm, in `dtype`. The head reads those divided by
        `config.logit_divisor`.

        Args:
            tokens: ids of the rows' tokens.
            segment_ids: attention never crosses a segment; 0 is padding.
            positions: position of each token within its segment.
            hidden_layers: numbers of the layers to return; −1 is returned as L. ValueError for a
                layer that does not exist.
            execution: the mesh, and what the backward pass keeps.
        """
        tokens, segment_ids, positions = map(jnp.asarray, (tokens, segment_ids, positions))
        last = self.config.num_layers
        wanted = self._layer_numbers(hidden_layers)
        x = execution.split_rows(self._embed(tokens, positions, execution))
        chosen = {0: x} if 0 in wanted else {}

        inner = [layer for layer in wanted if 0 < layer < last]
        x, kept, _ = self._through_blocks(
            x,
            segment_ids,
            self._rotations(positions),
            layer_inputs=self._layer_inputs(tokens, x, execution),
            keep=inner,
            execution=execution,
        )
        chosen |= zip(inner, kept, strict=True)

        x = norm(x, norm_parameters(self, "final_norm"), config=self.config)
        if last in wanted:
            chosen[last] = x.astype(self.dtype)
        return self._for_head(x), chosen

    def read_prompts(
        self,
        tokens: Int[Rows, "batch time"],
        segment_ids: Int[Rows, "batch time"],
        positions: Int[Rows, "batch time"],
        *,
        slots: int,
        execution: Execution = WITHOUT_MESH,
    ) -> tuple[Float[Array, "batch embed"], Memory]:
        """The states that the head reads after each prompt, and a memory to go on from.

        Prompts end in the last column: shorter ones have padding (segment 0) before them.
        Scalings of positions that go by a row's length go by `slots`, from the first token on.

        Args:
            tokens: ids of the prompts' tokens.
            segment_ids: 1, and 0 for padding.
            positions: of each token in its prompt.
            slots: the most tokens of a row, padding included.
            execution: the mesh.
        """
        tokens, segment_ids, positions = map(jnp.asarray, (tokens, segment_ids, positions))
        batch, time = tokens.shape
        x = execution.split_rows(self._embed(tokens, positions, execution))
        rotations = self._rotations(positions, length=slots)
        x, _, made = self._through_blocks(
            x,
            segment_ids,
            rotations,
            layer_inputs=self._layer_inputs(tokens, x, execution),
            keep=(),
            execution=execution,
            remember=True,
        )
        free = ((0, 0), (0, 0), (0, slots - time), (0, 0), (0, 0))
        still = jnp.ones((batch, slots - time), segment_ids.dtype)
        memory = Memory(
            kept={
                stack: _of_keys(lambda keys: jnp.pad(keys, free), of) for stack, of in made.items()
            },
            segment_ids=jnp.concatenate([segment_ids, still], axis=1),
            length=jnp.asarray(time, jnp.int32),
        )
        x = norm(x[:, -1:], norm_parameters(self, "final_norm"), config=self.config)
        return self._for_head(x)[:, 0], memory

    def read_next(
        self,
        tokens: Int[Array, " batch"],
        positions: Int[Array, " batch"],
        memory: Memory,
        *,
        execution: Execution = WITHOUT_MESH,
    ) -> tuple[Float[Array, "batch embed"], Memory]:
        """The states that the head reads after one more token of each row, and the new memory."""
        slots, at = memory.segment_ids.shape[1], memory.length
        x = execution.split_rows(self._embed(tokens[:, None], positions[:, None], execution))
        x, _, made = self._through_blocks(
            x,
            jnp.ones_like(tokens)[:, None],
            self._rotations(positions[:, None], length=slots),
            layer_inputs=self._layer_inputs(tokens[:, None], x, execution),
            keep=(),
            execution=execution,
            remember=True,
            memory=memory,
        )

        def extended(new: Array, all_slots: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(all_slots, new, at, axis=2)

        kept = {stack: _of_keys(extended, of, memory.kept[stack]) for stack, of in made.items()}
        x = norm(x, norm_parameters(self, "final_norm"), config=self.config)
        return self._for_head(x)[:, 0], memory._replace(kept=kept, length=at + 1)

    def attention_maps(
        self,
        states: Float[Array, "batch time embed"],
        segment_ids: Int[Rows, "batch time"],
        positions: Int[Rows, "batch time"],
        *,
        layer: int | Array,
        key_states: Float[Array, "batch time embed"] | None = None,
        heads: Sequence[int] | None = None,
        keep: Callable[[Array], Array] | None = None,
    ) -> Shaped[Array, "batch chosen time time"]:
        """Attention probabilities of one block, [batch, head, query, key], float32 without `keep`.

        A query sees the keys of its own segment up to itself; everything else is zero. Padding is a
        segment, so its queries see padding. Only queries and keys are computed again, so that
        the forward pass keeps its fast attention.

        Args:
            states: the block's input, hidden layer `layer` as `__call__` returns it.
            segment_ids: as for `__call__`.
            positions: as for `__call__`.
            layer: number of the block, from 0; an array if the caller scans over blocks. ValueError
                for a block of linear attention, which has no map; an array must not name one.
            key_states: the input of the block whose keys this one reads, hidden layer
                `config.key_sources[layer]`. None: the block's own; ValueError if it has no keys.
            heads: which heads, in this order; None is all.
            keep: see `decoder.attention.attention_probabilities`.
        """
        if not isinstance(layer, jax.Array) and self.config.layers_linear[layer]:
            raise ValueError(
                f"block {layer} has linear attention, which has no attention maps; those of blocks "
                f"{', '.join(map(str, self.config.blocks_with_maps))} exist."
            )
        if self.config.stream_copies > 1:
            raise ValueError(
                f"block {layer} {self.config.why_no_maps(0)}: there are no maps of it."
            )
        segment_ids, positions = jnp.asarray(segment_ids), jnp.asarray(positions)
        every = range(self.config.num_heads)
        pattern = jax.tree.map(lambda x: x[layer], self._patterns(states.shape[1]))
        block = maker = self._attention_of(layer)
        if block.reads:
            source = self.config.key_sources[int(layer)]
            if key_states is None:
                raise ValueError(
                    f"block {layer} reads the keys of block {source}: its attention maps need that "
                    "block's input, too."
                )
            maker = self._attention_of(source)
        rotations = self._rotations(positions)
        if self.config.several_attentions:
            rotations, pattern = self._own_rotation(layer, rotations, pattern)
        q = block.queries(block.before(states, "attention_norm"), rotations, pattern)
        source_states = states if key_states is None or not block.reads else key_states
        k = maker.keys(maker.before(source_states, "attention_norm"), rotations, pattern)
        return attention_probabilities(
            q,
            k,
            segment_ids,
            pattern.window,
            heads=every if heads is None else heads,
            scale=self.config.score_scale,
            softcap=self.config.attention_softcap,
            sinks=block.sink_scores(),
            keep=keep,
        )

    def _for_head(self, x: Array) -> Array:
        """Normed final states as the head reads them, in `dtype`."""
        divisor = self.config.logit_divisor
        # Before rounding to `dtype`: a rounded state or head would be rounded twice.
        return (x if divisor == 1 else x / divisor).astype(self.dtype)

    def unembedding(self) -> Float[Array, "embed vocab"]:
        """The head as [D, V]; a product with the transpose of [V, D] was 3.6× slower.

        With tied embeddings this is a transposed copy, so call it once, outside loops.
        """
        return self.embedding[...].T if self.config.tie_embeddings else self.head[...]

    def _embed(
        self,
        tokens: Int[Array, "batch time"],
        positions: Int[Array, "batch time"],
        execution: Execution,
    ) -> Float[Array, "batch time embed"]:
        c = self.config
        table = execution.gather_matrix(self.embedding[...], ("vocab", "embed"))
        x = table[tokens].astype(jnp.float32)
        if c.scale_embedding:
            # Rounded to the weights' dtype: Gemma was trained in bfloat16, with 55.5 for √3072.
            x = x * jnp.asarray(c.hidden_size**0.5, self.param_dtype)
        if c.embedding_multiplier != 1:
            x = x * c.embedding_multiplier
        if c.learned_positions:
            if tokens.shape[1] > c.max_positions:
                raise ValueError(
                    f"rows of {tokens.shape[1]} tokens, but the model has {c.max_positions} "
                    "learned positions; use shorter rows."
                )
            table = execution.gather_matrix(self.positions[...], ("positions", "embed"))
            x = x + table[positions]
        return x

    def _rotations(
        self, positions: Int[Array, "batch time"], *, length: int | None = None
    ) -> Rotations:
        """Each different rotation of a block, in the order of `_rotation_numbers`.

        `length` is that of the rows; None: there is a position for each of their tokens.
        """
        c, scaling = self.config, self.config.rope_scaling
        if not any(c.layers_rotate):
            return []
        # The length of the row, not of its documents: what is packed beside a document, or how
        # a corpus is cut, then never changes the function.
        table = frequencies(
            head_dim=c.full_head_dim or c.turned,
            theta=c.rope_theta,
            scaling=scaling,
            length=length or positions.shape[1],
        )
        growth = None if c.query_growth is None else grown(positions, *c.query_growth)
        rotation = cos_and_sin(positions, table, factor=attention_factor(scaling))
        rotations = [Rotation(*rotation, growth)]
        if c.window_rope_theta is not None:
            local = frequencies(head_dim=c.turned, theta=c.window_rope_theta)
            rotations.append(Rotation(*cos_and_sin(positions, local), growth))
        if not all(c.layers_rotate):
            still = jnp.ones_like(rotation[0]), jnp.zeros_like(rotation[1])
            rotations.append(Rotation(*still, growth))
        return rotations

    def _rotation_numbers(self) -> np.ndarray | None:
        """Which of `_rotations` each block uses; None if there is at most one.

        First that of blocks without a window, then that of blocks with a window if it differs, then
        none at all.
        """
        c = self.config
        two = c.window_rope_theta is not None
        if not any(c.layers_rotate) or (all(c.layers_rotate) and not two):
            return None
        kinds = zip(c.layer_windows, c.layers_rotate, strict=True)
        return np.array([(two and w is not None) if on else 1 + two for w, on in kinds], np.int32)

    def _own_rotation(
        self, layer: int | Array, rotations: Rotations, pattern: BlockPattern
    ) -> tuple[Rotations, BlockPattern]:
        """The only rotation of a block, and its settings without the number of that rotation.

        Blocks of a stack are alike then, and rotations of another stack may have other shapes.
        """
        numbers = self._rotation_numbers()
        only = rotations if numbers is None else [rotations[numbers[layer]]]
        full = self.config.layer_windows[int(layer)] is None
        return only, pattern._replace(rotation=None, window=None if full else pattern.window)

    def _layer_inputs(
        self, tokens: Int[Array, "batch time"], x: Array, execution: Execution
    ) -> Float[Array, "layers batch time width"] | None:
        """What each block gets of each token: (its own embedding + a map of x) / √2."""
        c = self.config
        if not c.layer_input_dim:
            return None
        table = execution.gather_matrix(self.layer_embedding[...], ("rows", "layers", "rank"))
        known = c.layer_input_rows or c.vocab_size
        own = table[jnp.where(tokens < known, tokens, 0)].astype(jnp.float32)
        own = own * jnp.asarray(c.layer_input_dim**0.5, self.param_dtype)
        matrix = execution.gather_matrix(
            self.layer_projection[...], ("embed", "layers", "rank"), dtype=self.dtype
        )
        made = contract("btd,dlr->btlr", x.astype(self.dtype), matrix) * c.hidden_size**-0.5
        made = norm(made, norm_parameters(self, "layer_input_norm"), config=c)
        return jnp.moveaxis((made + own) * 2**-0.5, 2, 0)

    def _patterns(self, time: int) -> BlockPattern:
        """The settings of every block for rows of `time` tokens, arrays of shape [layers]."""
        windows = self.config.layer_windows
        # If every window is as long as the row, no mask is needed.
        sizes = np.array([min(w or time, time) for w in windows], np.int32)
        rotations, sparsity = self._rotation_numbers(), self.config.layers_sparsity
        return BlockPattern(
            window=jnp.asarray(sizes) if (sizes < time).any() else None,
            rotation=None if rotations is None else jnp.asarray(rotations),
            cutoff=jnp.asarray([cutoff(share) for share in sparsity]) if any(sparsity) else None,
        )

    def _layer_numbers(self, hidden_layers: Sequence[int]) -> list[int]:
        """The layers in ascending order, −1 replaced by L."""
        last = self.config.num_layers
        for layer in hidden_layers:
            if not -1 <= layer <= last:
                raise ValueError(
                    f"hidden layer {layer} does not exist: this model has layers 0 (embedding) "
                    f"to {last} (after the final norm, also −1)."
                )
        return sorted({last if layer == -1 else layer for layer in hidden_layers})

    def _attention_of(self, layer: int | Array) -> Blocks:
        """A block of which only the norm, the queries and the keys may be used."""
        if self.config.several_attentions:
            assert not isinstance(layer, jax.Array), "blocks have several shapes"
            number = int(layer)
            name, stack = next(s for s in self.config.stacks.items() if number in s[1].layers)
            graph, stacked = nnx.split(getattr(self, name))
            at = stack.layers.index(number)
            return nnx.merge(graph, jax.tree.map(lambda x: x[at], stacked))
        graph, stacked = nnx.split(self.blocks)
        count = self.config.dense_layers
        if not count:
            # Where it lies in the stack of the blocks that have maps.
            places = np.cumsum(np.logical_not(self.config.layers_linear)) - 1
            at = jnp.asarray(places)[layer] if isinstance(layer, jax.Array) else places[layer]
            return nnx.merge(graph, jax.tree.map(lambda x: x[at], stacked))
        # Blocks of both stacks have equal attention; `layer` may be traced.
        _, first = nnx.split(self.first_blocks)
        others = {path: parameter.get_value() for path, parameter in nnx.to_flat_state(first)}

        def one(path: tuple, parameter: nnx.Variable) -> nnx.Variable:
            array, other = parameter.get_value(), others.get(path)
            late = array[jnp.maximum(layer - count, 0)]
            if other is None or other.shape[1:] != array.shape[1:]:
                return parameter.replace(late)
            early = other[jnp.minimum(layer, count - 1)]
            return parameter.replace(jnp.where(layer < count, early, late))

        chosen = [(path, one(path, parameter)) for path, parameter in nnx.to_flat_state(stacked)]
        return nnx.merge(graph, nnx.from_flat_state(chosen))

    def _through_blocks(
        self,
        x: Float[Array, "batch time embed"],
        segment_ids: Int[Array, "batch time"],
        rotations: Rotations,
        *,
        layer_inputs: Array | None,
        keep: Sequence[int],
        execution: Execution,
        remember: bool = False,
        memory: Memory | None = None,
    ) -> tuple[Array, list[Array], dict[str, Any]]:
        """The last block's output, and those of the blocks whose numbers (from 1) `keep` lists.

        With `remember`, also what the blocks of each stack made of the tokens, stacked: keys and
        values, or states.
        """
        # One slot per kept layer, and a spare slot that all other layers overwrite, so that the
        # outputs of all L blocks never exist together.
        spare = len(keep)
        slots = np.full(self.config.num_layers, spare)
        slots[[layer - 1 for layer in keep]] = np.arange(spare)
        kept = jnp.zeros((spare + 1, *x.shape), x.dtype) if keep else None
        copies = self.config.stream_copies > 1
        if copies:
            x = altup.spread(self, x, execution)

        def through(stack: str, carry: Any, per_layer: Any) -> Any:
            """The carry after a run of alike blocks, and what they made."""
            graph, source, first = graphs[stack], sources.get(stack), stacks[stack].layers[0]

            @execution.remat_block
            def block(weights, x, pattern, past, read):
                weights = execution.gather_weights(weights, dtype=self.dtype)
                if memory is not None:
                    past = Past(past, memory.segment_ids, memory.length)
                own = rotations
                if self.config.several_attentions:
                    own, pattern = self._own_rotation(first, rotations, pattern)
                x, made, seen = nnx.merge(graph, weights)(x, segment_ids, own, pattern, past, read)
                seen = seen if stack in sources.values() else None
                return execution.split_rows(x), made if remember else None, seen

            def step(carry, per_layer):
                (x, kept, read), (weights, (pattern, slot), past) = carry, per_layer
                x, made, seen = block(weights, x, pattern, past, read.get(source))
                if kept is not None:
                    state = x[:, :, 0] if copies else x
                    kept = lax.dynamic_update_index_in_dim(kept, state, slot, 0)
                # The last block of the stack is the one that others read.
                return (x, kept, read if seen is None else read | {stack: seen}), made

            return lax.scan(step, carry, per_layer)

        time = x.shape[1] if memory is None else memory.segment_ids.shape[1]
        patterns = self._patterns(time)._replace(layer_input=layer_inputs)
        settings, stacks = (patterns, jnp.asarray(slots)), self.config.stacks
        # Whose keys and values the blocks of a stack read, and those so far.
        sources = self._sources()
        read = {
            stack: self._no_keys(stacks[stack].config, (x.shape[0], time))
            for stack in sources.values()
        }
        graphs, weights = {}, {}
        for name in stacks:
            graphs[name], weights[name] = nnx.split(getattr(self, name))
        pasts = memory.kept if memory else dict.fromkeys(stacks)
        carry, made = (x, kept, read), {name: [] for name in stacks}
        for part in schedule(stacks):
            arrays = [
                (
                    part.of_stack(run, weights[run.stack]),
                    part.of_model(run, settings),
                    part.of_stack(run, pasts[run.stack]),
                )
                for run in part.runs
            ]

            def period(carry, arrays, part=part):
                outputs = []
                for run, per_layer in zip(part.runs, arrays, strict=True):
                    carry, output = through(run.stack, carry, per_layer)
                    outputs.append(output)
                return carry, outputs

            if part.repeats == 1:
                carry, outputs = period(carry, jax.tree.map(lambda a: a[0], arrays))
                outputs = jax.tree.map(lambda a: a[None], outputs)
            else:
                carry, outputs = lax.scan(period, carry, arrays)
            for stack, of_part in part.by_stack(outputs).items():
                made[stack].append(of_part)
        x, kept, _ = carry
        if copies:
            x = altup.merge(self, x, execution)
        every = {
            stack: jax.tree.map(lambda *parts: jnp.concatenate(parts), *parts)
            for stack, parts in made.items()
        }
        return x, [] if kept is None else [kept[i] for i in range(spare)], every

    def _sources(self) -> dict[str, str]:
        """Each stack whose blocks read keys and values → the stack that makes them."""
        c = self.config
        names = {layer: name for name, stack in c.stacks.items() for layer in stack.layers}
        if not c.reading_layers:
            return {}
        return {names[i]: names[source] for i, source in enumerate(c.key_sources) if i != source}

    def _no_keys(self, of: ModelConfig, shape: tuple[int, int]) -> KeysAndValues:
        keys = jnp.zeros((*shape, of.num_kv_heads, of.head_dim), self.dtype)
        return keys, jnp.zeros((*shape, of.num_kv_heads, of.value_width), self.dtype)
