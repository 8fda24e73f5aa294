"""The loss: settings, targets from a cache, the fused head, terms that compare layers."""
