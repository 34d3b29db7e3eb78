"""Translate between molecules (SMILES) and language, and align language models to do it."""

import logging
import sys
from importlib.machinery import PathFinder

__version__ = "0.1.0"


class _NothingDownloaded:
    """On some CPUs bitsandbytes, when it is imported, downloads a kernel and runs it, or warns that it can't.

    Nobody asked for that: its module finds no package `kernels` while it is loaded, and does without.
    """

    module = "bitsandbytes.backends.cpu.ops"

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path) if name == cls.module else None
        if spec is not None:
            load = spec.loader.exec_module

            def exec_module(module):
                had = {"kernels": sys.modules["kernels"]} if "kernels" in sys.modules else {}
                sys.modules["kernels"] = None
                try:
                    load(module)
                finally:
                    del sys.modules["kernels"]
                    sys.modules.update(had)

            spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _NothingDownloaded)
logging.getLogger(_NothingDownloaded.module).setLevel(logging.ERROR)


def __getattr__(name: str):
    if name == "Translator":  # when it is asked for: it imports torch
        from lmolt.generation.translator import Translator

        return Translator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
