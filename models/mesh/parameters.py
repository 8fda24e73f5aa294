"""A model's parameters by name."""

from flax import nnx


def parameters(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Every parameter by its dotted path, `blocks.query`: the name that files map to theirs."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): parameter for path, parameter in flat}
