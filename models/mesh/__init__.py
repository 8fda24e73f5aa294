"""Devices: sharding rules, and how a model runs over a mesh of them."""
