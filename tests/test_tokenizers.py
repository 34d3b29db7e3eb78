"""Tokenizers in the layouts that checkpoints have: real SentencePiece models of Llama's and T5's kind."""

import io
import json
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from conftest import load_script
from tokenizers import Tokenizer, models
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from lmolt.files import write_table
from lmolt.generation.ranking import score
from lmolt.models.loading import load_tokenizer
from lmolt.models.tokenizers import Reader, as_written, check_texts, tokenizer_identity
from lmolt.prompts import MOL2CAP, build_prompt, encode_output, encode_prompt, encode_source
from lmolt.training.batches import encode_triples

LINES = [
    build_prompt(MOL2CAP, "CC(=O)Nc1ccc(O)cc1"),
    "The molecule is an aromatic amine.",
    "C/C=C/C",
    "N[C@@H](C)C(=O)O",
]
LINES += ["CC CCC CCCC cccc c1ccccc1 [nH] O=C", "### Response:\nCC", "The molecule is a lipid."]


def train(kind: str, size: int, **options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in LINES * 20 for line in text.splitlines()),
        model_writer=model, model_type=kind, vocab_size=size, minloglevel=2, character_coverage=1.0, **options,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    vocabulary = train("bpe", 400, byte_fallback=True, add_dummy_prefix=True, split_digits=True, **plain)
    (folder / "tokenizer.model").write_bytes(vocabulary)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **special}))
    LlamaConfig(vocab_size=400).save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    (folder / "spiece.model").write_bytes(train("unigram", 100, pad_id=0, eos_id=1, unk_id=2, bos_id=-1))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 100}))
    T5Config(vocab_size=256).save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return folder


def test_a_backslash_is_unknown_to_t5_counted_and_read_as_the_system_says(t5):
    tokenizer, said = load_tokenizer(str(t5)), []
    texts = [r"C/C=C\C", "C/C=C/C"]
    ids = [encode_source(tokenizer, text) for text in texts]
    counts = check_texts(tokenizer, T5Config(vocab_size=256), "sources", zip(texts, ids, strict=True), said.append)
    assert counts["unk_in_sources"] == 1
    assert said == [r"sources: 1 of 2 have characters that the tokenizer doesn't know (<unk>), such as 'C/C=C\\C'"]
    assert Reader(tokenizer).texts(ids) == [("C/C=CC", 1), ("C/C=C/C", 0)]  # valid SMILES, its stereo gone
    assert Reader(tokenizer, "\\").texts(ids) == [(r"C/C=C\C", 1), ("C/C=C/C", 0)]
    assert Reader(tokenizer, "\\").texts([[9_000, *ids[1]]]) == [("\\ C/C=C/C", 1)]  # an id that has no token


def test_unknown_tokens_of_training_texts_are_counted_and_said(t5, capsys):
    tokenizer, row = load_tokenizer(str(t5)), {"id": "a", "direction": "cap2mol", "source": "The molecule."}
    rows = [row | {"chosen": r"C/C=C\C", "rejected": "CC"}, row | {"chosen": "CC", "rejected": r"C\C"}]
    examples, _ = encode_triples(rows, tokenizer, 4000, "error")
    args = {"model": str(t5), "revision": None, "trust_remote_code": False, "prompt_style": "paper"}
    args = SimpleNamespace(**args, metric_for_best_model=None)
    load_script("train_pref").check_examples(args, tokenizer, examples, [])
    preferred, other = capsys.readouterr().out.splitlines()[-2:]
    assert preferred.startswith("preferred outputs: 1 of 2 have characters that the tokenizer doesn't know (<unk>)")
    text = r"dis-preferred outputs: 1 of 2 have characters that the tokenizer doesn't know (<unk>), such as 'C\\C'"
    assert other == text


