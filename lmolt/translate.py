"""Translate with a causal or sequence-to-sequence model: batched, sharded over processes, resumable.

Prompts are sorted by length and cut into batches by a token budget. The batches, and so the outputs, are the same
however many processes share them. A causal batch is left-padded behind the instruction that all prompts share, whose
keys and values are computed once per call:

    [instruction][pad ...][source 1 ...]     position ids count the tokens that are not padding
    [instruction][source 2 ............]

Rows that have ended leave the batch. A journal keeps each finished row on disk, so a killed run translates none twice.
"""

import copy
import hashlib
import itertools
import json
import os
import random
from collections import Counter
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from peft import PeftModel
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSeq2SeqLM, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from lmolt.models import check_model_folder, load_base, load_tokenizer
from lmolt.prompts import build_prompt, encode_prompt


def process_state() -> PartialState:
    """This process's place among those that `accelerate launch` (or torchrun) started, on CPUs as well."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, timeout=timedelta(days=1))  # how long one may wait for the others' share


def load_config(name: str, trust_remote_code: bool = False) -> tuple:
    """A model's configuration and tokenizer, without its weights: enough to find what is wrong with a request."""
    check_model_folder(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        return config, load_tokenizer(name, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ValueError(f"model {name!r} can't be loaded: {error}") from error


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
    """
    device = process_state().device
    dtype = getattr(torch, dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    config, tokenizer = load_config(name, trust_remote_code)
    if not config.is_encoder_decoder:
        model = load_base(name, load_in_4bit=load_in_4bit, dtype=dtype, trust_remote_code=trust_remote_code)
    elif load_in_4bit:
        raise ValueError(f"{name!r} is an encoder-decoder ({config.model_type}); 4-bit is for causal models here")
    else:
        model = AutoModelForSeq2SeqLM.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)
    if adapter is not None:
        if Path(adapter).exists() and not (Path(adapter) / "adapter_config.json").exists():
            raise FileNotFoundError(f"{adapter!r} holds no adapter_config.json; give the folder of a PEFT adapter")
        model = PeftModel.from_pretrained(model, adapter)
    return (model if load_in_4bit else model.to(device)).eval(), tokenizer


def prompts_for(config, direction: str, sources: Iterable[str], style: str = "auto") -> list[str]:
    """What a model of this `config` is asked: the paper's prompt ("paper"), the source itself ("bare"), or ("auto") the
    first for causal models and the second for sequence-to-sequence ones, which MolT5 and its kin were trained on."""
    if style == "bare" or (style == "auto" and config.is_encoder_decoder):
        return list(sources)
    return [build_prompt(direction, source) for source in sources]


def over_limit(config, tokenizer, prompts: list[str], max_new_tokens: int) -> dict[int, int]:
    """Tokens of each prompt (by index) that, with `max_new_tokens` where the model is causal, has more of them than the
    model has positions. T5's are relative: it has no limit."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return {}
    new = 0 if config.is_encoder_decoder else max_new_tokens
    if max_new_tokens > limit:
        raise ValueError(f"max_new_tokens {max_new_tokens} is over the model's {limit} positions; lower it")
    lengths = [len(_encode(config, tokenizer, prompt)) for prompt in prompts]
    return {i: length for i, length in enumerate(lengths) if length + new > limit}


def refuse_over_limit(config, prompts: list[str], over: dict[int, int], max_new_tokens: int) -> None:
    """`ValueError` on the first of the prompts that `over_limit` found, with what to do."""
    for row, length in over.items():
        raise ValueError(
            f"prompt {row + 1} of {len(prompts)} (... {prompts[row][-80:]!r}) takes {length} tokens; with "
            f"{max_new_tokens} new ones that is over the model's {config.max_position_embeddings} positions, as are "
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
    seed: int = 0,
    too_long: str = "error",
    journal: str | Path | None = None,
    progress: str = "",
) -> list[str]:
    """The model's output for each prompt, in their order, on every process; special tokens and outer blanks removed.

    Greedy; or beam search with `num_beams`; or, with `temperature` > 0, sampled: repeat a prompt to draw several
    candidates for it, each of its own random stream, the same in any batch. Equal prompts are else translated once.
    `tokens_per_batch` bounds rows x (longest prompt + `max_new_tokens`). A prompt that with `max_new_tokens` exceeds
    the model's positions is an error, or with `too_long="empty"` gives an empty output, counted aloud: none is cut.
    `journal` is a folder; rows in it that were made by this model with these settings are taken from it. It is the
    caller's to delete. `progress` names the work in messages and on the bar, of the first process only.
    """
    if num_beams > 1 and temperature > 0:
        raise ValueError(f"num_beams {num_beams} and temperature {temperature} exclude each other")
    state = process_state()
    say = tqdm.write if state.is_main_process else lambda _: None
    settings = (_identity(model), _end_ids(model, tokenizer), max_new_tokens, num_beams, temperature, seed)

    # --- the rows to translate: key -> token ids
    keys, rows, seen = [], {}, Counter()
    for prompt in prompts:
        seen[prompt] += 1
        nth = seen[prompt] if temperature > 0 else 1
        key = hashlib.sha256(repr((settings, prompt, nth)).encode()).hexdigest()[:32]
        keys.append(key)
        if key not in rows:
            rows[key] = _encode(model.config, tokenizer, prompt)
    over = over_limit(model.config, tokenizer, prompts, max_new_tokens)
    if too_long == "error":
        refuse_over_limit(model.config, prompts, over, max_new_tokens)
    outputs = {keys[row]: "" for row in over}
    if outputs:
        say(f"{progress}: {len(outputs)} prompts are over the model's positions; their outputs are empty")
    rows = {key: ids for key, ids in rows.items() if key not in outputs}

    # --- batches, whoever runs them
    prefix = [] if model.config.is_encoder_decoder or num_beams > 1 else _common_prefix(rows.values())
    batches = _batches({key: len(ids) - len(prefix) for key, ids in rows.items()}, max_new_tokens, tokens_per_batch)
    recorded = {key: text for key, text in _read_journal(journal).items() if key in rows}
    state.wait_for_everyone()  # no process writes to the journal before all have read it
    outputs |= recorded
    if recorded:
        say(f"{progress}: {len(recorded)} of {len(rows)} rows are in {journal}")
    batches = [[key for key in batch if key not in recorded] for batch in batches]
    mine = [batch for batch in batches if batch][state.process_index :: state.num_processes]

    # --- translate this process's share
    made, was_training = {}, model.training
    model.eval()
    shared = f" (1 of {state.num_processes} processes)" if state.num_processes > 1 else ""
    bar = tqdm(
        desc=progress + shared, total=sum(map(len, mine)), unit="row", disable=not progress or not state.is_main_process
    )
    with torch.inference_mode(), bar, _Journal(journal, state.process_index) as record:
        cache = _prefix_cache(model, prefix) if mine and prefix else None
        for batch in mine:
            ids = [rows[key][len(prefix) :] for key in batch]
            if num_beams > 1:
                generated = _beam_search(model, tokenizer, ids, max_new_tokens, num_beams)
            else:
                streams = [random.Random(f"{seed} {key}") for key in batch]
                generated = _decode(model, tokenizer, ids, cache, len(prefix), max_new_tokens, temperature, streams)
            texts = tokenizer.batch_decode(generated, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            finished = {key: text.strip() for key, text in zip(batch, texts, strict=True)}
            record(finished)
            made |= finished
            bar.update(len(batch))
    model.train(was_training)
    for key, text in gather_object(list(made.items())):
        outputs[key] = text
    return [outputs[key] for key in keys]


# --- what is translated


def _encode(config, tokenizer, prompt: str) -> list[int]:
    return tokenizer(prompt)["input_ids"] if config.is_encoder_decoder else encode_prompt(tokenizer, prompt)


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


# --- decoding


def _end_ids(model, tokenizer) -> list[int]:
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    return sorted(ends - {None})


def _pad(rows: list[list[int]], left: bool, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (B, T). Padding is masked, so any id does."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, at], mask[i, at] = torch.tensor(row), 1
    return ids.to(device), mask.to(device)


class _RoomyLayer(DynamicLayer):
    """Keys and values (B, heads, T, d) with room behind them: a step writes its own and does not copy the others.

    `DynamicLayer` concatenates at each step, which for rows behind a long shared instruction is most of the time.
    """

    ROOM = 64  # tokens
    room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states, value_states, *args, **kwargs):
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        # rows that were repeated or selected are new tensors, of another number of rows
        if self.room is None or len(self.room[0]) != len(key_states) or self.room[0].shape[-2] < end:
            self.room = tuple(
                new.new_empty(*new.shape[:-2], end + self.ROOM, new.shape[-1]) for new in (key_states, value_states)
            )
            if start:
                self.room[0][..., :start, :], self.room[1][..., :start, :] = self.keys, self.values
        self.is_initialized, self.dtype, self.device = True, key_states.dtype, key_states.device
        self.room[0][..., start:end, :], self.room[1][..., start:end, :] = key_states, value_states
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.room)
        return self.keys, self.values


def _empty_cache(model) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _prefix_cache(model, prefix: list[int]) -> DynamicCache:
    """Keys and values (1, heads, P, d) of each layer for the tokens that all prompts share."""
    ids = torch.tensor([prefix], device=model.device)
    return model(input_ids=ids, past_key_values=_empty_cache(model), use_cache=True, logits_to_keep=1).past_key_values


def _decode(
    model, tokenizer, rows, prefix_cache, prefix_length, max_new_tokens, temperature, streams
) -> list[list[int]]:
    """Token ids that follow each row, up to its end or `max_new_tokens`; finished rows leave the batch."""
    seq2seq, device, ends = model.config.is_encoder_decoder, model.device, set(_end_ids(model, tokenizer))
    ids, mask = _pad(rows, left=not seq2seq, device=device)  # (B, T)
    cache = copy.deepcopy(prefix_cache)
    if seq2seq:
        encoded = model.get_encoder()(input_ids=ids, attention_mask=mask)
        ids = torch.full((len(rows), 1), model.config.decoder_start_token_id, device=device)
    elif cache is None:
        cache = _empty_cache(model)
    else:
        cache.batch_repeat_interleave(len(rows))
        mask = torch.cat([mask.new_ones(len(rows), prefix_length), mask], dim=1)  # (B, P + T)
    outputs, live, ended = [[] for _ in rows], list(range(len(rows))), set()
    for _ in range(max_new_tokens):
        if seq2seq:
            out = model(
                encoder_outputs=encoded,
                attention_mask=mask,
                decoder_input_ids=ids,
                past_key_values=cache,
                use_cache=True,
            )
        else:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            out = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits, cache = out.logits[:, -1].float(), out.past_key_values  # (B, V)
        if temperature > 0:
            draws = torch.tensor([streams[row].random() for row in live], device=device).unsqueeze(1)
            cumulated = (logits / temperature).softmax(-1).cumsum(-1)
            ids = (cumulated < draws * cumulated[:, -1:]).sum(1, keepdim=True).clamp(max=logits.shape[1] - 1)
        else:
            ids = logits.argmax(-1, keepdim=True)
        for row, token in zip(live, ids[:, 0].tolist(), strict=True):
            if row not in ended:
                if token in ends:
                    ended.add(row)
                else:
                    outputs[row].append(token)
        going = [i for i, row in enumerate(live) if row not in ended]
        if not going:
            break
        if len(going) <= 0.75 * len(live):  # a copy of the cache: worth it for a quarter of the rows, not for one
            live = [live[i] for i in going]
            kept = torch.tensor(going, device=device)
            cache.batch_select_indices(kept)
            ids, mask = ids[kept], mask[kept]
            if seq2seq:
                encoded.last_hidden_state = encoded.last_hidden_state[kept]
        if not seq2seq:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return outputs


def _beam_search(model, tokenizer, rows, max_new_tokens, num_beams) -> list[list[int]]:
    seq2seq = model.config.is_encoder_decoder
    ids, mask = _pad(rows, left=not seq2seq, device=model.device)
    pad, ends = tokenizer.pad_token_id or 0, _end_ids(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=pad,
        decoder_start_token_id=model.config.decoder_start_token_id if seq2seq else None,
    )
    generated = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    generated = generated[:, 1 if seq2seq else ids.shape[1] :].tolist()
    return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in generated]


# --- what is kept


def _identity(model) -> str:
    """A hash of the model's settings and of sixteen values of each of its parameters: other weights, other hash."""
    digest = hashlib.sha256(repr(sorted(model.config.to_diff_dict().items(), key=lambda item: item[0])).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // 16)][:16]
        digest.update(f"{name} {tuple(parameter.shape)} {some.float().tolist()}".encode())
    return digest.hexdigest()


def _read_journal(journal: str | Path | None) -> dict[str, str]:
    """Finished rows, key -> output. A line that a kill cut off is passed over: its row is translated again."""
    finished = {}
    for file in sorted(Path(journal).glob("*.jsonl")) if journal else []:
        for line in file.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
                finished[row["key"]] = row["output"]
            except (ValueError, KeyError, TypeError):
                continue
    return finished


class _Journal:
    """Appends finished rows to this process's file of the journal; each batch is on disk before the next starts."""

    def __init__(self, journal: str | Path | None, process: int):
        self.path = None if journal is None else Path(journal) / f"process-{process}.jsonl"

    def __enter__(self):
        if self.path is None:
            return lambda _: None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("ab")
        if self.file.tell():
            self.file.write(b"\n")  # ends a line that a kill cut off
        return self._record

    def _record(self, finished: dict[str, str]) -> None:
        for key, text in finished.items():
            self.file.write(json.dumps({"key": key, "output": text}).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def __exit__(self, *_):
        if self.path is not None:
            self.file.close()
