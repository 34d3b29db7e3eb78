"""What is computed of references and kept between runs: arrays in a file, whole or not at all."""

import logging
import zipfile
import zlib
from pathlib import Path

import numpy as np

from lmolt.files import write_cache

logger = logging.getLogger(__name__)


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    write_cache(path, lambda file: np.savez(file, **arrays))


def load_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """What `save_arrays` saved; None where there is nothing or, with a warning, where it is damaged."""
    try:
        with np.load(path) as stored:  # allow_pickle is off; each array has a checksum in the archive
            return dict(stored)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        logger.warning("%s is damaged (%s): computed again", path, " ".join(str(error).split()))
        return None
