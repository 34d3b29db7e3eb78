"""Batched translation against `generate`, one prompt at a time; journals; limits."""

import copy
import itertools
import json

import pytest
import torch
from conftest import make_t5
from transformers import GenerationConfig, LlamaForCausalLM

from lmolt.generation import decoding
from lmolt.generation import translate as translation
from lmolt.generation.translate import load_translator, over_limit, prompts_for, translate
from lmolt.prompts import MOL2CAP, build_prompt, encode_prompt

MOLECULES = ["C" * n + "O" for n in range(1, 12)] + ["c1ccccc1", "N", "CC(=O)Nc1ccc(O)cc1", "C1CCCCC1C(=O)O"]
NEW = 24


@pytest.fixture(scope="module", params=["llama", "t5"])
def translator(request, tiny_policy, tmp_path_factory):
    """A random model whose outputs end at different lengths: a fifth of its vocabulary ends them."""
    folder = tiny_policy if request.param == "llama" else make_t5(tiny_policy, tmp_path_factory.mktemp("t5"))
    model, tokenizer = load_translator(str(folder))
    model.generation_config.eos_token_id = list(range(2, len(tokenizer), 5))
    with torch.no_grad():  # so that outputs depend on prompts
        for parameter in model.parameters():
            parameter.mul_(3 if request.param == "llama" and parameter.ndim == 2 else 1)
    return model, tokenizer, prompts_for(model.config, MOL2CAP, MOLECULES)


def one_by_one(model, tokenizer, prompts, new=NEW, **how) -> list[str]:
    texts = []
    for prompt in prompts:
        seq2seq = model.config.is_encoder_decoder
        ids = torch.tensor([tokenizer(prompt)["input_ids"] if seq2seq else encode_prompt(tokenizer, prompt)])
        ends = model.generation_config.eos_token_id
        config = GenerationConfig(max_new_tokens=new, eos_token_id=ends, pad_token_id=0, **how)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0].tolist()
        out = out[1 if seq2seq else ids.shape[1] :]
        out = out[:-1] if out[-1] in ends else out
        texts.append(tokenizer.decode(out, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip())
    return texts


def test_greedy_outputs_are_those_of_generate_one_by_one(translator):
    model, tokenizer, prompts = translator
    expected = one_by_one(model, tokenizer, prompts)
    assert len(set(expected)) > 5 and len({len(text) for text in expected}) > 3  # the rows differ and end apart
    assert translate(model, tokenizer, prompts, max_new_tokens=NEW) == expected
    assert translate(model, tokenizer, prompts, max_new_tokens=NEW, tokens_per_batch=150) == expected
    assert translate(model, tokenizer, prompts[:1], max_new_tokens=NEW) == expected[:1]


def test_beams_are_those_of_generate_one_by_one(translator):
    model, tokenizer, prompts = translator
    expected = one_by_one(model, tokenizer, prompts[:6], new=8, num_beams=3)
    assert translate(model, tokenizer, prompts[:6], max_new_tokens=8, num_beams=3) == expected


def test_several_beams_are_those_of_generate(translator, tmp_path):
    model, tokenizer, prompts = translator
    how = {"max_new_tokens": 8, "num_beams": 4, "num_return": 3, "journal": tmp_path}
    ends = model.generation_config.eos_token_id
    made = translate(model, tokenizer, [*prompts[:3], prompts[0]], **how)
    for prompt, texts in zip(prompts, made[:3], strict=False):
        ids = tokenizer(prompt)["input_ids"] if model.config.is_encoder_decoder else encode_prompt(tokenizer, prompt)
        config = GenerationConfig(
            max_new_tokens=8,
            num_beams=4,
            num_return_sequences=3,
            eos_token_id=ends,
            pad_token_id=0,
        )
        rows = model.generate(torch.tensor([ids]), generation_config=config).tolist()
        rows = [row[1 if model.config.is_encoder_decoder else len(ids) :] for row in rows]
        expected = [list(itertools.takewhile(lambda token: token not in ends, row)) for row in rows]
        assert texts == [tokenizer.decode(row, skip_special_tokens=True).strip() for row in expected]
    assert made[3] == made[0] and made == translate(model, tokenizer, [*prompts[:3], prompts[0]], **how)
    with pytest.raises(ValueError, match="num_return 3: of 2 beams"):
        translate(model, tokenizer, prompts, num_beams=2, num_return=3)


def test_the_batch_shrinks_as_rows_end(translator, monkeypatch):
    model, tokenizer, prompts = translator
    rows, forward = [], model.forward

    def counting(*args, **kwargs):
        rows.append(len(kwargs.get("decoder_input_ids", kwargs.get("input_ids"))))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.generation_config, "eos_token_id", list(range(2, len(tokenizer), 2)))
    expected = one_by_one(model, tokenizer, prompts)
    monkeypatch.setattr(model, "forward", counting)
    assert translate(model, tokenizer, prompts, max_new_tokens=NEW) == expected
    assert max(rows) == len(prompts) and rows[-1] < max(rows)


