"""Our losses beside TRL 1.16's own trainers, on the same model and batch.

Where the definitions agree the values do, to 1e-5; KTO's z is drawn differently on purpose, and given TRL's z the
losses agree. Needs benchmarks/requirements.txt, which the package itself doesn't: skipped without TRL.
"""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from lmolt.models.tree import padded_logps
from lmolt.prompts import build_prompt, encode_output, encode_prompt
from lmolt.training import losses

trl = pytest.importorskip("trl", reason="needs TRL: pip install -r benchmarks/requirements.txt")

TRIPLES = [
    ("CCO", "The molecule is an alcohol.", "The molecule is an amine that has a long name."),
    ("CC(=O)O", "The molecule is an acid.", "It is a salt."),
    ("c1ccccc1", "The molecule is aromatic and has six carbons.", "The molecule is a chain."),
    ("CCN", "The molecule is an amine.", "The molecule is an acid of some kind."),
]


@pytest.fixture(scope="module")
def setting(tiny_policy, tmp_path_factory):
    """Tokenizer, a LoRA adapter away from its base on disk, and our log-probabilities with and without it."""
    from peft import LoraConfig, get_peft_model

    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_policy), config).eval()
    adapter = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(adapter)
    prompts = [build_prompt("mol2cap", source) for source, _, _ in TRIPLES]
    encode = lambda column: [
        (encode_prompt(tokenizer, p), encode_output(tokenizer, t[column]))
        for p, t in zip(prompts, TRIPLES, strict=True)
    ]
    sequences = {"chosen": encode(1), "rejected": encode(2)}
    with torch.no_grad():
        policy = {name: padded_logps(model, s) for name, s in sequences.items()}
        with model.disable_adapter():
            reference = {name: padded_logps(model, s) for name, s in sequences.items()}
    tokens = torch.tensor([len(output) for _, output in sequences["chosen"]])
    return tiny_policy, tokenizer, adapter, prompts, policy, reference, tokens


