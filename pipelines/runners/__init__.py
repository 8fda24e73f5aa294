"""Beam runners."""
