"""One record per row: tokens or logits; and logits padded to arrays."""