def test_a_character_that_is_dropped_or_rewritten_is_counted_wherever_it_stands(t5, llama, capsys):
    tokenizer, said, config = load_tokenizer(str(t5)), [], T5Config(vocab_size=256)
    texts = ["C/C=C/C"] * 1000
    texts[7], texts[8] = "a lipid is \ufb01ne", "C\u200bC"  # a ligature, a blank of no width: in no sample of 200
    rows = [(text, encode_source(tokenizer, text)) for text in texts]
    assert check_texts(tokenizer, config, "outputs", rows, said.append)["changed_outputs"] == 2
    assert said == [
        "outputs: 2 of 1000 come back changed from the tokenizer ('\\u200b', '\ufb01'), such as 'a lipid is \ufb01ne'"
    ]
    said.clear()
    bare = load_tokenizer(str(llama))
    rows = [(text, encode_prompt(bare, text)) for text in texts]
    assert not +check_texts(bare, LlamaConfig(vocab_size=400), "outputs", rows, said.append) and not said

    # of triples: the dis-preferred output too, and two outputs that differ as texts only
    row = {"id": "a", "direction": MOL2CAP, "source": "CC", "chosen": "a lipid", "rejected": "a \ufb01ne lipid"}
    same = row | {"chosen": "The molecule is a lipid \ufb01", "rejected": "The molecule is a lipid fi"}
    examples, dropped = encode_triples(
        [row, same, row | {"rejected": "a lipid"}], tokenizer, 4000, "error", style="bare"
    )
    assert dropped == {
        "chosen equals rejected, as the tokenizer writes them (mol2cap)": 1,
        "chosen equals rejected (mol2cap)": 1,
    }
    args = {"model": str(t5), "revision": None, "trust_remote_code": False, "prompt_style": "bare"}
    row |= {"rejected": "a lipid is"}
    more, _ = encode_triples([row], tokenizer, 4000, "error", style="bare")
    args = SimpleNamespace(**args, metric_for_best_model=None)
    load_script("train_pref").check_examples(args, tokenizer, examples + more, [])
    (line,) = capsys.readouterr().out.splitlines()[-1:]
    assert line.startswith("dis-preferred outputs: 1 of 2 come back changed from the tokenizer ('\ufb01')")


def test_an_unknown_token_that_ends_texts_too_is_no_unknown_one(llama):
    """GPT-2's tokenizer: one token for unknown, begin and end; as it is of bytes, it knows all."""
    inner = AutoTokenizer.from_pretrained(llama).backend_tokenizer
    one = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
    tokenizer, said = PreTrainedTokenizerFast(tokenizer_object=inner, **one), []
    rows = [("CC", encode_prompt(tokenizer, "CC"))]
    assert not +check_texts(tokenizer, LlamaConfig(vocab_size=400), "prompts", rows, said.append) and not said
    assert encode_output(tokenizer, "CC</s>CC").count(tokenizer.eos_token_id) == 1


def test_a_number_between_the_tokens_has_no_text_and_is_counted():
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "C": 1, "<x>": 2, "O": 9}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", additional_special_tokens=["<x>"])
    assert Reader(tokenizer).texts([[1, 5, 9], [1, 0, 9], [1, 2, 9], [2, 1, 9, 2]]) == [
        *(("C O", 1), ("C O", 1)),  # a gap; an unknown token
        *(("C O", 1), ("C O", 0)),  # a special token amid the text, and around it
    ]
    assert Reader(tokenizer, "N").texts([[1, 5, 9]]) == [("C N O", 1)]


@pytest.mark.parametrize("candidates", [1, 3])
def test_what_the_tokenizer_lacks_in_references_and_prompts_is_counted_once(t5, tmp_path, candidates, capsys):
    for file in t5.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 256}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**sizes, **ids, tie_word_embeddings=False, initializer_factor=2.0))
    model.lm_head.weight.data[100:] = model.lm_head.weight.data[:3] = 0  # so that texts come out
    model.save_pretrained(tmp_path)
    molecules = [r"C/C=C\C", "C/C=C/C", r"C/C=C\CC", "CCC"]
    pairs = [{"id": str(i), "molecule": m, "caption": f"The lipid {m}."} for i, m in enumerate(molecules)]
    write_table(pairs, tmp_path / "pairs.csv")
    sampled = ["--num_candidates", str(candidates), "--temperature", "1"] if candidates > 1 else []
    common = ["--pairs", tmp_path / "pairs.csv", "--directions", "cap2mol", "--max_new_tokens", "8", *sampled]

    out = ["--cap2mol_model", tmp_path, "--fraction", "1", "--output", tmp_path / "triples.jsonl"]
    load_script("make_triples").main([*map(str, common + out)])
    counts = json.loads((tmp_path / "triples.json").read_text())["counts"]
    assert counts["cap2mol: unk in references"] == counts["cap2mol: unk in prompts"] == 2
    lines = capsys.readouterr().out
    assert "cap2mol references: 2 of 4 have characters" in lines and "prompts: 2 of 4 have characters" in lines

    rank = ["--rank", "votes"] if candidates > 1 else []
    out = ["--model", tmp_path, "--output", tmp_path / "run", "--no_fcd", "--n_bootstrap", "10", *rank]
    load_script("evaluate").main([*map(str, common + out)])
    counts = json.loads((tmp_path / "run" / "metrics.json").read_text())["directions"]["cap2mol"]["counts"]
    assert counts["unk_in_references"] == counts["unk_in_prompts"] == 2
    assert as_written(load_tokenizer(str(tmp_path)), molecules) == ["C/C=CC", "C/C=C/C", "C/C=CCC", "CCC"]


