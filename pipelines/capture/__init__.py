"""Rows → signals: units, commits, seals."""
