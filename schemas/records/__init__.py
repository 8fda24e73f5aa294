"""One record a row: tokens, logits, and logits padded to arrays."""
