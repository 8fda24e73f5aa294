"""Corpus → rows → cache, on Beam."""
