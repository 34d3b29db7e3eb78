"""Training: one gradient however a step is split, every row once an epoch, resume to the bit, collapse seen."""

import dataclasses
import itertools
import logging
import types

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BloomConfig, Gemma2Config, TrainerCallback

from lmolt.models import loading
from lmolt.models.tiles import Tiles
from lmolt.prompts import build_prompt, encode_output, encode_prompt
from lmolt.training import attention_choice, batches, reference
from lmolt.training.batches import StepBatchSampler, balance
from lmolt.training.trainer import PreferenceArguments, PreferenceTrainer

LOSSES = ("sft", "dpo", "cpo", "kto")


def make_trainer(folder, triples, output_dir, **overrides) -> PreferenceTrainer:
    tokenizer = loading.load_tokenizer(str(folder))
    examples, _ = batches.encode_triples(triples, tokenizer, 512, "error")
    settings = {
        "loss": "cpo",
        "model": str(folder),
        "output_dir": str(output_dir),
        "load_in_4bit": False,
        "bf16": False,
        "use_cpu": True,
        "lora_dropout": 0.0,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "num_train_epochs": 1,
        "gradient_accumulation_steps": 1,
        "disable_tqdm": True,
    }
    args = PreferenceArguments(**(settings | overrides))
    if args.loss == "kto":
        examples = batches.with_mismatches(examples, args.seed)
    torch.manual_seed(0)
    options = {"load_in_4bit": args.load_in_4bit, "use_cpu": args.device.type == "cpu"}
    base = loading.load_base(str(folder), dtype=torch.float32, **options)
    policy = loading.add_adapter(base, None, r=4, alpha=16, dropout=args.lora_dropout, target_modules="all-linear")
    held_out = examples[:4] if args.eval_strategy != "no" else []
    trainer = PreferenceTrainer(policy, args, examples, held_out, processing_class=tokenizer)
    if args.loss in ("dpo", "kto", "kto_pair"):
        trainer.set_references({"test": "base"})
        # away from the reference, so that rewards differ and KTO's z isn't 0
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
    return trainer


def step_gradient(trainer) -> torch.Tensor:
    """The gradient of one optimizer step, as Trainer's loop accumulates it."""
    micro, _ = trainer.get_batch_samples(
        iter(trainer.get_train_dataloader()), trainer.args.gradient_accumulation_steps, "cpu"
    )
    normalisers = trainer._normalisers(micro)
    trainer._model_is_proved = True  # the adapter was moved away from the reference on purpose
    trainer.model.train()
    for batch in micro:
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=normalisers).backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_does_not_depend_on_how_a_step_is_split(loss, tiny_policy, few_triples, tmp_path):
    gradients = []
    for size, accumulation in ((8, 1), (4, 2), (2, 4), (1, 8)):
        trainer = make_trainer(
            tiny_policy,
            few_triples,
            tmp_path,
            loss=loss,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        gradients.append(step_gradient(trainer))
    assert gradients[0].norm() > 0
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


@pytest.mark.parametrize("loss", LOSSES)
def test_token_budget_and_padded_rows_give_the_same_gradient(loss, tiny_policy, few_triples, tmp_path):
    plain = step_gradient(
        make_trainer(tiny_policy, few_triples, tmp_path, loss=loss, per_device_train_batch_size=8, packing="padded")
    )
    budget = make_trainer(
        tiny_policy,
        few_triples,
        tmp_path,
        loss=loss,
        per_device_train_batch_size=8,
        tokens_per_batch=300,
        score_chunk=7,
    )
    assert budget.args.gradient_accumulation_steps > 1
    assert (step_gradient(budget) - plain).norm() <= 1e-5 * plain.norm()


def test_kto_z_is_the_mean_log_ratio_of_mismatched_pairs(tiny_policy, few_triples, tmp_path):
    """Eq. 11, where it is more than 0: against log-softmax of the model's own logits, a pair at a time."""
    trainer = make_trainer(tiny_policy, few_triples, tmp_path, loss="kto", per_device_train_batch_size=8)
    trainer.model.eval()
    micro = list(trainer.get_train_dataloader())[:2]
    ratios = []
    rows = [(batch, row) for batch in micro for row in range(len(batch.examples))]
    for i, (batch, row) in enumerate(rows):
        example = batch.examples[row]
        batch.references[row, 2] -= 3 + i  # away from the other two, so that z > 0
        ids = torch.tensor([list(example.prompt + example.mismatched)])
        with torch.no_grad():
            logps = trainer.model(ids).logits.double().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        ratios.append(logps[-len(example.mismatched) :].sum().item() - batch.references[row, 2].item())
    z = trainer._normalisers(micro)["z"].item()
    assert z > 1 and z == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)


