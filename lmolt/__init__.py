"""Translate between molecules (SMILES) and language, and align language models to do it."""

import logging

__version__ = "0.1.0"

# On some CPUs bitsandbytes warns, whenever it is imported, that it lacks a kernel which it would download.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str):
    if name == "Translator":  # when it is asked for: it imports torch
        from lmolt.generation.translator import Translator

        return Translator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
