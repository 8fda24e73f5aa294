"""Devices: meshes, sharding rules, and how a model runs over a mesh."""