def test_samples_depend_on_seed_and_row_but_not_on_the_batch(translator):
    model, tokenizer, prompts = translator
    draw = lambda **how: translate(model, tokenizer, prompts[:4] * 2, max_new_tokens=8, temperature=2.0, **how)
    first = draw()
    assert first == draw(tokens_per_batch=1) != draw(seed=1)
    assert first[:4] != first[4:]  # a repeated prompt is another candidate
    greedy = translate(model, tokenizer, prompts[:4], max_new_tokens=8)
    assert translate(model, tokenizer, prompts[:4], max_new_tokens=8, temperature=1e-7) == greedy
    assert translate(model, tokenizer, prompts[:4], max_new_tokens=8, temperature=2.0, top_p=1e-4) == greedy


def test_a_draw_inverts_the_distribution_of_the_most_probable_tokens():
    logits = torch.tensor([0.1, 0.5, 0.0, 0.4]).log().repeat(5, 1)  # token 2 can't be
    draws = [0.0, 0.49, 0.51, 0.89, 0.91]
    assert decoding._draw(logits, 1.0, draws)[:, 0].tolist() == [1, 1, 3, 3, 0]
    assert decoding._draw(logits, 0.85, draws)[:, 0].tolist() == [1, 1, 1, 3, 3]  # of 0.9, so 5/9 is token 1
    assert decoding._draw(logits, 0.45, draws)[:, 0].tolist() == [1] * 5


def test_what_the_journal_has_is_not_translated_again(translator, tmp_path, monkeypatch, caplog):
    model, tokenizer, prompts = translator
    journal = tmp_path / "journal"
    expected = translate(model, tokenizer, prompts, max_new_tokens=NEW, tokens_per_batch=150, journal=journal)
    file = journal / "process-0.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == len(prompts)
    file.write_bytes(b"".join(lines[:9]) + lines[9][:20])  # a kill in the middle of the tenth row
    decoded = []
    monkeypatch.setattr(translation, "decode", counting(decoded))
    assert translate(model, tokenizer, prompts, max_new_tokens=NEW, tokens_per_batch=150, journal=journal) == expected
    assert sum(decoded) == len(prompts) - 9
    decoded.clear()
    assert translate(model, tokenizer, prompts, max_new_tokens=NEW, journal=journal) == expected and not decoded
    translate(model, tokenizer, prompts, max_new_tokens=NEW - 1, journal=journal)  # other settings: other rows
    assert sum(decoded) == len(prompts)
    decoded.clear()
    file.write_bytes(file.read_bytes().replace(b'"output": [["', b'"output": [["X', 1))
    assert translate(model, tokenizer, prompts, max_new_tokens=NEW, journal=journal) == expected
    assert sum(decoded) == 1 and f"{file} line 1 is damaged: its row is translated again" in caplog.text
    decoded.clear()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)  # other weights: other rows
        translate(model, tokenizer, prompts, max_new_tokens=NEW, journal=journal)
        model.get_input_embeddings().weight.div_(1.5)
    assert sum(decoded) == len(prompts)
    for line in file.read_text().splitlines():
        assert not line or line == lines[9][:20].decode() or set(json.loads(line)) == {"key", "output", "crc"}


real = translation.decode


