"""A model's parameters, keyed by path."""

from flax import nnx


def parameters_by_path(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Every parameter by its dotted path, such as `blocks.query`."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): parameter for path, parameter in flat}
