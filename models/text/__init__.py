"""Tokenizers and chat templates. Needs no jax."""
