"""Translate with a causal or sequence-to-sequence model: batched, sharded over processes, resumable.

Prompts are sorted by length and cut into batches by a token budget. The batches, and so the outputs, are the same
however many processes share them. A causal batch is left-padded behind the instruction that all prompts share, whose
keys and values are computed once per call:

    [instruction][pad ...][source 1 ...]     position ids count the tokens that are not padding
    [instruction][source 2 ............]

Rows that have ended leave the batch. A journal keeps each finished row on disk, so a killed run translates none twice.
"""

import hashlib
import os
import random
import sys
from collections import Counter
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import torch
import xxhash
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from tqdm import tqdm

from lmolt.distributed.heartbeat import HEARTBEAT
from lmolt.distributed.strategy import all_have
from lmolt.generation import routes
from lmolt.generation.decoding import Settings, beam_search, decode, end_ids, generate, not_used, read_prefix
from lmolt.generation.journal import Journal, read_journal
from lmolt.generation.server import Server, is_server
from lmolt.models.adapters import load_adapter
from lmolt.models.loading import check_model_folder, load_base, load_seq2seq, load_tokenizer, read_config
from lmolt.models.tokenizers import Reader, check_texts, tokenizer_identity
from lmolt.prompts import build_prompt, encode_prompt, encode_source


def process_state() -> PartialState:
    """This process's place among those that `accelerate launch` (or torchrun) started, on CPUs as well."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=1))  # how long one may wait for the others' share
    HEARTBEAT.start()  # one that is stopped or dead isn't waited for
    return state


def load_config(name: str, trust_remote_code: bool = False) -> tuple:
    """A model's configuration and tokenizer, without its weights: enough to find what is wrong with a request.

    A server (a URL) is asked for an answer, and has no tokenizer to give.
    """
    if is_server(name):
        server = Server(name)
        server.identity  # noqa: B018 - asks it
        return server.config, None
    check_model_folder(name)
    try:
        config = read_config(name, None, trust_remote_code)
        return config, load_tokenizer(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        # transformers takes a SentencePiece file that it can't read for one of tiktoken
        remedy = "; its tokenizer is a SentencePiece model: pip install sentencepiece" * ("tiktoken" in str(error))
        raise ValueError(f"model {name!r} can't be loaded: {error}{remedy}") from error


def load_translator(
    name: str,
    adapter: str | None = None,
    *,
    dtype: str | None = None,
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
) -> tuple:
    """A model and its tokenizer, ready to `translate` on this process's device.

    `name` is a folder or Hub id of a causal or sequence-to-sequence model, `dtype` a torch name (default: bfloat16 on a
    GPU, float32 on a CPU). `ValueError`/`FileNotFoundError` where it has no weights or is not to be found.
    A server's URL gives a `Server` (lmolt/generation/server.py), and None for its tokenizer.
    """
    if is_server(name):
        if adapter is not None or load_in_4bit:
            raise ValueError(f"{name} is a server: it has its own adapter and its own precision")
        return Server(name), None
    device = process_state().device
    dtype = getattr(torch, dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    config, tokenizer = load_config(name, trust_remote_code)
    if not config.is_encoder_decoder:
        options = {"trust_remote_code": trust_remote_code, "use_cpu": device.type == "cpu"}
        model = load_base(name, load_in_4bit=load_in_4bit, dtype=dtype, **options)
    elif load_in_4bit:
        raise ValueError(f"{name!r} is an encoder-decoder ({config.model_type}); 4-bit is for causal models here")
    else:
        model = load_seq2seq(name, dtype=dtype, trust_remote_code=trust_remote_code)
    if adapter is not None:
        if Path(adapter).exists() and not (Path(adapter) / "adapter_config.json").exists():
            raise FileNotFoundError(f"{adapter!r} holds no adapter_config.json; give the folder of a PEFT adapter")
        model = load_adapter(model, adapter)
    return (model if load_in_4bit else model.to(device)).eval(), tokenizer


def prompts_for(config, direction: str, sources: Iterable[str], style: str = "auto") -> list[str]:
    """What a model of this `config` is asked: the paper's prompt ("paper"), the source itself ("bare"), or ("auto") the
    first for causal models and the second for sequence-to-sequence ones, which MolT5 and its kin were trained on."""
    if style == "bare" or (style == "auto" and config.is_encoder_decoder):
        return list(sources)
    return [build_prompt(direction, source) for source in sources]


CHARACTERS = 20_000  # a longer source is no molecule or caption, and one row of it may fill a machine's memory


def over_limit(config, tokenizer, prompts: list[str], max_new_tokens: int) -> dict[int, int]:
    """Tokens of each prompt (by index) that, with `max_new_tokens` where the model is causal, has more of them than the
    model has positions. T5's are relative: it has no limit. `ValueError` for a text of over 20,000 characters."""
    for row, prompt in enumerate(prompts, 1):
        if len(prompt) > CHARACTERS:
            raise ValueError(
                f"prompt {row} of {len(prompts)} ({prompt[:80]!r} ...) has {len(prompt):,} characters, over "
                f"{CHARACTERS:,}: no molecule or caption is so long; leave such rows out"
            )
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is None:
        return {}
    new = 0 if config.is_encoder_decoder else max_new_tokens
    if max_new_tokens > limit:
        raise ValueError(f"max_new_tokens {max_new_tokens} is over the model's {limit} positions; lower it")
    lengths = [len(_encode(config, tokenizer, prompt)) for prompt in prompts]
    return {i: length for i, length in enumerate(lengths) if length + new > limit}


