"""Checkpoints: complete and intact, or not there. Importing the package itself imports no torch."""
