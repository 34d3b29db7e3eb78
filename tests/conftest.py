"""Tiny models and data, made here: nothing is downloaded."""

import importlib.util
import os
import sys
from pathlib import Path

# One thread a process: the tests' models are tiny, and several processes on few cores wait for each other else.
os.environ.update(
    OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", "")
)
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402

from lmolt import ownership  # noqa: E402


def load_script(name: str):
    """The module scripts/NAME.py, which puts the project's root first on `sys.path` when it is loaded."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    first = sys.path[0]
    spec.loader.exec_module(module)
    sys.path[0] = first
    return module


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: several processes or machines, or long: ./launch.sh test-distributed")


@pytest.fixture(autouse=True)
def _caches_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("LMOLT_CACHE", str(tmp_path / "cache"))
    yield
    ownership.release()  # the scripts' locks, which last as long as their process


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory) -> Path:
    """A folder with a random Llama of 64 hidden units and a byte-pair tokenizer trained on a few lines."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from lmolt.prompts import TEMPLATES

    folder = tmp_path_factory.mktemp("policy")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [*TEMPLATES.values(), "The molecule is an aromatic amine.", "CC(=O)Nc1ccccc1"], trainer
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def few_triples() -> list[dict]:
    """24 triples, both directions, outputs of uneven length."""
    molecules = ["CCO", "CCN", "c1ccccc1O", "CC(=O)O", "CCCCCC", "CC(C)N", "C1CCCCC1", "Oc1ccc(Cl)cc1", "CCOC(C)=O"]
    molecules += ["NCCN", "CC#N", "CCS"]
    triples = []
    for i, smiles in enumerate(molecules):
        caption = f"The molecule has {len(smiles)} characters" + " and it is small" * (i % 3) + "."
        wrong = molecules[(i + 5) % len(molecules)]
        triples += [
            {"id": f"m{i}", "direction": "mol2cap", "source": smiles, "chosen": caption, "rejected": f"A thing {i}."},
            {"id": f"c{i}", "direction": "cap2mol", "source": caption + str(i), "chosen": smiles, "rejected": wrong},
        ]
    return triples