def refuse_over_limit(config, prompts: list[str], over: dict[int, int], max_new_tokens: int) -> None:
    """`ValueError` on the first of the prompts that `over_limit` found, with what to do."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    for row, length in over.items():
        raise ValueError(
            f"prompt {row + 1} of {len(prompts)} (... {prompts[row][-80:]!r}) takes {length} tokens; with "
            f"{max_new_tokens} new ones that is over the model's {limit} positions, as are "
            f"{len(over) - 1} others; lower --max_new_tokens or leave such rows out"
        )


def translate(
    model,
    tokenizer,
    prompts: list[str],
    *,
    max_new_tokens: int = 250,
    tokens_per_batch: int = 16384,
    num_beams: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    seed: int = 0,
    too_long: str = "error",
    num_return: int = 1,
    unk: str = "",
    counts: Counter | None = None,
    journal: str | Path | None = None,
    progress: str = "",
) -> list:
    """The model's output for each prompt, in their order, on every process; special tokens and outer blanks removed.

    Greedy; or beam search with `num_beams`; or, with `temperature` > 0, sampled from the most probable tokens that make
    up `top_p`: repeat a prompt to draw several candidates for it, each from its own random stream, the same in any
    batch and after any interruption. Equal prompts are else translated once. What a model's generation_config.json
    asks for is not done unless it is asked for here (`repetition_penalty`, `no_repeat_ngram_size`), and is said.
    With `num_return` > 1 a prompt's output is a list: of its best beams, best first (empty where it is too long).
    `tokens_per_batch` bounds rows x (longest prompt + `max_new_tokens`). A prompt that with `max_new_tokens` exceeds
    the model's positions is an error, or with `too_long="empty"` gives an empty output, counted aloud: none is cut.
    An unknown token in an output is written as `unk`. `counts` is told of prompts (each once,
    where they are sampled) and outputs that have one, and of outputs that `max_new_tokens` ended (`truncated`).
    `journal` is a folder; rows in it that were made by this model with these settings are taken from it. It is the
    caller's to delete. `progress` names the work in messages and on the bar, of the first process only.
    The way of decoding is proved first, on some of these prompts (lmolt/generation/routes.py).
    """
    if num_beams > 1 and temperature > 0:
        raise ValueError(f"num_beams {num_beams} and temperature {temperature} exclude each other")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens}: at least 1")
    if not 1 <= num_return <= num_beams:
        raise ValueError(f"num_return {num_return}: of {num_beams} beams, at most so many can be returned")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is over 0 and at most 1, got {top_p}")
    if repetition_penalty <= 0 or no_repeat_ngram_size < 0:
        raise ValueError(
            f"repetition_penalty {repetition_penalty:g} is more than 0 (1 changes nothing) and no_repeat_ngram_size "
            f"{no_repeat_ngram_size} is 0 (none) or more"
        )
    if isinstance(model, Server):
        if num_beams > 1 or repetition_penalty != 1 or no_repeat_ngram_size:
            raise ValueError(f"{model.url} is a server: beams and penalties are its own (docs/serving.md)")
        sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
        return model.translate(
            prompts, max_new_tokens=max_new_tokens, counts=counts, journal=journal, progress=progress, **sampling
        )
    state = process_state()
    place = sys.stdout if progress else sys.stderr  # where none is shown, translate.py prints its outputs to the former
    say = (lambda line: tqdm.write(line, file=place)) if state.is_main_process else lambda _: None
    settings = Settings(
        max_new_tokens, num_beams, num_return, temperature, top_p, repetition_penalty, no_repeat_ngram_size
    )
    ends = end_ids(model, tokenizer)
    made_by = (identity(model, tokenizer) if journal else "", ends, settings, seed, unk, "text, unknown, cut")
    if left_out := not_used(model, settings):
        say(f"{progress}: not done, though its generation_config.json asks for it: {left_out}")

    # --- the rows to translate: key -> token ids
    keys, rows, streams, seen = [], {}, {}, Counter()
    for prompt in prompts:
        seen[prompt] += 1
        nth = seen[prompt] if temperature > 0 else 1
        key = hashlib.sha256(repr((made_by, prompt, nth)).encode()).hexdigest()[:32]
        keys.append(key)
        if key not in rows:
            rows[key] = _encode(model.config, tokenizer, prompt)
            streams[key] = f"{seed} {nth} {prompt}"
    # Of the weights a key tells only where there is a journal: to hash them costs a copy from the GPU.
    precision = str(model.dtype), str(getattr(model.config, "quantization_config", None))
    all_have(
        (keys, precision), "has other prompts, another model or precision than the first; give all machines the same"
    )
    over = over_limit(model.config, tokenizer, prompts, max_new_tokens)
    if too_long == "error":
        refuse_over_limit(model.config, prompts, over, max_new_tokens)
    encoded = [(prompt, rows[key]) for prompt, key in zip(prompts, keys, strict=True)]
    if temperature > 0:  # a prompt stands there once a candidate
        encoded = list(dict(encoded).items())
    seen_in = check_texts(tokenizer, model.config, "prompts", encoded, lambda line: say(f"{progress} {line}".strip()))
    outputs = {keys[row]: [("", 0, False)] * (num_return == 1) for row in over}
    if outputs:
        say(f"{progress}: {len(outputs)} prompts are over the model's positions; their outputs are empty")
    rows = {key: ids for key, ids in rows.items() if key not in outputs}

    # --- batches, whoever runs them
    prefix = [] if model.config.is_encoder_decoder else _common_prefix(rows.values())
    was_training = model.training
    model.eval()
    route = "batch"
    if rows:
        route = routes.choose(model, list(rows.values()), len(prefix), settings, say, state.num_processes > 1)
    prefix = prefix if route == "prefix" and num_beams == 1 else []
    batches = _batches({key: len(ids) - len(prefix) for key, ids in rows.items()}, max_new_tokens, tokens_per_batch)
    recorded = {key: output for key, output in read_journal(journal).items() if key in rows}
    state.wait_for_everyone()  # no process writes to the journal before all have read it
    outputs |= recorded
    if recorded:
        say(f"{progress}: {len(recorded)} of {len(rows)} rows are in {journal}")
    batches = [[key for key in batch if key not in recorded] for batch in batches]
    mine = [batch for batch in batches if batch][state.process_index :: state.num_processes]

    # --- translate this process's share
    made, reader = {}, Reader(tokenizer, unk)
    shared = f" (1 of {state.num_processes} processes)" if state.num_processes > 1 else ""
    bar = tqdm(
        desc=progress + shared, total=sum(map(len, mine)), unit="row", disable=not progress or not state.is_main_process
    )
    with torch.inference_mode(), bar, Journal(journal, state.process_index) as record:
        cache = read_prefix(model, prefix) if mine and prefix else None
        for batch in mine:
            ids = [rows[key][len(prefix) :] for key in batch]
            draws = [random.Random(streams[key]) for key in batch]
            if route in ("generate", "recompute"):
                generated = generate(model, ends, ids, settings, draws, use_cache=route == "generate")
            elif num_beams > 1:
                generated = beam_search(model, ends, ids, settings)
            else:
                options = {"prefix_cache": cache, "prefix_length": len(prefix)}
                generated = decode(model, ends, ids, settings, draws, **options)
            # An output without an end in it is as long as it may be: cut, and counted.
            cut = [len(ids) >= max_new_tokens for ids in generated]
            texts = [(*text, full) for text, full in zip(reader.texts(generated), cut, strict=True)]
            finished = {key: texts[i * num_return : (i + 1) * num_return] for i, key in enumerate(batch)}
            record(finished)
            made |= finished
            bar.update(len(batch))
    model.train(was_training)
    for key, output in gather_object(list(made.items())):
        outputs[key] = output
    found = [[text for text, _, _ in outputs[key]] for key in keys]
    with_unk = sum(any(unknown for _, unknown, _ in outputs[key]) for key in keys)
    truncated = sum(any(full for _, _, full in outputs[key]) for key in keys)
    if with_unk:
        say(f"{progress}: {with_unk} of {len(keys)} outputs have tokens without a text, read as {unk!r}")
    if counts is not None:
        counts["unk_in_outputs"] += with_unk
        counts["unk_in_prompts"] += seen_in["unk_in_prompts"]
        counts["truncated"] += truncated
    return [texts[0] for texts in found] if num_return == 1 else found


# --- what is translated


def _encode(config, tokenizer, prompt: str) -> list[int]:
    return encode_source(tokenizer, prompt) if config.is_encoder_decoder else encode_prompt(tokenizer, prompt)


def _common_prefix(rows: Iterable[list[int]]) -> list[int]:
    """The token ids all rows begin with, short of the last of any row, which is needed to go on from."""
    rows = list(rows)
    if not rows:
        return []
    first, last = min(rows), max(rows)  # of all rows in order, these two share least
    shared = os.path.commonprefix([first, last])
    return shared[: min(map(len, rows)) - 1]


def _batches(lengths: dict[str, int], max_new_tokens: int, tokens_per_batch: int) -> list[list[str]]:
    """Keys in batches, longest first (what does not fit fails at once), rows x (longest + new) within the budget."""
    batches: list[list[str]] = []
    for key in sorted(lengths, key=lambda key: (-lengths[key], key)):
        if not batches or (len(batches[-1]) + 1) * (lengths[batches[-1][0]] + max_new_tokens) > tokens_per_batch:
            batches.append([])
        batches[-1].append(key)
    return batches


# --- what is kept


def identity(model, tokenizer=None) -> str:
    """A hash of the model's settings, of all bytes of its weights, and of the tokenizer: other outputs, other hash."""
    if isinstance(model, Server):
        return model.identity
    digest = xxhash.xxh3_128(repr(sorted(model.config.to_diff_dict().items(), key=lambda item: item[0])).encode())
    for name, tensor in model.state_dict().items():
        if torch.is_tensor(tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    if tokenizer is not None:
        digest.update(tokenizer_identity(tokenizer).encode())
    return digest.hexdigest()
