"""What benchmarks/gpu.py measures with: a random Llama in the shape of a 7B or a 1B, triples, a clock, memory."""

import random
import time

INSTRUCTION, SOURCE, CHOSEN, REJECTED = 95, (40, 102), (34, 94), (47, 107)  # tokens: means 166, 64, 77
SHAPES = {
    "toy": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
           "num_key_value_heads": 4},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}  # fmt: skip
VOCABULARY = 32_000


class Skipped(Exception):
    """A part, or one of its rows, that can't run here, with the reason."""


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def device():
    return "cuda" if on_gpu() else "cpu"


def synchronise() -> None:
    import torch

    if on_gpu():
        torch.cuda.synchronize()


def seconds(function, repeats: int = 5, warm: int = 2) -> float:
    """Median of a call's time, the device's work included."""
    for _ in range(warm):
        function()
    times = []
    for _ in range(repeats):
        synchronise()
        start = time.perf_counter()
        function()
        synchronise()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def fresh_memory() -> None:
    import gc

    import torch

    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    from lmolt.training.efficiency import peak_memory_bytes

    return peak_memory_bytes() / 2**30


def matrix_rate() -> float:
    """FLOP/s of a bf16 matrix product of random numbers, 8192 cubed (fp32 and 1024 on a CPU)."""
    import torch

    n, dtype = (8192, torch.bfloat16) if on_gpu() else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device(), dtype=dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, repeats=10)


def make_model(shape: str, nf4: bool = True, attention: str | None = None):
    """A random Llama on the device, its linear layers in NF4 there, without LoRA."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lmolt.models.attention import TREE

    config = LlamaConfig(
        vocab_size=VOCABULARY if shape != "toy" else 512, max_position_embeddings=4096, **SHAPES[shape],
        bos_token_id=1, eos_token_id=2, pad_token_id=0, attn_implementation=attention or TREE,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device()):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if nf4:
        import bitsandbytes as bnb

        for name, module in list(model.named_modules()):
            if type(module) is torch.nn.Linear and name != "lm_head":
                packed = bnb.nn.Linear4bit(
                    module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16,
                    compress_statistics=True, quant_type="nf4", quant_storage=torch.bfloat16, device="meta",
                )  # fmt: skip
                packed.weight = bnb.nn.Params4bit(
                    module.weight.data.cpu() if not on_gpu() else module.weight.data, requires_grad=False,
                    quant_type="nf4", compress_statistics=True, quant_storage=torch.bfloat16,
                )  # fmt: skip
                packed.support_avx512bf16_for_cpu = False
                model.set_submodule(name, packed.to(device()))
        model.is_loaded_in_4bit = True  # PEFT asks
    fresh_memory()
    return model


def add_lora(model, dropout: float = 0.1):
    from peft import LoraConfig, get_peft_model

    model.requires_grad_(False)
    config = LoraConfig(task_type="CAUSAL_LM", r=64, lora_alpha=16, lora_dropout=dropout, target_modules="all-linear")
    return get_peft_model(model, config)  # whose weights PEFT makes fp32


def checkpoint_layers(model) -> None:
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def make_sequences(triples: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """(prompt, chosen), then (prompt, rejected), of random tokens; two directions' instructions."""
    draw, top = random.Random(seed), VOCABULARY if on_gpu() else 512
    ids = lambda n: [draw.randrange(3, top) for _ in range(n)]
    fixed = random.Random(1)
    instructions = [[1] + [fixed.randrange(3, top) for _ in range(INSTRUCTION - 1)] for _ in range(2)]
    chosen, rejected = [], []
    for i in range(triples):
        prompt = instructions[i % 2] + ids(draw.randint(*SOURCE))
        chosen.append((prompt, [*ids(draw.randint(*CHOSEN) - 1), 2]))
        rejected.append((prompt, [*ids(draw.randint(*REJECTED) - 1), 2]))
    return chosen + rejected


def backbone_flops(model, tokens: int, checkpointing: bool) -> float:
    """2 P forward, 2 P through activations (2 P more where a layer is computed again), of linear layers, LoRA's too."""
    linear = sum(m.in_features * m.out_features for m in model.modules() if hasattr(m, "in_features"))
    head = model.get_output_embeddings()
    linear -= head.in_features * head.out_features
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return tokens * (2 * linear * (3 if checkpointing else 2) + 2 * trained)


def token_ids(ids):
    from array import array

    return array("i", ids)


def make_tokenizer(of_bytes: bool = False):
    """One word a token, w3 to the vocabulary's last; or one byte a token, for real prompts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet()) if of_bytes else []
    words |= {letter: i for i, letter in enumerate(letters, 3)}
    words |= {f"w{i}": i for i in range(len(words), VOCABULARY if on_gpu() else 512)}
    raw = Tokenizer(models.BPE(words, []) if of_bytes else models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False) if of_bytes else pre_tokenizers.WhitespaceSplit()
    )
    raw.decoder = decoders.ByteLevel() if of_bytes else None
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
