"""The decoding loop of one batch of causal or sequence-to-sequence rows: greedy, sampled, or by beam search."""

import copy
import itertools
import random

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer


def end_ids(model, tokenizer) -> list[int]:
    """The tokens that end an output: those of the model's generation settings and the tokenizer's."""
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


def read_prefix(model, prefix: list[int]) -> DynamicCache:
    """Keys and values (1, heads, P, d) of each layer for the tokens that all prompts share."""
    ids = torch.tensor([prefix], device=model.device)
    return model(input_ids=ids, past_key_values=_empty_cache(model), use_cache=True, logits_to_keep=1).past_key_values


def decode(
    model,
    tokenizer,
    rows: list[list[int]],
    prefix_cache: DynamicCache | None,
    prefix_length: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    streams: list[random.Random],
) -> list[list[int]]:
    """Token ids that follow each row, up to its end or `max_new_tokens`; finished rows leave the batch.

    `rows` follow the `prefix_length` tokens of `prefix_cache`. Greedy, or, with `temperature` > 0, row i is sampled by
    the numbers of `streams[i]`.
    """
    seq2seq, device, ends = model.config.is_encoder_decoder, model.device, set(end_ids(model, tokenizer))
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
            ids = _draw(logits / temperature, top_p, [streams[row].random() for row in live])
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


def _draw(logits: torch.Tensor, top_p: float, draws: list[float]) -> torch.Tensor:
    """Token ids (B, 1) by inversion of each row's distribution (B, V) at its draw in [0, 1).

    Of the tokens from the most probable on, those before which less than `top_p` is summed up (Holtzman et al. 2020).
    """
    probabilities, tokens = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    kept = probabilities.cumsum(-1) - probabilities < top_p
    cumulated = (probabilities * kept).cumsum(-1)
    at = torch.tensor(draws, device=logits.device).unsqueeze(1) * cumulated[:, -1:]
    return tokens.gather(1, (cumulated <= at).sum(1, keepdim=True).minimum(kept.sum(1, keepdim=True) - 1))


def beam_search(
    model, tokenizer, rows: list[list[int]], max_new_tokens: int, num_beams: int, num_return: int = 1
) -> list[list[int]]:
    """As `decode`, of the best `num_return` of `num_beams` beams: the first row's, best first, then the next one's."""
    seq2seq = model.config.is_encoder_decoder
    ids, mask = _pad(rows, left=not seq2seq, device=model.device)
    pad, ends = tokenizer.pad_token_id or 0, end_ids(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        num_return_sequences=num_return,
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=pad,
        decoder_start_token_id=model.config.decoder_start_token_id if seq2seq else None,
    )
    generated = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    generated = generated[:, 1 if seq2seq else ids.shape[1] :].tolist()
    return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in generated]
