"""Pairs, triples, the outputs that are scored: read, cleaned, checked, written."""
