"""Time translation against `model.generate`, a prompt at a time and in batches, and against continuous batching.

    python benchmarks/translate.py
    python benchmarks/translate.py --model runs/demo/models/mol2cap --direction mol2cap --pairs demo --split test
    python benchmarks/translate.py --json translate.json

Without --model, both a Llama and a T5 with random weights (hidden 256, 6 layers, a token a character) and molecules of
RDKit's NCI set; a random model seldom ends an output, so one token in 25 ends one here. Both sides see the same
prompts, threads and end tokens. The first prompt is translated once by each side beforehand, untimed.
"""

import argparse
import itertools
import json
import string
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder or Hub id (default: two random models)")
    parser.add_argument("--pairs", help="demo, a file, or a Hub data set (default: RDKit's molecules)")
    parser.add_argument("--split")
    parser.add_argument("--direction", choices=("mol2cap", "cap2mol"), default="mol2cap")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def random_models():
    """(name, model, tokenizer): about 8 million parameters each."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        T5Config,
        T5ForConditionalGeneration,
    )

    signs = [
        "<pad>",
        "<s>",
        "</s>",
        *string.ascii_letters,
        *string.digits,
        *string.punctuation,
        "Ġ",
        "Ċ",
    ]  # space, newline
    raw = Tokenizer(models.BPE(vocab={sign: i for i, sign in enumerate(signs)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    torch.manual_seed(0)
    ids = {"vocab_size": len(signs), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    llama = LlamaConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        initializer_range=0.1,
        **ids,
    )
    t5 = T5Config(
        d_model=256,
        d_kv=32,
        d_ff=1024,
        num_layers=6,
        num_heads=8,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
        initializer_factor=2.0,
        **ids,
    )
    for name, model in (("llama", LlamaForCausalLM(llama)), ("t5", T5ForConditionalGeneration(t5))):
        model.generation_config.eos_token_id = list(range(2, len(signs), 25))
        yield name, model.eval(), tokenizer


def one_by_one(model, tokenizer, prompts: list[str], max_new_tokens: int) -> list[str]:
    """The plain way: each prompt through `generate`."""
    import torch

    from lmolt.prompts import encode_prompt

    texts, seq2seq = [], model.config.is_encoder_decoder
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"] if seq2seq else encode_prompt(tokenizer, prompt)
        ids = torch.tensor([ids], device=model.device)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(ends),
        )
        out = [token for token in out[0, 1 if seq2seq else ids.shape[1] :].tolist() if token not in ends]
        texts.append(tokenizer.decode(out, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip())
    return texts


def in_batches(model, tokenizer, prompts: list[str], max_new_tokens: int, size: int = 32) -> list[str]:
    """Padded batches of prompts of like length through `generate`."""
    import torch

    from lmolt.prompts import encode_prompt

    seq2seq, ends = model.config.is_encoder_decoder, model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    rows = [tokenizer(prompt)["input_ids"] if seq2seq else encode_prompt(tokenizer, prompt) for prompt in prompts]
    order, texts = sorted(range(len(rows)), key=lambda i: -len(rows[i])), [""] * len(rows)
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        width = max(len(rows[i]) for i in batch)
        pad = [[0] * (width - len(rows[i])) for i in batch]
        ids = [rows[i] + p if seq2seq else p + rows[i] for i, p in zip(batch, pad, strict=True)]
        ones = [[1] * len(rows[i]) for i in batch]
        mask = [m + p if seq2seq else p + m for m, p in zip(ones, pad, strict=True)]
        ids, mask = (torch.tensor(x, device=model.device) for x in (ids, mask))
        how = {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": sorted(ends), "pad_token_id": 0}
        out = model.generate(input_ids=ids, attention_mask=mask, **how)[:, 1 if seq2seq else width :].tolist()
        for i, row in zip(batch, out, strict=True):
            kept = list(itertools.takewhile(lambda token: token not in ends, row))
            texts[i] = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
    return texts


def main() -> None:
    args = parse_arguments()
    import torch
    from rdkit import RDConfig
    from transformers.utils import logging

    from lmolt.data.pairs import read_pairs
    from lmolt.generation.translate import load_translator, prompts_for, translate

    logging.set_verbosity_error()
    if args.pairs:
        key = "molecule" if args.direction == "mol2cap" else "caption"
        sources = [pair[key] for pair in read_pairs(args.pairs, args.split)]
    else:
        lines = (Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi").read_text().splitlines()
        sources = [line.split("\t")[0] for line in lines]
    sources = list(dict.fromkeys(sources))[: args.rows]
    systems = [(Path(args.model).name, *load_translator(args.model))] if args.model else random_models()
    figures = {}
    for name, model, tokenizer in systems:
        prompts = prompts_for(model.config, args.direction, sources)
        seconds, outputs = {}, {}
        ways = {
            "one_by_one": lambda p, m=model, t=tokenizer: one_by_one(m, t, p, args.max_new_tokens),
            "generate_in_batches": lambda p, m=model, t=tokenizer: in_batches(m, t, p, args.max_new_tokens),
            "batched": lambda p, m=model, t=tokenizer: translate(m, t, p, max_new_tokens=args.max_new_tokens),
        }
        for way, run in ways.items():
            run(prompts[:1])
            start = time.perf_counter()
            outputs[way] = run(prompts)
            seconds[way] = time.perf_counter() - start
        plain, peer, ours = outputs.values()
        identical = sum(map(str.__eq__, plain, ours)) / len(prompts)
        figures[f"{name}_generate_in_batches_identical"] = sum(map(str.__eq__, plain, peer)) / len(prompts)
        tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in outputs["one_by_one"])
        figures |= {f"{name}_{way}_s": s for way, s in seconds.items()}
        figures |= {
            f"{name}_speedup": seconds["one_by_one"] / seconds["batched"],
            f"{name}_identical": identical,
            f"{name}_tokens_per_row": tokens / len(prompts),
        }
        print(
            f"{name}: {len(prompts)} prompts, {tokens / len(prompts):.0f} new tokens each: one by one "
            f"{seconds['one_by_one']:.1f} s, generate in batches "
            f"{seconds['generate_in_batches']:.1f} s, translate {seconds['batched']:.1f} s, "
            f"{figures[f'{name}_speedup']:.1f}x; {identical:.1%} of rows identical",
            flush=True,
        )
    figures |= {"rows": len(sources), "threads": torch.get_num_threads(), "device": str(model.device)}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
