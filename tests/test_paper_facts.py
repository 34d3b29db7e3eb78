"""What the paper (Gkoumas & Liakata 2024) states, as literals: whoever changes one of these departs from it."""

from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, load_script

from lmolt.data.pairs import CORPORA
from lmolt.merging.methods import slerp_coefficients
from lmolt.metrics.hallucination import win
from lmolt.models.loading import nf4
from lmolt.prompts import CAP2MOL, MOL2CAP, build_prompt, encode_output, encode_prompt
from lmolt.training.arguments import PreferenceArguments

APPENDIX = {  # its Figure 5
    "num_train_epochs": 3,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # a share of all steps
    "max_grad_norm": 0.3,
    "optim": "adamw_torch_fused",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 64,
    "bf16": True,
    "load_in_4bit": True,
    "lora_r": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "lora_target_modules": "all-linear",
    "load_best_model_at_end": True,
}


def test_the_appendix_hyper_parameters_are_the_defaults(tmp_path):
    arguments = PreferenceArguments(output_dir=str(tmp_path))
    assert {name: getattr(arguments, name) for name in APPENDIX} == APPENDIX


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes" / "paper").glob("*.yaml")), ids=lambda path: path.stem)
def test_each_paper_recipe_trains_with_them(recipe, monkeypatch):
    script = load_script("train_pref")
    monkeypatch.setattr(script, "bf16_is_slow", lambda: False)  # as GPUs, and not as every laptop
    arguments = script.parse_arguments(["--recipe", str(recipe)])
    assert {name: getattr(arguments, name) for name in APPENDIX} == APPENDIX


def test_weights_are_stored_as_qlora_stores_them():
    stored = nf4().to_dict()
    assert (stored["bnb_4bit_quant_type"], stored["bnb_4bit_use_double_quant"]) == ("nf4", True)
    assert stored["bnb_4bit_compute_dtype"] == "bfloat16"


PREAMBLE = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
"""


@pytest.mark.parametrize(
    ("direction", "prompt"),
    [  # appendix C, grammar and all
        (
            MOL2CAP,
            PREAMBLE
            + """\
You are a researcher. You can come up captions based on your existing knowledge. \
Captions are given against the following input. You should be as detailed as possible.

### Input:
Molecule: CCO
In that molecule, could you formulate a caption about?

### Response:
""",
        ),
        (
            CAP2MOL,
            PREAMBLE
            + """\
You are a researcher. You can come up molecule smile strings based on your existing knowledge. \
Molecule smile strings are given against the following input. You should be as detailed as possible.

### Input:
Caption: CCO
In that caption, could you generate a molecule smile string?

### Response:
""",
        ),
    ],
)
def test_the_prompts_to_the_letter(direction, prompt):
    assert build_prompt(direction, "CCO") == prompt


def test_data():
    """10 % of L+M-24, 250 new tokens; 3,000 unseen pairs of its extra set."""
    arguments = load_script("make_triples").parse_arguments(["--pairs", "demo", "--output", "t.parquet"])
    assert (arguments.fraction, arguments.max_new_tokens, arguments.temperature) == (0.1, 250, 0.0)
    assert CORPORA["lpm24"]["test"] == ("language-plus-molecules/LPM-24_train-extra", "split_valid", 3000)


@pytest.mark.parametrize(("cosine", "linear"), [(0.9997, True), (0.9993, False), (-0.9997, True), (-0.9993, False)])
def test_slerp_is_linear_where_the_cosine_is_over_0_9995(cosine, linear):
    first, second, is_linear = slerp_coefficients(np.array([[1, cosine], [cosine, 1]]), 0.05)
    assert is_linear is linear
    theta = np.arccos(cosine)
    angles = (np.sin(0.95 * theta) / np.sin(theta), np.sin(0.05 * theta) / np.sin(theta))
    assert (first, second) == pytest.approx((0.95, 0.05) if linear else angles)


def test_a_molecule_wins_over_both_thresholds_and_not_at_them():
    """Section 3: Chr-F > 0.3, |delta length| < 5, valid."""
    chrf = np.array([0.3001, 0.3, 1, 1, 1, 1])
    delta, valid = np.array([0, 0, 5, -5, 4, -4]), np.array([True, True, True, True, True, False])
    assert win(chrf, delta, valid).tolist() == [1, 0, 0, 0, 1, 0]


def test_one_bos_before_the_prompt_and_one_eos_that_is_scored(tiny_policy):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(tiny_policy))
    prompt, output = encode_prompt(tokenizer, "CCO"), encode_output(tokenizer, "CCO")
    assert (prompt[0], prompt.count(tokenizer.bos_token_id), prompt.count(tokenizer.eos_token_id)) == (1, 1, 0)
    assert (output[-1], output.count(tokenizer.bos_token_id), output.count(tokenizer.eos_token_id)) == (2, 0, 1)
