"""Translate between molecules (SMILES) and language, and align language models to do it."""

__version__ = "0.1.0"