def test_kto_z_is_taken_without_dropout(tiny_policy, few_triples, tmp_path):
    trainer = make_trainer(tiny_policy, few_triples, tmp_path, loss="kto", lora_dropout=0.5)
    micro = list(trainer.get_train_dataloader())[:2]
    trainer.model.train()
    assert trainer._mismatched_log_ratio(micro) == trainer._mismatched_log_ratio(micro)
    assert trainer.model.training


def test_a_step_is_normalised_by_its_pairs_and_preferred_tokens(tiny_policy, few_triples, tmp_path):
    trainer = make_trainer(tiny_policy, few_triples, tmp_path, per_device_train_batch_size=4)
    micro = list(trainer.get_train_dataloader())[:2]
    encode = lambda text: trainer.processing_class(text, add_special_tokens=False)["input_ids"]
    chosen = {triple["id"]: triple["chosen"] for triple in few_triples}
    tokens = sum(len(encode(chosen[e.id])) + 1 for batch in micro for e in batch.examples)  # and the EOS
    found = trainer._normalisers(micro)
    assert (found["num_pairs"].item(), found["num_tokens"].item(), found["z"].item()) == (8, tokens, 0)


def test_a_micro_batch_that_is_not_live_adds_nothing(tiny_policy, few_triples, tmp_path):
    trainer = make_trainer(tiny_policy, few_triples, tmp_path, per_device_train_batch_size=4)
    batch = next(iter(trainer.get_train_dataloader()))
    normalisers = trainer._normalisers([batch])
    loss, sums = trainer._forward(trainer.model, dataclasses.replace(batch, live=False), **normalisers)
    assert loss.item() == 0 and loss.requires_grad and not sums.any()
    assert trainer._normalisers([batch, dataclasses.replace(batch, live=False)]) == normalisers


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_margins_are_zero_before_the_first_step(loss, tiny_policy, few_triples, tmp_path):
    trainer = make_trainer(tiny_policy, few_triples, tmp_path, loss=loss, per_device_train_batch_size=8)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    batch = list(trainer.get_train_dataloader())[0]
    _, sums = trainer._forward(trainer.model, batch, **trainer._normalisers([batch]))
    assert sums[:, 1:3].abs().max() < 1e-4


def test_every_row_once_an_epoch_on_any_number_of_ranks():
    costs = [3, 9, 1, 7, 7, 2, 5]
    for world, micro in ((1, 1), (2, 1), (2, 2), (3, 1)):
        drawn, lengths = [], set()
        for rank in range(world):
            sampler = StepBatchSampler(costs, 4, micro, rank=rank, world=world, seed=3)
            mine = list(sampler)
            lengths.add(len(mine))
            assert len(mine) == len(sampler)
            drawn += [index for batch in mine for index, live in batch if live]
        assert sorted(drawn) == list(range(7))
        assert len(lengths) == 1  # no rank waits for another


def test_steps_are_the_same_for_every_split_and_differ_between_epochs():
    one, two = StepBatchSampler([1] * 10, 4, 1, seed=5), StepBatchSampler([1] * 10, 4, 2, rank=1, world=2, seed=5)
    assert one.steps() == two.steps()
    first = one.steps()
    one.set_epoch(1)
    assert one.steps() != first


def test_balance_spreads_cost():
    parts = balance([0, 1, 2, 3], [10, 1, 9, 2], 2, None)
    assert sorted(sum([10, 1, 9, 2][i] for i in part) for part in parts) == [11, 11]


def test_mismatched_partners_keep_direction_and_differ(tiny_policy, few_triples):
    tokenizer = loading.load_tokenizer(str(tiny_policy))
    examples, _ = batches.encode_triples(few_triples, tokenizer, 512, "error")
    examples = batches.with_mismatches(examples, seed=1)
    outputs = {
        d: [ids for e in examples if e.direction == d for ids in (e.chosen, e.rejected)] for d in ("mol2cap", "cap2mol")
    }
    for example in examples:
        assert example.mismatched in outputs[example.direction]
        assert example.mismatched not in (example.chosen, example.rejected)