def first_log(trainer) -> dict:
    seen = []

    class Keep(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer.add_callback(Keep())
    trainer.train()
    return seen[0]


def make(kind, config, rows, setting, output_dir, merged=False, **extra):
    """A TRL trainer of the adapter, or of the model with the adapter merged in, whose reference is then the base."""
    from datasets import Dataset

    folder, tokenizer, adapter, *_ = setting
    arguments = config(
        output_dir=str(output_dir),
        per_device_train_batch_size=len(rows),
        max_steps=1,
        learning_rate=0.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        max_length=512,
        **extra,
    )
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    models = {"model": model}
    if merged:
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        models = {"model": model.merge_and_unload().requires_grad_(True), "ref_model": reference}
    return kind(**models, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def rows_of(prompts):
    return [{"prompt": "<s>" + p, "chosen": c, "rejected": r} for p, (_, c, r) in zip(prompts, TRIPLES, strict=True)]


def test_sft(setting, tmp_path):
    *_, prompts, policy, _, tokens = setting
    rows = [{"prompt": "<s>" + p, "completion": c} for p, (_, c, _) in zip(prompts, TRIPLES, strict=True)]
    log = first_log(make(trl.SFTTrainer, trl.SFTConfig, rows, setting, tmp_path, completion_only_loss=True))
    assert losses.sft(policy["chosen"], tokens).item() == pytest.approx(log["loss"], rel=1e-5)


def test_cpo(setting, tmp_path):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    *_, prompts, policy, _, tokens = setting
    extra = {"beta": 0.1, "cpo_alpha": 1.0, "max_completion_length": 256}
    log = first_log(make(CPOTrainer, CPOConfig, rows_of(prompts), setting, tmp_path, **extra))
    assert losses.cpo(policy["chosen"], policy["rejected"], tokens).item() == pytest.approx(log["loss"], rel=1e-5)
    per_sequence = losses.cpo(policy["chosen"], policy["rejected"], tokens, nll="sequence").item()
    assert per_sequence != pytest.approx(log["loss"], rel=1e-2)  # Eq. 8 to the letter is another number


def test_dpo(setting, tmp_path):
    *_, prompts, policy, reference, _ = setting
    trainer = make(trl.DPOTrainer, trl.DPOConfig, rows_of(prompts), setting, tmp_path, beta=0.1)
    # TRL 1.16 keeps a copy of a continued adapter as reference, as we do: its margins start at 0
    log = first_log(trainer)
    ours = losses.dpo(policy["chosen"], policy["rejected"], policy["chosen"], policy["rejected"]).item()
    assert ours == pytest.approx(log["loss"], rel=1e-5)
    against_base = losses.dpo(policy["chosen"], policy["rejected"], reference["chosen"], reference["rejected"]).item()
    assert against_base != pytest.approx(log["loss"], rel=1e-3)  # the base would be another reference


def test_kto_given_trls_z(setting, tmp_path):
    *_, prompts, policy, reference, _ = setting
    rows = [
        {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}
        for row in rows_of(prompts)
        for key in ("chosen", "rejected")
    ]
    extra = {"beta": 0.1, "train_sampling_strategy": "sequential"}
    log = first_log(make(trl.KTOTrainer, trl.KTOConfig, rows, setting, tmp_path, merged=True, **extra))
    columns = policy["chosen"], policy["rejected"], reference["chosen"], reference["rejected"]
    assert losses.kto(*columns, torch.tensor(log["kl"])).item() == pytest.approx(log["loss"], rel=1e-5)


def test_dpo_against_the_base(setting, tmp_path):
    *_, prompts, policy, reference, _ = setting
    log = first_log(make(trl.DPOTrainer, trl.DPOConfig, rows_of(prompts), setting, tmp_path, merged=True, beta=0.1))
    ours = losses.dpo(policy["chosen"], policy["rejected"], reference["chosen"], reference["rejected"]).item()
    assert ours == pytest.approx(log["loss"], rel=1e-5)


# TRL's loss_type, with its label_smoothing where it reads that (its "sigmoid" doesn't, from 1.16 on)
OF_DPO_TRAINER = {
    "robust_dpo": ("robust", {"label_smoothing": 0.2}),
    "hinge": ("hinge", {}),
    "ipo": ("ipo", {}),
    "apo_zero": ("apo_zero", {}),
    "apo_down": ("apo_down", {}),
    "dpo_norm": ("sigmoid_norm", {}),
}


def of(setting, name, **parameters):
    """Our loss, against the base as reference."""
    *_, policy, reference, tokens = setting
    given = {
        "chosen_tokens": tokens,
        "rejected_tokens": rejected_tokens(setting),
        "num_pairs": None,
        "num_tokens": None,
    }
    given |= policy | {f"ref_{side}": logps for side, logps in reference.items()}
    return losses.LOSSES[name](given, losses.LOSSES[name].parameters | parameters).item()


def rejected_tokens(setting):
    _, tokenizer, *_ = setting
    return torch.tensor([len(encode_output(tokenizer, rejected)) for _, _, rejected in TRIPLES])


@pytest.mark.parametrize("name", OF_DPO_TRAINER)
def test_losses_of_trls_dpo_trainer(setting, tmp_path, name):
    loss_type, extra = OF_DPO_TRAINER[name]
    rows = rows_of(setting[3])
    log = first_log(
        make(trl.DPOTrainer, trl.DPOConfig, rows, setting, tmp_path, True, beta=0.3, loss_type=loss_type, **extra)
    )
    assert of(setting, name, beta=0.3, **extra) == pytest.approx(log["loss"], rel=1e-5)


def test_cpo_with_label_smoothing(setting, tmp_path):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    extra = {"beta": 0.3, "cpo_alpha": 0.5, "label_smoothing": 0.2, "max_completion_length": 256}
    log = first_log(make(CPOTrainer, CPOConfig, rows_of(setting[3]), setting, tmp_path, **extra))
    assert of(setting, "cpo", beta=0.3, alpha=0.5, label_smoothing=0.2) == pytest.approx(log["loss"], rel=1e-5)


@pytest.mark.parametrize(("name", "alpha"), [("simpo", 0.0), ("cpo_simpo", 0.7)])
def test_simpo(setting, tmp_path, name, alpha):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    extra = {"beta": 1.5, "simpo_gamma": 0.4, "cpo_alpha": alpha, "loss_type": "simpo", "max_completion_length": 256}
    log = first_log(make(CPOTrainer, CPOConfig, rows_of(setting[3]), setting, tmp_path, **extra))
    own = {"beta": 1.5, "gamma": 0.4} | ({"alpha": alpha} if alpha else {})
    assert of(setting, name, **own) == pytest.approx(log["loss"], rel=1e-5)


def test_orpo(setting, tmp_path):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    extra = {"beta": 0.3, "max_completion_length": 256}
    log = first_log(make(ORPOTrainer, ORPOConfig, rows_of(setting[3]), setting, tmp_path, **extra))
    *_, tokens = setting
    ours = of(setting, "orpo", beta=0.3) - losses.sft(setting[4]["chosen"], tokens).item()
    # its NLL scores the prompt too; the term that makes it ORPO is the same
    assert ours == pytest.approx(-0.3 * log["log_odds_ratio"], rel=1e-4)
