"""Checkpoints: opened, loaded onto devices, written back, quantised, cut into students."""
