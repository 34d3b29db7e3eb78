"""GPU memory that each strategy needs for 7B, 13B and 70B models: QLoRA's arithmetic, a Markdown table.

    python benchmarks/memory.py
    python benchmarks/memory.py --gpus 8 --tokens 4096 --rank 64 --json figures.json

A parameter of a linear layer takes 4.127 bits in NF4 (4, an 8-bit scale for 64 weights, a 32-bit one for 256 scales),
others 2 bytes. An adapter's takes 16 bytes: weight, gradient and Adam's two moments in fp32. Activations are those of
--gradient_checkpointing: a layer's input (2 bytes a number) for each token of the micro-batch, and one layer's whole
with its backward pass, 24 numbers as wide as the hidden state and 8 as wide as the MLP: what a 7B took on an H200,
where the rest is 0.3 GiB below this arithmetic (docs/performance.md). ZeRO-3 and FSDP hold two gathered layers beside
their shard. Every process loads the whole 4-bit model before it is sharded, so no strategy needs less than that; only
offload's does not stay.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # bytes a parameter
CONTEXT = 1.0  # GiB of CUDA, NCCL and fragments: an assumption
# bytes an adapter's parameter takes on each GPU, and those that all GPUs share; offload keeps the moments in RAM
ADAPTER = {"ddp": (16, 0), "zero2": (4, 12), "zero3": (0, 16), "fsdp_qlora": (0, 16), "zero3_offload": (0, 4)}
CARDS = (16, 24, 40, 48, 80)  # GB, as sold


@dataclass
class Llama:
    hidden: int
    intermediate: int
    layers: int
    kv: int  # width of keys and values
    vocabulary: int = 32_000

    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of one layer's projections: q, k, v, o, gate, up, down."""
        h, i, kv = self.hidden, self.intermediate, self.kv
        return [(h, h), (h, kv), (h, kv), (h, h), (h, i), (h, i), (i, h)]

    def n_linear(self) -> int:
        return self.layers * sum(a * b for a, b in self.linears())

    def n_lora(self, rank: int) -> int:
        return self.layers * sum(rank * (a + b) for a, b in self.linears())

    def bytes_4bit(self) -> float:
        return NF4 * self.n_linear() + 2 * (2 * self.vocabulary * self.hidden)


MODELS = {
    "7B": Llama(4096, 11008, 32, 4096),
    "13B": Llama(5120, 13824, 40, 5120),
    "70B": Llama(8192, 28672, 80, 1024),
}


def memory(model: Llama, strategy: str, gpus: int, tokens: int, rank: int) -> dict[str, float]:
    """GiB on each GPU while loading and while training."""
    whole, layer = model.bytes_4bit(), NF4 * model.n_linear() / model.layers
    base = {"ddp": whole, "zero2": whole, "zero3_offload": 2 * layer}.get(strategy, whole / gpus + 2 * layer)
    kept, shared = ADAPTER[strategy]
    adapter = model.n_lora(rank) * (kept + shared / gpus)
    width = 24 * model.hidden + 8 * model.intermediate
    activations = 2 * tokens * (model.layers * model.hidden + width)
    weight = 2 * max(a * b for a, b in model.linears())  # one matrix, dequantised
    training = (base + adapter + activations + weight) / GIB + CONTEXT
    return {"load": whole / GIB + CONTEXT, "train": training}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096, help="of a micro-batch, as --tokens_per_batch")
    parser.add_argument("--rank", type=int, default=64, help="of the adapter, on all linear layers")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    figures = {}
    print(f"GiB a GPU to load / to train, {args.gpus} GPUs, and the smallest card, in GB, that holds both\n")
    print("| model | " + " | ".join(ADAPTER) + " |\n|---" + "|---" * len(ADAPTER) + "|")
    for name, model in MODELS.items():
        cells = []
        for strategy in ADAPTER:
            needs = memory(model, strategy, args.gpus, args.tokens, args.rank)
            card = next((c for c in CARDS if c * 1e9 / GIB >= max(needs.values())), None)
            cells.append(f"{needs['load']:.0f} / {needs['train']:.0f}: {card or 'none'}")
            figures |= {f"{name}_{strategy}_{key}_gib": round(value, 2) for key, value in needs.items()}
        print(f"| {name} | " + " | ".join(cells) + " |")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
