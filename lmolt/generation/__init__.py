"""Translating with a model: decoding, named systems."""