def test_mismatched_partners_are_of_another_source(tiny_policy, few_triples):
    """Triples of one source, with outputs of their own: a partner among those would tell KTO nothing of a mismatch."""
    tokenizer = loading.load_tokenizer(str(tiny_policy))
    one_source = [
        triple | {"source": few_triples[0]["source"]} for triple in few_triples if triple["direction"] == "mol2cap"
    ]
    other = {"id": "x", "direction": "mol2cap", "source": "O", "chosen": "Water.", "rejected": "Not water."}
    examples, _ = batches.encode_triples([*one_source, other], tokenizer, 512, "error")
    examples = batches.with_mismatches(examples, seed=1)
    assert all(e.mismatched in (examples[-1].chosen, examples[-1].rejected) for e in examples[:-1])


def test_one_bos_one_eos_and_no_eos_lost_when_pad_is_eos(tiny_policy, few_triples):
    tokenizer = loading.load_tokenizer(str(tiny_policy))
    tokenizer.pad_token = tokenizer.eos_token
    examples, _ = batches.encode_triples(few_triples, tokenizer, 512, "error")
    for example in examples:
        assert example.prompt.count(tokenizer.bos_token_id) == 1
        assert example.prompt[0] == tokenizer.bos_token_id
        for output in (example.chosen, example.rejected):
            assert output[-1] == tokenizer.eos_token_id
            assert output.count(tokenizer.eos_token_id) == 1
            assert tokenizer.bos_token_id not in output


def test_long_rows_are_an_error_or_counted(tiny_policy, few_triples):
    tokenizer = loading.load_tokenizer(str(tiny_policy))
    longest = {**few_triples[0], "id": "long", "chosen": "CC" * 400}
    long = [*few_triples, longest, {**longest, "id": "shorter", "chosen": "CC" * 300}]
    with pytest.raises(ValueError, match=r"2 of 26 triples .* --max_length 200 .* \(id 'long'\), 496; .*drop"):
        batches.encode_triples(long, tokenizer, 200, "error")
    examples, dropped = batches.encode_triples(long, tokenizer, 200, "drop")
    assert len(examples) == len(few_triples)
    assert dropped == {"over 200 tokens (mol2cap)": 2}


def test_a_mask_that_the_model_ignores_is_seen_and_rows_are_padded(
    tiny_policy, few_triples, tmp_path, monkeypatch, capsys
):
    trainer = make_trainer(tiny_policy, few_triples, tmp_path, loss="cpo", max_steps=1)
    bias = Tiles.bias
    monkeypatch.setattr(Tiles, "bias", lambda *args: [0 * b.clamp(min=-1) for b in bias(*args)])  # each sees all
    trainer.check_model()
    first, second = [line for line in capsys.readouterr().out.splitlines() if line.startswith("self-check")]
    assert "tree-packed scoring differs from plain attention on 6 sequences of up to" in first
    assert first.endswith("; not used") and "padded scoring equals plain attention on 6 sequences" in second
    assert trainer.args.packing == "padded"
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_model_whose_tokens_see_later_ones_is_refused(tiny_policy, few_triples, tmp_path):
    config = BertConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    bert = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # so that tokens see each other
        for parameter in bert.parameters():
            parameter.normal_(std=0.3)
    bert.save_pretrained(tmp_path / "bert")
    loading.load_tokenizer(str(tiny_policy)).save_pretrained(tmp_path / "bert")
    trainer = make_trainer(tmp_path / "bert", few_triples, tmp_path, loss="cpo")
    with pytest.raises(ValueError, match="bert: a token's probability changes by .* so this is no causal"):
        trainer.check_model()


