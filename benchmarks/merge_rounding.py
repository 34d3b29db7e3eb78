"""What rounding, and NF4 after it, leave of a SLERP 19:1, by the size of the deltas: the table of docs/merging.md.

    python benchmarks/merge_rounding.py  # half a minute; needs bitsandbytes

A base of four million normal values (standard deviation 0.02), two models of it with independent deltas, merged by
scripts/merge.py's own code. Each figure is the least-squares fit of what is stored, less the base, on the two stored
deltas. NF4: with double quantisation, in blocks of 64, and back, as QLoRA loads a model. After it the fit's own
standard error is printed too: NF4's noise is a tenth of the weights, and hides small deltas.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np  # noqa: E402
import torch  # noqa: E402
from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from lmolt.merging import methods  # noqa: E402
from lmolt.merging.checkpoints import Checkpoint  # noqa: E402
from lmolt.merging.safetensors_io import decode  # noqa: E402
from lmolt.merging.settings import Recipe  # noqa: E402

SIZES, SHAPE, WEIGHTS = (0.1, 0.03, 0.01, 0.003, 0.001), (2048, 2048), [0.95, 0.05]


def checkpoints(folder: Path, size: float, dtype: torch.dtype) -> list[Checkpoint]:
    """The two models and their base, stored as `dtype`."""
    random = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(SHAPE, generator=random)
    tensors = [base + 0.02 * size * torch.randn(SHAPE, generator=random) for _ in range(2)] + [base]
    found = []
    for name, tensor in zip(("a", "b", "base"), tensors, strict=True):
        place = folder / f"{size}-{dtype}-{name}"
        place.mkdir()
        (place / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
        save_file({"w": tensor.to(dtype)}, place / "model.safetensors")
        found.append(Checkpoint(place))
    return found


def whole(source: Checkpoint) -> np.ndarray:
    return np.concatenate([*source.read("w", np.float64)])


def merge(sources: list[Checkpoint], dtype: str, rounding: str) -> np.ndarray:
    pieces: list[np.ndarray] = []
    methods.merge_tensor("w", sources[:2], None, Recipe("slerp", WEIGHTS, rounding=rounding), dtype, pieces.append)
    return np.concatenate([decode(piece, dtype, np.float64) for piece in pieces])


def fit(values: np.ndarray, sources: list[Checkpoint]) -> tuple[float, float, float]:
    """The two weights and the standard error of either."""
    a, b, base = map(whole, sources)
    deltas = np.stack([a - base, b - base], axis=1)
    weights, residue, *_ = np.linalg.lstsq(deltas, values - base, rcond=None)
    return (*weights.tolist(), float(np.sqrt(residue[0] / len(values) / (deltas[:, 1] @ deltas[:, 1]))))


def after_nf4(values: np.ndarray) -> np.ndarray:
    weight = torch.from_numpy(values).to(torch.bfloat16).reshape(SHAPE)
    return dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True)).double().numpy().ravel()


def main() -> None:
    print(
        "| deltas | bf16 | equal to the first model | fp16 | `--dtype float32` | bf16, `--rounding stochastic` |",
        end="",
    )
    print(" after NF4: bf16 | after NF4: stochastic | standard error after NF4 |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            bf16, fp16 = (checkpoints(Path(folder), size, dtype) for dtype in (torch.bfloat16, torch.float16))
            once, chance = merge(bf16, "BF16", "once"), merge(bf16, "BF16", "stochastic")
            fits = [fit(once, bf16), fit(merge(fp16, "F16", "once"), fp16), fit(merge(bf16, "F32", "once"), bf16)]
            fits += [fit(chance, bf16), fit(after_nf4(once), bf16), fit(after_nf4(chance), bf16)]
            cells = [f"{one:.3f} : {two:.3f}" for one, two, _ in fits]
            cells.insert(1, f"{100 * (once == whole(bf16[0])).mean():.0f} %")
            print(f"| {100 * size:g} % | {' | '.join(cells)} | {fits[-1][2]:.3f} |")


if __name__ == "__main__":
    main()
