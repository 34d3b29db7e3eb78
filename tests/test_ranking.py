"""Candidates' log-probabilities against plain forward passes; their order, merging and what is counted."""

import math

import pytest
import torch
from conftest import make_t5

from lmolt.generation import ranking
from lmolt.generation.ranking import score
from lmolt.generation.translate import load_translator, prompts_for
from lmolt.prompts import CAP2MOL, encode_output, encode_prompt

CAPTIONS = ["The molecule is ethanol.", "An amine of four carbons.", "A long one, with rings and an ester group."]
OUTPUTS = ["CCO", "CCCCN", "c1ccccc1OC(C)=O", "CCO)", ""]


@pytest.fixture(scope="module", params=["llama", "t5"])
def translator(request, tiny_policy, tmp_path_factory):
    folder = tiny_policy if request.param == "llama" else make_t5(tiny_policy, tmp_path_factory.mktemp("t5"))
    model, tokenizer = load_translator(str(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if request.param == "llama" and parameter.ndim == 2 else 1)
    return model, tokenizer, prompts_for(model.config, CAP2MOL, CAPTIONS)


def plainly(model, tokenizer, prompt: str, output: str) -> float:
    """One row, all logits, in a loop over its tokens."""
    after = encode_output(tokenizer, output)
    if model.config.is_encoder_decoder:
        before = torch.tensor([tokenizer(prompt)["input_ids"]])
        decoder = torch.tensor([[model.config.decoder_start_token_id, *after[:-1]]])
        logits = model(input_ids=before, decoder_input_ids=decoder).logits[0]
    else:
        before = encode_prompt(tokenizer, prompt)
        logits = model(torch.tensor([[*before, *after]])).logits[0, len(before) - 1 : -1]
    return sum(logits[i].double().log_softmax(-1)[token].item() for i, token in enumerate(after))


def test_scores_are_those_of_plain_forward_passes(translator):
    model, tokenizer, prompts = translator
    pairs = [(prompt, output) for prompt in prompts for output in OUTPUTS]
    expected = [plainly(model, tokenizer, *pair) for pair in pairs]
    assert max(expected) - min(expected) > 20  # they differ
    for budget in (4096, 1):
        found = score(model, tokenizer, pairs + pairs[:2], tokens_per_row=budget)
        assert [s.logp for s in found] == pytest.approx(expected + expected[:2], abs=2e-3)
        assert [s.tokens for s in found[:5]] == [len(encode_output(tokenizer, output)) for output in OUTPUTS]


def test_scores_in_the_journal_are_not_computed_again(translator, tmp_path, monkeypatch):
    model, tokenizer, prompts = translator
    pairs = [(prompt, output) for prompt in prompts for output in OUTPUTS]
    found = score(model, tokenizer, pairs, journal=tmp_path, tokens_per_row=300)
    for form in ("_tree_logps", "padded_logps", "_seq2seq_logps"):
        monkeypatch.setattr(ranking, form, None)
    assert score(model, tokenizer, pairs, journal=tmp_path, tokens_per_row=300) == found
    with pytest.raises(TypeError, match="not callable"):
        score(model, tokenizer, [*pairs, (prompts[0], "CCCC")], journal=tmp_path)


def test_what_is_over_the_positions_has_no_score(tiny_policy):
    model, tokenizer = load_translator(str(tiny_policy))
    prompts = prompts_for(model.config, CAP2MOL, ["a", "word " * 600])
    scores = score(model, tokenizer, [(prompt, "CCO") for prompt in prompts])
    assert math.isfinite(scores[0].logp) and math.isnan(scores[1].logp)


def test_a_model_that_does_not_take_the_tree_is_refused(tiny_policy, monkeypatch):
    model, tokenizer = load_translator(str(tiny_policy))
    prompts = prompts_for(model.config, CAP2MOL, CAPTIONS)
    monkeypatch.setattr(ranking, "tree_logps", lambda *_: torch.zeros(2))
    with pytest.raises(ValueError, match="the tree and of padded rows differ by .* use --rank votes"):
        score(model, tokenizer, [(prompt, "CCO") for prompt in prompts])
    model.set_attn_implementation("eager")  # a model without the tree's attention
    assert math.isfinite(score(model, tokenizer, [(prompts[0], "CCO")])[0].logp)