def test_collapse_is_warned_of(caplog, tiny_policy, few_triples, tmp_path):
    statistics = make_trainer(tiny_policy, few_triples, tmp_path).statistics
    with caplog.at_level(logging.WARNING):
        statistics._watch_for_collapse({"mol2cap/logps/chosen": -1.0, "mol2cap/rewards/margins": 0.0})
        statistics._watch_for_collapse({"mol2cap/logps/chosen": -1.2, "mol2cap/rewards/margins": 2.0})
        for _ in range(2):
            statistics._watch_for_collapse({"mol2cap/logps/chosen": -4.0, "mol2cap/rewards/margins": 9.0})
        statistics._watch_for_collapse({"mol2cap/logps/chosen": -1.2, "mol2cap/rewards/margins": 9.0})
        for _ in range(2):
            statistics._watch_for_collapse({"mol2cap/logps/chosen": -4.0, "mol2cap/rewards/margins": 9.0})
        assert not caplog.records
        statistics._watch_for_collapse({"mol2cap/logps/chosen": -4.0, "mol2cap/rewards/margins": 9.0})
    assert "collapsing (lower --learning_rate or raise --beta)" in caplog.text


def test_trains_evaluates_and_saves_an_adapter_that_peft_loads(tiny_policy, few_triples, tmp_path):
    trainer = make_trainer(
        tiny_policy,
        few_triples,
        tmp_path / "run",
        per_device_train_batch_size=8,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        num_train_epochs=2,
        learning_rate=1e-2,
    )
    trainer.train()
    history = trainer.state.log_history
    first, second = (row["eval_loss"] for row in history if "eval_loss" in row)
    assert second < first
    assert {"eval_loss", "eval_mol2cap/rewards/margins", "eval_cap2mol/nll"} <= set().union(*history)
    assert all(row["padding"] == 0 for row in history if "padding" in row)
    trainer.save_model(str(tmp_path / "adapter"))
    loading.check_saved_adapter(tmp_path / "adapter", trainer.model)
    assert not list((tmp_path / "adapter").glob("*.bin"))  # Trainer's pickle is gone
    base = AutoModelForCausalLM.from_pretrained(tiny_policy)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.arange(3, 40)[None]
    assert torch.allclose(loaded(ids).logits, trainer.model.eval()(ids).logits, atol=1e-5)


@pytest.mark.parametrize(("a_step", "taken"), [({"tiles": 3.0, "flex": 4.0}, "tiles"), ({}, "flex")])
def test_the_form_of_attention_is_that_of_the_faster_step(
    tiny_policy, few_triples, tmp_path, monkeypatch, a_step, taken
):
    trainer = make_trainer(tiny_policy, few_triples, tmp_path, per_device_train_batch_size=4)
    of_a_layer = {"tiles": 2.0, "flex": 1.0}
    monkeypatch.setattr(attention_choice, "faster_form", lambda model, tree: ("flex", of_a_layer))
    monkeypatch.setattr(attention_choice, "time_micro_batches", lambda *_: a_step)
    assert attention_choice.choose(trainer, "auto") == (taken, {"a layer": of_a_layer, "a micro-batch": a_step})
    assert attention_choice.choose(trainer, "tiles") == ("tiles", {})
    trainer.model.config.attn_logit_softcapping = 30.0
    with pytest.raises(
        ValueError, match="--tree_attention flex: not with the model's attn_logit_softcapping; leave it"
    ):
        attention_choice.choose(trainer, "flex")


def test_timing_micro_batches_leaves_no_trace(tiny_policy, few_triples, tmp_path):
    settings = {"per_device_train_batch_size": 4, "lora_dropout": 0.1, "gradient_checkpointing": True}
    trainer = make_trainer(tiny_policy, few_triples, tmp_path, **settings)
    trees, state = attention_choice.first_trees(trainer), torch.get_rng_state()
    assert len(trees) == attention_choice.MEASURED
    timed = attention_choice.time_micro_batches(trainer, trees, ("tiles",))
    assert timed["tiles"] > 0 and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_timing_micro_batches_that_fill_the_memory_says_nothing(tiny_policy, few_triples, tmp_path, monkeypatch):
    def fill(*_):
        raise torch.OutOfMemoryError

    trainer = make_trainer(tiny_policy, few_triples, tmp_path)
    monkeypatch.setattr(attention_choice, "time_steps", fill)
    assert attention_choice.time_micro_batches(trainer, []) == {}


