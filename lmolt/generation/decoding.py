"""The decoding of one batch of causal or sequence-to-sequence rows: greedy, sampled, or by beam search.

Four ways, the fastest first; which of them a model's cache allows, and gets right, is found in routes.py:

    prefix     rows behind the keys and values of the tokens that they all share, our loop
    batch      whole rows, padded on the left, our loop
    generate   transformers' `generate`, rows of one length at a time: no padding, and whatever state the model carries
    recompute  the same without a cache: each token from a pass over all before it
"""

import copy
import inspect
import itertools
import random
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

from lmolt.models.self_check import decoder_start


@dataclass(frozen=True)
class Settings:
    """How tokens are chosen. The defaults are neutral: a model's generation_config.json changes nothing but the end."""

    max_new_tokens: int = 250
    num_beams: int = 1
    num_return: int = 1
    temperature: float = 0.0  # 0: the most probable token
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    @property
    def plain(self) -> bool:
        return self.repetition_penalty == 1.0 and self.no_repeat_ngram_size == 0


def end_ids(model, tokenizer) -> list[int]:
    """The tokens that end an output: those of the model's generation settings and the tokenizer's."""
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    return sorted(ends - {None})


ASKED = (  # what a generation_config.json may ask for that changes which token is taken
    *("repetition_penalty", "no_repeat_ngram_size", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size"),
    *("length_penalty", "exponential_decay_length_penalty", "diversity_penalty", "min_length", "min_new_tokens"),
    *("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id"),
    *("forced_eos_token_id", "guidance_scale", "penalty_alpha", "watermarking_config"),
)
FACTORS = ("repetition_penalty", "encoder_repetition_penalty", "length_penalty", "guidance_scale")  # 1: nothing


def not_used(model, settings: Settings) -> dict:
    """What the model's generation_config.json asks for and `settings` don't do."""
    asked = {key: getattr(model.generation_config, key, None) for key in ASKED}
    idle = lambda key: (None, [], {}, 1.0 if key in FACTORS else None if key.endswith("token_id") else 0)
    return {k: v for k, v in asked.items() if v not in (*idle(k), getattr(settings, k, None))}


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


def empty_cache(model) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def takes(model, *names: str) -> bool:
    """Whether the model's `forward` (that of the model inside an adapter) has all of these parameters by name."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(names) <= inspect.signature(type(inner).forward).parameters.keys()


def read_prefix(model, prefix: list[int]) -> DynamicCache:
    """Keys and values (1, heads, P, d) of each layer for the tokens that all prompts share."""
    ids = torch.tensor([prefix], device=model.device)
    return model(input_ids=ids, past_key_values=empty_cache(model), use_cache=True, logits_to_keep=1).past_key_values


def decode(
    model,
    ends: list[int],
    rows: list[list[int]],
    settings: Settings,
    streams: list[random.Random],
    *,
    prefix_cache: DynamicCache | None = None,
    prefix_length: int = 0,
    logps: list[float] | None = None,
) -> list[list[int]]:
    """Token ids that follow each row, up to the first of `ends` or `max_new_tokens`; finished rows leave the batch.

    `rows` follow the `prefix_length` tokens of `prefix_cache`. Greedy, or, with `temperature` > 0, row i is sampled by
    the numbers of `streams[i]`. To `logps[i]`, if it is given, the log-probabilities of row i's tokens are added.
    """
    seq2seq, device, ends = model.config.is_encoder_decoder, model.device, set(ends)
    ids, mask = _pad(rows, left=not seq2seq, device=device)  # (B, T)
    cache = copy.deepcopy(prefix_cache)
    if seq2seq:
        encoded = model.get_encoder()(input_ids=ids, attention_mask=mask)
        ids = torch.full((len(rows), 1), decoder_start(model), device=device)
    elif cache is None:
        cache = empty_cache(model)
    else:
        cache.reorder_cache(torch.zeros(len(rows), dtype=torch.long, device=device))
        mask = torch.cat([mask.new_ones(len(rows), prefix_length), mask], dim=1)  # (B, P + T)
    few, placed = takes(model, "logits_to_keep"), takes(model, "position_ids")
    outputs, live, ended = [[] for _ in rows], list(range(len(rows))), set()
    for _ in range(settings.max_new_tokens):
        if seq2seq:
            out = model(
                encoder_outputs=encoded,
                attention_mask=mask,
                decoder_input_ids=ids,
                past_key_values=cache,
                use_cache=True,
            )
        else:
            inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
            if placed:
                inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            out = model(**inputs, **({"logits_to_keep": 1} if few else {}))
        logits, cache = _finite(out.logits[:, -1].float()), out.past_key_values  # (B, V)
        if settings.temperature > 0:
            ids = _draw(logits / settings.temperature, settings.top_p, [streams[row].random() for row in live])
        else:
            ids = logits.argmax(-1, keepdim=True)
        chosen = logits.log_softmax(-1).gather(1, ids)[:, 0].tolist() if logps is not None else ()
        for row, token in zip(live, ids[:, 0].tolist(), strict=True):
            if row not in ended:
                if token in ends:
                    ended.add(row)
                else:
                    outputs[row].append(token)
        for row, logp in zip(live, chosen, strict=False):
            logps[row] += logp if row not in ended else 0.0
        going = [i for i, row in enumerate(live) if row not in ended]
        if not going:
            break
        if len(going) <= 0.75 * len(live):  # a copy of the cache: worth it for a quarter of the rows, not for one
            live = [live[i] for i in going]
            kept = torch.tensor(going, device=device)
            cache.reorder_cache(kept)
            ids, mask = ids[kept], mask[kept]
            if seq2seq:
                encoded.last_hidden_state = encoded.last_hidden_state[kept]
        if not seq2seq:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return outputs


def _finite(logits: torch.Tensor) -> torch.Tensor:
    """The logits (B, V); `ValueError` where a row's are NaN or infinite: its most probable token would be any."""
    if not logits.amax(-1).isfinite().all():
        raise ValueError(
            "the model's logits are NaN or infinite on these inputs: its weights hold such numbers, or its precision "
            "overflows (T5 in float16); try --dtype bfloat16 or float32, or take an undamaged copy"
        )
    return logits


def _draw(logits: torch.Tensor, top_p: float, draws: list[float]) -> torch.Tensor:
    """Token ids (B, 1) by inversion of each row's distribution (B, V) at its draw in [0, 1).

    Of the tokens from the most probable on, those before which less than `top_p` is summed up (Holtzman et al. 2020).
    """
    probabilities, tokens = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    kept = probabilities.cumsum(-1) - probabilities < top_p
    cumulated = (probabilities * kept).cumsum(-1)
    at = torch.tensor(draws, device=logits.device).unsqueeze(1) * cumulated[:, -1:]
    return tokens.gather(1, (cumulated <= at).sum(1, keepdim=True).minimum(kept.sum(1, keepdim=True) - 1))


# --- by transformers' `generate`


def generate(
    model,
    ends: list[int],
    rows: list[list[int]],
    settings: Settings,
    streams: list[random.Random] | None = None,
    *,
    logps: list[float] | None = None,
    use_cache: bool = True,
) -> list[list[int]]:
    """As `decode`, rows of one length at a time, so that nothing is padded; also for penalties and beams.

    With `num_return` > 1 row i's outputs are those from i * `num_return` on, best first.
    """
    found = [[] for _ in range(len(rows) * settings.num_return)]
    for length in sorted({len(row) for row in rows}, reverse=True):
        at = [i for i, row in enumerate(rows) if len(row) == length]
        chooser = _Chooser(settings, [streams[i] for i in at] if streams else None, logps is not None)
        outputs = _generate(model, ends, [rows[i] for i in at], settings, chooser, use_cache)
        for j, i in enumerate(at):
            found[i * settings.num_return : (i + 1) * settings.num_return] = outputs[
                j * settings.num_return : (j + 1) * settings.num_return
            ]
            if logps is not None:
                logps[i] += sum(float(step[j]) for step in chooser.steps[: len(outputs[j])])
    return found


def beam_search(model, ends: list[int], rows: list[list[int]], settings: Settings) -> list[list[int]]:
    """As `generate`, rows of any length at once, padded."""
    return _generate(model, ends, rows, settings, None)


def _generate(model, ends, rows, settings: Settings, chooser: "_Chooser | None", use_cache=True) -> list[list[int]]:
    seq2seq = model.config.is_encoder_decoder
    ids, mask = _pad(rows, left=not seq2seq, device=model.device)
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.num_beams,
        num_return_sequences=settings.num_return,
        repetition_penalty=settings.repetition_penalty,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
        do_sample=False,
        use_cache=use_cache,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        decoder_start_token_id=decoder_start(model) if seq2seq else None,
    )
    chooses = chooser is not None and settings.num_beams == 1
    processors = LogitsProcessorList([chooser if chooses else lambda _, scores: _finite(scores)])
    with _neutral(model), torch.no_grad():
        generated = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=processors
        )
    generated = generated[:, 1 if seq2seq else ids.shape[1] :].tolist()
    return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in generated]


@contextmanager
def _neutral(model):
    """`generate` fills what its settings leave open from the model's own; here those are transformers' defaults."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, inner.generation_config = inner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own


class _Chooser(LogitsProcessor):
    """Leaves one token a row possible: that of `_draw` where it is sampled; and keeps the log-probabilities."""

    def __init__(self, settings: Settings, streams: list[random.Random] | None, record: bool):
        self.settings, self.streams, self.record, self.steps = settings, streams, record, []

    def __call__(self, input_ids, scores):
        scores = _finite(scores.float())
        ids = scores.argmax(-1, keepdim=True)
        if self.settings.temperature > 0:
            draws = [stream.random() for stream in self.streams]
            ids = _draw(scores / self.settings.temperature, self.settings.top_p, draws)
        if self.record:
            self.steps.append(scores.log_softmax(-1).gather(1, ids)[:, 0].tolist())
        return torch.full_like(scores, -torch.inf).scatter(1, ids, 0.0)
