"""The first reading of the inputs: each file from its first byte to its last, once.

It takes the hash, finds NaN and infinity, and on the way learns what a method has to know of whole tensors before it
merges their first value (methods.look), where the models' files have their tensors in one order, as files of one
version of transformers do. Where they don't, those tensors are read once more.
"""

from collections.abc import Callable, Iterator

import numpy as np

from lmolt.merging.checkpoints import Checkpoint
from lmolt.merging.methods import look, too_large
from lmolt.merging.safetensors_io import (
    PIECE,
    FirstReading,
    all_finite,
    inspect_file,
    not_finite,
)
from lmolt.merging.settings import Recipe


def read_inputs(
    models: list[Checkpoint],
    base: Checkpoint | None,
    recipe: Recipe | None,
    dtype: str,
    advance: Callable[[int], object],
) -> tuple[list[dict[str, str]], dict[str, list]]:
    """Size and XXH3-128 of each source's files (the base's last), by name, and {tensor: what `look` found}.

    `ValueError` names file and tensor of a value that isn't finite; `advance` counts values.
    """
    sources = [*models, base] if base else models
    hashes: list[dict[str, str]] = [dict.fromkeys(source.files, "") for source in sources]
    known: dict[str, list] = {}
    weights = lambda source, file: [e.name for e in source.files[file] if e.name in source.entries]
    together, alone = [], {(place, file) for place, source in enumerate(sources) for file in source.files}
    for file in models[0].files if recipe else ():
        names = weights(models[0], file)
        partners = {
            place: other
            for place, source in enumerate(sources)
            for other in source.files
            if names and (place, other) in alone and weights(source, other) == names
        }
        together.append((names, partners))
        alone -= set(partners.items())

    def read_together(job: tuple[list[str], dict[int, str]]) -> None:
        names, files = job
        readings = {place: FirstReading(sources[place].folder / file, advance) for place, file in files.items()}
        sums_tell = recipe.method in ("slerp", "nuslerp")  # a sum of squares that is finite is of finite values
        for name in names:
            left = dict(readings)

            def read(source: Checkpoint, name=name, left=left) -> Iterator[np.ndarray]:
                place = next((place for place in left if sources[place] is source), None)
                if place is None:
                    return source.bits(name)
                return left.pop(place).pieces(source.entries[name], not sums_tell)

            with np.errstate(
                invalid="ignore", over="ignore"
            ):  # of a broken model; the error comes as its piece is read
                known[name] = look(name, models, base, recipe, dtype, read)
            for place, reading in left.items():  # `look` had no need of it
                for _ in reading.pieces(sources[place].entries[name], size=4 * PIECE):
                    pass
            if sums_tell and not np.isfinite(known[name][0]).all():
                for source in sources:
                    _check(source, name)
                raise too_large(name)
        for place, file in files.items():
            hashes[place][file] = readings[place].finish()

    def read_alone(job: tuple[int, str]) -> None:
        place, file = job
        hashes[place][file] = inspect_file(sources[place].files[file], sources[place].kept, advance)

    # One after the other: two threads took as long, and a seventh more of the processor, waiting for Python's lock
    for job in together:
        read_together(job)
    for job in sorted(alone):
        read_alone(job)
    return hashes, known


def _check(source: Checkpoint, name: str) -> None:
    entry = source.entries[name]
    if not all(all_finite(bits, entry.dtype) for bits in source.bits(name)):
        raise not_finite(entry)
