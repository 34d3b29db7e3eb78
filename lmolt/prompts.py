"""Directions, the paper's prompts (Gkoumas & Liakata 2024, appendix C), and how text becomes token ids."""

MOL2CAP, CAP2MOL = "mol2cap", "cap2mol"
DIRECTIONS = (MOL2CAP, CAP2MOL)

_PREAMBLE = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
# The wording, grammar included, is the paper's: models trained with it expect it to the letter.
TEMPLATES = {
    MOL2CAP: _PREAMBLE + "### Instruction:\nYou are a researcher. You can come up captions based on your existing "
    "knowledge. Captions are given against the following input. You should be as detailed as possible.\n\n"
    "### Input:\nMolecule: {source}\nIn that molecule, could you formulate a caption about?\n\n### Response:\n",
    CAP2MOL: _PREAMBLE + "### Instruction:\nYou are a researcher. You can come up molecule smile strings based on "
    "your existing knowledge. Molecule smile strings are given against the following input. You should be as "
    "detailed as possible.\n\n"
    "### Input:\nCaption: {source}\nIn that caption, could you generate a molecule smile string?\n\n### Response:\n",
}


def build_prompt(direction: str, source: str) -> str:
    """The prompt for one source text; `ValueError` on an unknown direction."""
    if direction not in TEMPLATES:
        raise ValueError(f"unknown direction {direction!r}; use one of {', '.join(DIRECTIONS)}")
    return TEMPLATES[direction].replace("{source}", source)


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt: exactly one BOS where the tokenizer has one, and no EOS.

    Prompt and output are tokenized apart and their ids concatenated, so that no merge crosses the boundary and
    training sees the very ids that generation starts from.
    """
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]


def encode_output(tokenizer, output: str) -> list[int]:
    """Token ids of an output with exactly one EOS at its end. The EOS is scored like any other token."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token; set `eos_token` in its tokenizer_config.json")
    return [*tokenizer(output, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