def test_evaluation_leaves_nf4_training_its_gradients(tiny_policy, few_triples, tmp_path):
    """bitsandbytes repacks weights for a kernel without gradient in eval mode, on CPUs with AVX512-BF16."""
    gradients = []
    for evaluate_first in (False, True):
        trainer = make_trainer(tiny_policy, few_triples, tmp_path, load_in_4bit=True, per_device_train_batch_size=8)
        batch = list(trainer.get_train_dataloader())[0]
        if evaluate_first:
            trainer.model.eval()
            with torch.no_grad():
                trainer._logps(trainer.model, [(e.prompt, e.chosen) for e in batch.examples])
            trainer.model.train()
        trainer._model_is_proved = True
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=trainer._normalisers([batch])).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    assert torch.equal(gradients[0], gradients[1])


def test_a_sample_is_translated_and_decides_the_best_model(tiny_policy, few_triples, tmp_path):
    pytest.importorskip("rdkit", reason="it scores molecules; bench-gpu does without rdkit")
    tokenizer, model = loading.load_tokenizer(str(tiny_policy)), AutoModelForCausalLM.from_pretrained(tiny_policy)
    few_triples[1]["chosen"] = "CN"  # the first row whose molecule is sought; the second is another
    chain = [encode_prompt(tokenizer, build_prompt("cap2mol", "x"))[-1], *encode_output(tokenizer, "CN")]
    assert len(set(chain)) == len(chain) > 2
    with torch.no_grad():  # a model that is a table: after the prompt comes the chain, whatever was asked
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name or "lm_head" in name:
                weight.zero_()
        for before, after in itertools.pairwise(chain):
            model.lm_head.weight[after] = 10 * model.model.embed_tokens.weight[before]
    model.save_pretrained(tmp_path / "table")
    tokenizer.save_pretrained(tmp_path / "table")
    trainer = make_trainer(
        tmp_path / "table",
        few_triples,
        tmp_path / "run",
        per_device_train_batch_size=24,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="cap2mol/exact_match",
        eval_translations=2,
        eval_max_new_tokens=5,
    )
    trainer.train()
    evaluated = [row for row in trainer.state.log_history if "eval_loss" in row][-1]
    found = [evaluated[f"eval_{key}"] for key in ("cap2mol/validity", "cap2mol/exact_match", "mol2cap/bleu2")]
    assert found == [1.0, 0.5, 0.0]  # "CN" both times, right once, and no caption
    assert trainer.state.best_metric == 0.5


def test_what_is_scored_without_gradient_changes_no_shape_of_training(tiny_policy, few_triples, tmp_path):
    """Self-check, references, KTO's z and evaluation: some depend on time, or on what lies on disk."""
    trainer = make_trainer(tiny_policy, few_triples, tmp_path, loss="kto", per_device_train_batch_size=8)
    trainer.check_model()
    trainer.set_references({"base": "a", "adapter": ""})
    trainer.evaluate(trainer.train_dataset)
    (batch,) = list(trainer.get_train_dataloader())[:1]
    normalisers = trainer._normalisers([batch])
    assert trainer.shapes.entries == []
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=normalisers)
    assert trainer.shapes.entries


def test_a_second_run_finds_its_reference_and_another_model_does_not(tiny_policy, few_triples, tmp_path):
    trainer = make_trainer(tiny_policy, few_triples, tmp_path)
    assert trainer.set_references({"base": "a", "adapter": ""}) == "computed"
    first = trainer.train_dataset.references
    again = make_trainer(tiny_policy, few_triples, tmp_path, seed=7)  # another random LoRA, the same reference
    assert again.set_references({"base": "a", "adapter": ""}) == "cached"
    assert torch.equal(again.train_dataset.references, first)
    assert again.set_references({"base": "a", "adapter": "b"}) == "computed"


def cached_reference(tmp_path):
    (file,) = (tmp_path / "cache" / "reference").iterdir()
    return file


def test_a_cached_reference_of_another_model_is_computed_again(tiny_policy, few_triples, tmp_path, caplog):
    trainer = make_trainer(tiny_policy, few_triples, tmp_path)
    trainer.set_references({"base": "a"})
    file = cached_reference(tmp_path)
    before = load_file(file)["logps"].clone()
    file.write_bytes(reference.as_file(before - 1))
    assert trainer.set_references({"base": "a"}) == "computed"
    assert "differ by" in caplog.text and "computed again" in caplog.text
    assert torch.allclose(trainer.train_dataset.references, before) and torch.allclose(load_file(file)["logps"], before)


