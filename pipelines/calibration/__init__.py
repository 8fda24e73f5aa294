"""The step before capture: the teacher reads a sample of rows, and tables and plan are frozen."""