def test_a_folder_without_tokenizer_files_is_refused(t5, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text((t5 / "tokenizer_config.json").read_text())
    T5Config(vocab_size=1632).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"its tokenizer has 10\d tokens and the model 1,632: tokenizer files"):
        load_tokenizer(str(tmp_path))
    T5Config(vocab_size=128).save_pretrained(tmp_path)  # no larger than what is made up
    made_up = load_tokenizer(str(tmp_path))
    rows = [(text, encode_source(made_up, text)) for text in LINES]
    with pytest.raises(ValueError, match="prompts: no text comes back from the tokenizer as it went in"):
        check_texts(made_up, T5Config(vocab_size=128), "prompts", rows, print)


def test_ids_beyond_the_embeddings_are_refused_by_both_numbers(llama):
    tokenizer = load_tokenizer(str(llama))
    rows = [("CC", encode_prompt(tokenizer, "CC"))]
    with pytest.raises(ValueError, match=r"texts: 'CC' has the token number \d+ and the model 9 embeddings"):
        check_texts(tokenizer, LlamaConfig(vocab_size=9), "texts", rows, print)


def test_what_reads_like_a_special_token_is_text_and_there_is_one_eos(llama, t5):
    tokenizer = load_tokenizer(str(llama))
    for text in ("CC</s>CC", "<s>CC", "CC</s>"):
        ids = encode_output(tokenizer, text)
        assert ids.count(tokenizer.eos_token_id) == 1 and tokenizer.bos_token_id not in ids
        assert tokenizer.decode(ids[:-1]).replace(" ", "") == text
        prompt = encode_prompt(tokenizer, text)
        assert prompt.count(tokenizer.bos_token_id) == 1 and tokenizer.eos_token_id not in prompt
    with pytest.raises(ValueError, match="'CC</s>CC' holds a special token that this tokenizer can't read as text"):
        encode_source(load_tokenizer(str(t5)), "CC</s>CC")  # its pieces have it among them


def test_a_jointly_tuned_style_writes_the_first_token_without_its_blank(llama):
    tokenizer = load_tokenizer(str(llama))
    word = lambda ids: tokenizer.convert_ids_to_tokens(ids[0])
    prompt = build_prompt(MOL2CAP, "CCO", "meditron")
    apart, joined = encode_output(tokenizer, "CC CCC"), encode_output(tokenizer, "CC CCC", prompt)
    assert word(apart).startswith("▁") and not word(joined).startswith("▁")
    assert encode_output(tokenizer, "CC CCC", build_prompt(MOL2CAP, "CCO")) == apart
    whole = encode_prompt(tokenizer, prompt + "CC CCC") + [tokenizer.eos_token_id]
    assert encode_prompt(tokenizer, prompt) + joined == whole != encode_prompt(tokenizer, prompt) + apart

    triple = {"id": "a", "direction": MOL2CAP, "source": "CCO", "chosen": "CC CCC", "rejected": "CCCC"}
    (trained,), _ = encode_triples([triple], tokenizer, 2000, "error", style="meditron")
    assert [*trained.prompt, *trained.chosen] == whole
    assert [*trained.prompt, *trained.rejected] == encode_prompt(tokenizer, prompt + "CCCC") + [2]
    model = LlamaForCausalLM(LlamaConfig(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2)).eval()  # fmt: skip
    (ranked,) = score(model, tokenizer, [(prompt, "CC CCC")])
    with torch.no_grad():
        logps = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    expected = sum(logps[at - 1, whole[at]] for at in range(len(whole) - len(joined), len(whole)))
    assert ranked.tokens == len(joined) and abs(ranked.logp - expected.item()) < 1e-4


def test_an_eos_that_only_the_config_names_ends_outputs(llama, tmp_path, capsys):
    for name in ("tokenizer.model", "config.json"):
        (tmp_path / name).write_bytes((llama / name).read_bytes())
    (tmp_path / "model.safetensors").touch()
    plain = AutoTokenizer.from_pretrained(llama)
    plain.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert "its tokenizer names no EOS; '</s>', which its config.json names, ends outputs" in capsys.readouterr().out
    assert encode_output(tokenizer, "CC")[-1] == 2


def test_another_vocabulary_is_another_identity(llama, t5):
    one, other = load_tokenizer(str(llama)), load_tokenizer(str(t5))
    assert tokenizer_identity(one) == tokenizer_identity(load_tokenizer(str(llama))) != tokenizer_identity(other)
    changed = load_tokenizer(str(llama))
    changed.add_tokens(["[formula]"])
    assert tokenizer_identity(changed) != tokenizer_identity(one)