@pytest.mark.parametrize("damage", ["cut", "empty", "key", "rows", "nan", "inf", "dtype", "bit"])
def test_a_damaged_reference_is_computed_again(damage, tiny_policy, few_triples, tmp_path, caplog):
    trainer = make_trainer(tiny_policy, few_triples, tmp_path)
    trainer.set_references({"base": "a"})
    file = cached_reference(tmp_path)
    logps = load_file(file)["logps"].clone()
    wrong = {"key": {"x": logps}, "rows": {"logps": logps[:5].clone()}, "dtype": {"logps": logps.float()}}
    wrong["nan"], wrong["inf"] = ({"logps": logps.clone()} for _ in range(2))
    wrong["nan"]["logps"][3, 1], wrong["inf"]["logps"][3] = torch.nan, -torch.inf
    if damage in ("cut", "empty"):
        file.write_bytes(file.read_bytes()[:200] if damage == "cut" else b"")
    elif damage == "bit":
        data = bytearray(file.read_bytes())
        data[-20] ^= 1  # of a row that isn't computed again as a check
        file.write_bytes(data)
    elif damage == "dtype":
        save_file(wrong[damage], file)
    else:
        file.write_bytes(
            reference.save(wrong[damage], {"xxh3_128": reference._digest(next(iter(wrong[damage].values())))})
        )
    assert trainer.set_references({"base": "a"}) == "computed"
    assert f"{file} is damaged" in caplog.text
    assert torch.equal(trainer.train_dataset.references, logps)