def counting(decoded: list[int]):
    """`decode` that notes how many rows it was given."""
    return lambda m, ends, rows, *a, **k: decoded.append(len(rows)) or real(m, ends, rows, *a, **k)


def test_equal_prompts_are_translated_once(translator, monkeypatch):
    model, tokenizer, prompts = translator
    decoded = []
    monkeypatch.setattr(translation, "decode", counting(decoded))
    out = translate(model, tokenizer, [prompts[0], prompts[1], prompts[0]], max_new_tokens=4)
    assert decoded == [2] and out[0] == out[2]


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"temperature": 1.0}, {"repetition_penalty": 1.5}])
def test_logits_that_are_not_finite_give_no_text(translator, how):
    """What the self-check doesn't see: a NaN that few prompts meet, or a precision that overflows on them."""
    model, tokenizer, prompts = translator
    model, prompts = copy.deepcopy(model), [*prompts, prompts[0] + "q" * 9 + "CCO"]  # neither first, middle nor last
    odd = set(tokenizer("q")["input_ids"]) - set(tokenizer("".join(prompts[:-1]))["input_ids"])
    prompts += [prompts[0] + "C" * 200]
    assert translate(model, tokenizer, prompts, max_new_tokens=4, **how)
    with torch.no_grad():
        model.get_input_embeddings().weight[list(odd)] = torch.nan
    with pytest.raises(ValueError, match="the model's logits are NaN or infinite on these inputs"):
        translate(model, tokenizer, prompts, max_new_tokens=4, **how)


def test_what_a_generation_config_asks_for_and_is_not_done(translator):
    model, idle = translator[0], GenerationConfig(repetition_penalty=1.0, length_penalty=1.0, min_length=0)
    model, config = copy.copy(model), {"forced_bos_token_id": 0, "min_length": 1, "suppress_tokens": [3]}
    model.generation_config = idle
    assert decoding.not_used(model, decoding.Settings()) == {}
    model.generation_config = GenerationConfig(**config, repetition_penalty=1.2, no_repeat_ngram_size=3)
    found = decoding.not_used(model, decoding.Settings(no_repeat_ngram_size=3))
    assert found == config | {"repetition_penalty": 1.2}


def test_no_prompt_and_training_mode_kept(translator):
    model, tokenizer, prompts = translator
    model.train()
    assert translate(model, tokenizer, []) == []
    assert model.training
    model.eval()
    with pytest.raises(ValueError, match="exclude each other"):
        translate(model, tokenizer, prompts, num_beams=2, temperature=1.0)
    with pytest.raises(ValueError, match="top_p is over 0 and at most 1, got 90"):
        translate(model, tokenizer, prompts, temperature=1.0, top_p=90)


def test_a_prompt_over_the_positions_is_never_cut(tiny_policy):
    model, tokenizer = load_translator(str(tiny_policy))
    prompts = [build_prompt(MOL2CAP, "CCO"), build_prompt(MOL2CAP, "CN" * 600)]
    over = over_limit(model.config, tokenizer, prompts, 8)
    assert list(over) == [1] and over[1] == len(encode_prompt(tokenizer, prompts[1]))
    with pytest.raises(ValueError, match=f"prompt 2 of 2 .* takes {over[1]} tokens; with 8 new ones that is over"):
        translate(model, tokenizer, prompts, max_new_tokens=8)
    outputs = translate(model, tokenizer, prompts, max_new_tokens=8, too_long="empty")
    assert outputs == [translate(model, tokenizer, prompts[:1], max_new_tokens=8)[0], ""]
    with pytest.raises(ValueError, match="max_new_tokens 5000 is over the model's 1024 positions"):
        translate(model, tokenizer, prompts[:1], max_new_tokens=5000)


def test_what_cannot_be_loaded(tmp_path, tiny_policy):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_translator(str(tmp_path))
    with pytest.raises(ValueError, match="'someone/nothing' can't be loaded"):
        load_translator("someone/nothing")
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
        load_translator(str(tiny_policy), str(tmp_path))
    assert LlamaForCausalLM.from_pretrained(tiny_policy).config.model_type == "llama"
