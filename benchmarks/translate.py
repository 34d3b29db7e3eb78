"""Time translation against `model.generate`, a prompt at a time and in batches, and against continuous batching.

    python benchmarks/translate.py
    python benchmarks/translate.py --model runs/demo/models/mol2cap --direction mol2cap --pairs demo --split test
    python benchmarks/translate.py --json translate.json
    OMP_NUM_THREADS=2 python benchmarks/translate.py --large --rows 200

Without --model, both a Llama and a T5 with random weights (hidden 256, 6 layers, a token a character) and molecules of
RDKit's NCI set; --large is a Llama of 113 million parameters (768, 12 layers), which isn't run a prompt at a time. A
random model seldom ends an output, so one token in 25 ends one here. All see the same prompts, threads and end tokens.
The first prompt is translated once by each beforehand, untimed. Where two outputs differ, the plain model's two best
logits at the first token that does are asked for: a gap over 1e-3 is an error, a smaller one is counted. Continuous
batching is transformers' (`generate_batch`, causal models), with a cache of 65,536 tokens.
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
    parser.add_argument("--large", action="store_true", help="a random Llama of 113 million parameters")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def random_models(large: bool):
    """(name, model, tokenizer): about 8 million parameters each, or one of 113 million."""
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
        hidden_size=768 if large else 256,
        intermediate_size=3072 if large else 1024,
        num_hidden_layers=12 if large else 6,
        num_attention_heads=12 if large else 8,
        initializer_range=0.05 if large else 0.1,
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
    kinds = {"llama": (LlamaForCausalLM, llama)} | ({} if large else {"t5": (T5ForConditionalGeneration, t5)})
    for name, (kind, config) in kinds.items():
        model = kind(config)
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


def continuous(model, tokenizer, prompts: list[str], max_new_tokens: int) -> list[str]:
    """transformers' continuous batching; its own choice of a cache's size on a CPU is all of the memory."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    from lmolt.prompts import encode_prompt

    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    how = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=sorted(ends), pad_token_id=0, bos_token_id=1
    )
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    cache = ContinuousBatchingConfig(num_blocks=256, max_batch_tokens=4096)
    found = model.generate_batch(rows, generation_config=how, continuous_batching_config=cache, warmup=False)
    kept = {
        int(name.rpartition("_")[2]): [token for token in one.generated_tokens if token not in ends]
        for name, one in found.items()
    }
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
    return [decode(kept[i]) for i in sorted(kept)]


def close_calls(model, tokenizer, prompts: list[str], ours: list[str], theirs: list[str]) -> int:
    """How many outputs differ, each from a token on whose two best logits are within 1e-3; else `ValueError`."""
    import torch

    from lmolt.prompts import encode_prompt

    number, seq2seq = 0, model.config.is_encoder_decoder
    for prompt, a, b in zip(prompts, ours, theirs, strict=True):
        if a == b:
            continue
        a, b = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (a, b))
        same = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        ids = tokenizer(prompt)["input_ids"] if seq2seq else encode_prompt(tokenizer, prompt)
        start = [model.config.decoder_start_token_id] if seq2seq else ids
        given = torch.tensor([start + a[:same]], device=model.device)
        more = {"input_ids": torch.tensor([ids], device=model.device), "decoder_input_ids": given} if seq2seq else {}
        with torch.inference_mode():
            best = model(**(more or {"input_ids": given})).logits[0, -1].float().topk(2).values
        if (gap := float(best[0] - best[1])) > 1e-3:
            raise ValueError(f"outputs of {prompt[-60:]!r} differ at token {same}, where the best logit leads by {gap}")
        number += 1
    return number


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
    systems = [(Path(args.model).name, *load_translator(args.model))] if args.model else random_models(args.large)
    figures = {}
    for name, model, tokenizer in systems:
        prompts = prompts_for(model.config, args.direction, sources)
        seconds, outputs = {}, {}
        ways = {
            "one_by_one": lambda p, m=model, t=tokenizer: one_by_one(m, t, p, args.max_new_tokens),
            "generate_in_batches": lambda p, m=model, t=tokenizer: in_batches(m, t, p, args.max_new_tokens),
            "batched": lambda p, m=model, t=tokenizer: translate(m, t, p, max_new_tokens=args.max_new_tokens),
        }
        if not model.config.is_encoder_decoder:
            ways["continuous"] = lambda p, m=model, t=tokenizer: continuous(m, t, p, args.max_new_tokens)
        if args.large:
            del ways["one_by_one"]
        for way, run in ways.items():
            run(prompts[:1])
            start = time.perf_counter()
            outputs[way] = run(prompts)
            seconds[way] = time.perf_counter() - start
        tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in outputs["batched"])
        figures |= {f"{name}_{way}_s": s for way, s in seconds.items()}
        figures[f"{name}_tokens_per_row"] = tokens / len(prompts)
        print(f"{name}: {len(prompts)} prompts, {tokens / len(prompts):.0f} new tokens each")
        for way, taken in seconds.items():
            close = close_calls(model, tokenizer, prompts, outputs["batched"], outputs[way])
            figures[f"{name}_{way}_close_calls"] = close
            figures[f"{name}_{way}_over_translate"] = taken / seconds["batched"]
            print(
                f"  {'translate' if way == 'batched' else way.replace('_', ' '):20}{taken:8.1f} s"
                f"{len(prompts) / taken:8.1f} a second{taken / seconds['batched']:7.2f} of translate's time; "
                f"{close} outputs differ, from two best logits within 1e-3 on",
                flush=True,
            )
    figures |= {"rows": len(sources), "threads": torch.get_num_threads(), "device": str(model.device)}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
