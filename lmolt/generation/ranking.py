"""Which of several candidates is best: by the model's own log-probability, or by both directions together.

A candidate y of an input x is scored by (RANKS)

    logp        log p(y|x)
    mean_logp   log p(y|x) / tokens of y, its end counted
    channel     log p(y|x) + lambda log p(x|y): the noisy channel's (Shannon 1948; for decoding: Yu et al. 2017, "The
                Neural Noisy Channel"); x given y is the other direction, of the same bidirectional model or another
    votes       how often y was drawn, its canonical form counting (self-consistency: Wang et al. 2023); then log p

Log-probabilities are of texts, as the tokenizer writes them, their end included. A causal model scores the candidates
of many inputs in one packed row, the preference tree: instruction and prompt are computed once for all of them.
"""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from lmolt.generation.journal import Journal, read_journal
from lmolt.generation.server import Server
from lmolt.generation.translate import identity, process_state
from lmolt.models.attention import TREE
from lmolt.models.tree import build_tree, padded_logps, tree_logps
from lmolt.prompts import encode_output, encode_prompt, encode_source

TOKENS_PER_ROW = 4096  # of the tree: its mask has this many squared


class Score(NamedTuple):
    logp: float  # natural logarithm, summed over the tokens; NaN where prompt and output exceed the model's positions
    tokens: int  # of the output, its end counted


def score(
    model,
    tokenizer,
    pairs: list[tuple[str, str]],
    *,
    tokens_per_row: int = TOKENS_PER_ROW,
    journal: str | Path | None = None,
    progress: str = "",
) -> list[Score]:
    """log p(output | prompt) of each (prompt, output), on every process; equal pairs are scored once.

    `journal` and `progress` as `translate`'s. `ValueError` where a model that takes the tree's mask scores otherwise
    with it than row by row, and where the tokenizer has no end token. A server tells what it told as it translated: NaN
    where it told nothing.
    """
    if isinstance(model, Server):
        unknown = (float("nan"), 0)
        return [Score(*model.scores.get(pair, unknown)) for pair in pairs]
    state, distinct = process_state(), list(dict.fromkeys(pairs))
    seq2seq = model.config.is_encoder_decoder
    encode = encode_source if seq2seq else encode_prompt
    prompts = {prompt: encode(tokenizer, prompt) for prompt in dict.fromkeys(prompt for prompt, _ in distinct)}
    rows = {pair: (prompts[pair[0]], encode_output(tokenizer, pair[1], pair[0])) for pair in distinct}
    limit = None if seq2seq else getattr(model.config, "max_position_embeddings", None)
    over = {pair for pair, row in rows.items() if limit is not None and sum(map(len, row)) > limit}
    scores = {pair: Score(float("nan"), len(rows[pair][1])) for pair in over}
    of_model = identity(model, tokenizer) if journal else ""
    keys = {hashlib.sha256(repr(("logp", of_model, pair)).encode()).hexdigest()[:32]: pair for pair in rows}
    recorded = {keys[key]: Score(*made) for key, made in read_journal(journal).items() if key in keys}
    state.wait_for_everyone()  # no process writes to the journal before all have read it
    scores |= recorded
    key_of = {pair: key for key, pair in keys.items()}

    # --- batches, whoever runs them
    tree = not seq2seq and model.config._attn_implementation == TREE
    batches = _batches({pair: row for pair, row in rows.items() if pair not in over}, tokens_per_row, tree)
    batches = [[pair for pair in batch if pair not in recorded] for batch in batches]
    mine = [batch for batch in batches if batch][state.process_index :: state.num_processes]

    made, was_training = {}, model.training
    model.eval()
    quiet = not progress or not state.is_main_process
    bar = tqdm(desc=progress, total=sum(map(len, mine)), unit="row", disable=quiet)
    with torch.inference_mode(), bar, Journal(journal, state.process_index) as record:
        if tree and mine:
            short = min(mine, key=lambda batch: len(rows[batch[0]][0]))
            _check_tree(model, [rows[pair] for pair in short[:2]])
        form = _seq2seq_logps if seq2seq else _tree_logps if tree else padded_logps
        for batch in mine:
            logps = form(model, [rows[pair] for pair in batch]).tolist()
            found = {pair: Score(logp, len(rows[pair][1])) for pair, logp in zip(batch, logps, strict=True)}
            record({key_of[pair]: list(value) for pair, value in found.items()})
            made |= found
            bar.update(len(batch))
    model.train(was_training)
    scores |= dict(gather_object(list(made.items())))
    return [scores[pair] for pair in pairs]


def _batches(rows: dict, budget: int, shared: bool) -> list[list]:
    """Pairs in batches of at most `budget` tokens; with `shared`, neighbours' prefixes count once, as on the tree."""
    batches, used, previous = [], 0, []
    for pair in sorted(rows, key=lambda pair: (rows[pair][0] + rows[pair][1], pair)):
        full = rows[pair][0] + rows[pair][1]
        new = len(full) - (len(os.path.commonprefix([previous, full])) if shared else 0)
        if not batches or used + new > budget:
            batches.append([])
            used, new = 0, len(full)
        batches[-1].append(pair)
        used, previous = used + new, full
    return batches


def _tree_logps(model, rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    return tree_logps(model, build_tree(rows).to(model.device))


def _check_tree(model, rows: list[tuple[list[int], list[int]]]) -> None:
    """The tree against padded rows, as training does on its first triple."""
    tokens = torch.tensor([len(output) for _, output in rows])
    difference = ((_tree_logps(model, rows) - padded_logps(model, rows)).abs().cpu() / tokens).max().item()
    allowed = 1e-4 if next(model.parameters()).dtype == torch.float32 else 0.05
    if not difference <= allowed:
        raise ValueError(
            f"log-probabilities of the tree and of padded rows differ by {difference:.2g} a token, over the "
            f"{allowed:g} that rounding explains: this model ({model.config.model_type}) can't rank; use --rank votes"
        )


def _seq2seq_logps(model, rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """(N,) summed in float64. Each distinct source is encoded once."""
    sources = {source: i for i, source in enumerate(dict.fromkeys(tuple(source) for source, _ in rows))}
    tensors = [[torch.tensor(ids) for ids in lists] for lists in (sources, [output for _, output in rows])]
    ids, labels = (pad_sequence(lists, batch_first=True, padding_value=-100).to(model.device) for lists in tensors)
    mask = (ids != -100).long()
    hidden = model.get_encoder()(input_ids=ids.clamp(min=0), attention_mask=mask)
    at = torch.tensor([sources[tuple(source)] for source, _ in rows], device=model.device)
    hidden.last_hidden_state = hidden.last_hidden_state[at]
    logits = model(encoder_outputs=hidden, attention_mask=mask[at], labels=labels, use_cache=False).logits.float()
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (logps * (labels != -100)).sum(-1, dtype=torch.float64)
