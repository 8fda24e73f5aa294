"""What is measured on a sample and frozen before capture."""