def test_a_reference_goes_on_where_an_interrupted_start_saved_it(tiny_policy, few_triples, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_policy, few_triples, tmp_path, per_device_eval_batch_size=4)
    monkeypatch.setattr(reference, "SAVE_EVERY", 0)
    scored, logps = [], trainer._logps

    def interrupted(model, sequences):
        scored.append(len(sequences))
        if len(scored) == 4:
            raise KeyboardInterrupt
        return logps(model, sequences)

    monkeypatch.setattr(trainer, "_logps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.set_references({"base": "a"})
    monkeypatch.setattr(trainer, "_logps", logps)
    assert trainer.set_references({"base": "a"}) == "cached, 12 of them computed"
    whole = reference.compute(trainer, trainer.train_dataset.examples)
    assert torch.allclose(trainer.train_dataset.references, whole, atol=1e-4)


def test_nothing_is_cached_before_the_guard_has_passed(tiny_policy, few_triples, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_policy, few_triples, tmp_path)
    logps = trainer._logps
    monkeypatch.setattr(trainer, "_logps", lambda model, sequences: logps(model, sequences) - 1)
    with pytest.raises(ValueError, match="differ by .* a token from padded rows'"):
        trainer.set_references({"base": "a"})
    assert not (tmp_path / "cache").exists()


def test_training_stops_at_the_first_loss_that_is_not_finite(tiny_policy, few_triples, tmp_path, monkeypatch):
    trainer = make_trainer(
        tiny_policy, few_triples, tmp_path, per_device_train_batch_size=4, save_strategy="steps", save_steps=1
    )
    forward, calls = trainer._forward, []

    def overflowing(*args, **kwargs):
        loss, statistics = forward(*args, **kwargs)
        calls.append(1)
        return loss * (torch.inf if len(calls) == 3 else 1), statistics

    monkeypatch.setattr(trainer, "_forward", overflowing)
    with pytest.raises(ValueError, match="step 3: the loss is (inf|nan), .* up to step 2 are kept"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


@pytest.mark.parametrize("kind, packing", [("gemma2", "tree"), ("bloom", "padded")])
def test_a_soft_cap_is_in_the_tree_and_alibi_trains_on_padded_rows(
    kind, packing, tiny_policy, few_triples, tmp_path, capsys
):
    config = Gemma2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    if kind == "bloom":
        config = BloomConfig(vocab_size=512, hidden_size=64, n_layer=2, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / kind)
    loading.load_tokenizer(str(tiny_policy)).save_pretrained(tmp_path / kind)
    trainer = make_trainer(tmp_path / kind, few_triples, tmp_path, per_device_train_batch_size=8, max_steps=1)
    trainer.check_model()
    trainer.train()
    said = capsys.readouterr().out
    assert trainer.args.packing == packing
    assert ("bloom: its class takes no attention function; rows are padded" in said) == (kind == "bloom")
    assert f"{packing}{'-packed' * (packing == 'tree')} scoring equals plain attention" in said
    assert (trainer.efficiency.padding_tokens > 0) == (packing == "padded")


def test_workers_draw_the_same_batches(tiny_policy, few_triples, tmp_path):
    losses = []
    for workers in (0, 2):
        trainer = make_trainer(
            tiny_policy, few_triples, tmp_path, per_device_train_batch_size=8, dataloader_num_workers=workers,
            learning_rate=1e-2,
        )  # fmt: skip
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_a_token_budget_holds_in_the_epochs_that_max_steps_reaches(tiny_policy, few_triples, tmp_path):
    trainer = make_trainer(
        tiny_policy, few_triples, tmp_path, per_device_train_batch_size=8, tokens_per_batch=330, max_steps=60, seed=3
    )
    sampler = trainer.get_train_dataloader().batch_sampler
    for epoch in range(20):
        sampler.set_epoch(epoch)
        assert max(sum(trainer.costs[index] for index, _ in batch) for batch in sampler) <= 330


def test_early_stopping_keeps_the_best(tiny_policy, few_triples, tmp_path):
    trainer = make_trainer(
        tiny_policy, few_triples, tmp_path, per_device_train_batch_size=24, num_train_epochs=9, eval_strategy="epoch",
        save_strategy="epoch", load_best_model_at_end=True, early_stopping_patience=2, greater_is_better=True,
        learning_rate=1e-3, warmup_steps=0,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3 and trainer.kept_step == trainer.state.best_global_step == 1


def test_a_loss_that_is_not_finite_ends_training_whichever_micro_batch_has_it(tiny_policy, few_triples, tmp_path):
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = make_trainer(tiny_policy, few_triples, tmp_path, **settings)
    forward, calls = trainer._forward, []

    def first_is_nan(*args, **kwargs):
        calls.append(1)
        loss, sums = forward(*args, **kwargs)
        return loss * (torch.nan if len(calls) == 1 else 1), sums

    trainer._forward = first_is_nan
    with pytest.raises(ValueError, match="step 1: the loss is nan, and training stops"):
        trainer.train()


def test_a_micro_batch_fits_what_the_weights_leave_of_the_card(tiny_policy, few_triples, tmp_path, monkeypatch):
    model = make_trainer(tiny_policy, few_triples, tmp_path).model
    text = model.config
    hidden, wide, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    weights = sum(p.numel() * (16 if p.requires_grad else 4) for p in model.parameters())  # fp32, gradient, moments
    card = types.SimpleNamespace(total_memory=weights + 10_000_000)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    of_a_layer = 30 * hidden + 16 * wide  # bytes a token
    assert batches.tokens_that_fit(model, False) == int(6_000_000 / (layers * of_a_layer)) < 8192
    assert batches.tokens_that_fit(model, True) == int(6_000_000 / (2 * layers * hidden + of_a_layer + 18 * hidden))
    card.total_memory = 1 << 40
    assert batches.tokens_that_fit(model, False) == 8192


def test_weights_that_are_not_finite_are_not_saved(tiny_policy, few_triples, tmp_path):
    trainer = make_trainer(tiny_policy, few_triples, tmp_path, per_device_train_batch_size=12, save_strategy="steps",
                           save_steps=1, learning_rate=1e-3, warmup_steps=0)  # fmt: skip

    class Overflow(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                next(p for p in model.parameters() if p.requires_grad).data[0, 0] = torch.nan

    trainer.add_callback(Overflow())
    with pytest.raises(ValueError, match="step 2: .*lora_A.* isn't finite any more"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_step_whose_best_metric_is_undefined_is_not_the_best(tiny_policy, few_triples, tmp_path, caplog):
    trainer = make_trainer(tiny_policy, few_triples, tmp_path, metric_for_best_model="mol2cap/nll")
    assert not trainer._determine_best_metric({"eval_loss": 1.0}, None)
    assert "eval_mol2cap/nll is undefined here" in caplog.text
    assert trainer._determine_best_metric({"eval_mol2cap/nll": 2.0}, None) and trainer.state.best_metric == 2.0
