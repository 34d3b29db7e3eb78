"""What the vocabulary head adds to a training step's peak memory, at 8 and at 32 triples, in chunks and at once.

    python benchmarks/head_memory.py --json figures.json

A random one-layer Llama (hidden 512, vocabulary 128,000, LoRA, fp32) runs forward and backward over a tree of triples
(prompt 170, outputs 60 and 80 tokens), once with every output scored and once with a single token scored; the
difference of the two peaks is the head's. Each run is a process, its peak the resident set's growth over the model.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
VOCABULARY, HIDDEN = 128_000, 512


def peak_growth(batch: int, chunk: int, all_scored: bool) -> int:
    """Bytes of a second step's peak over the resident set before it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from lmolt.models.attention import TREE
    from lmolt.models.tree import build_tree, tree_logps

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=1408,
        num_hidden_layers=1,
        num_attention_heads=8,
        attn_implementation=TREE,
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear"))
    draw = random.Random(0)
    ids = lambda n: [draw.randrange(VOCABULARY) for _ in range(n)]
    instruction = ids(90)
    sequences = []
    for _ in range(batch):
        prompt = instruction + ids(80)
        sequences += [(prompt, ids(60)), (prompt, ids(80))]
    if not all_scored:  # the same row but for its end: every output token becomes prompt, one is scored
        sequences = [(prompt + output[:-1], output[-1:]) for prompt, output in sequences]
    tree = build_tree(sequences)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tree_logps(model, tree, chunk).sum().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT", peak_growth(*args.one))
        return
    figures = {}
    for chunk in (256, 1 << 30):
        name = "chunked" if chunk == 256 else "at_once"
        for batch in (8, 32):
            with_head, without = (
                int(
                    subprocess.run(
                        [sys.executable, __file__, "--one", str(batch), str(chunk), str(scored)],
                        capture_output=True,
                        text=True,
                        check=True,
                    ).stdout.split()[-1]
                )
                for scored in (1, 0)
            )
            figures[f"{name}_{batch}_mb"] = (with_head - without) / 1e6
            print(f"{name}, {batch} triples: the head adds {figures[f'{name}_{batch}_mb']:,.0f} MB", flush=True)
        figures[f"{name}_growth"] = figures[f"{name}_32_mb"] / figures[f"{name}_8_mb"] - 1
        print(f"{name}: {figures[f'{name}_growth']:+.1%} from 8 to 32 triples")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
