"""Directions, the paper's prompts (Gkoumas & Liakata 2024, appendix C) and other systems', text -> token ids."""

MOL2CAP, CAP2MOL = "mol2cap", "cap2mol"
DIRECTIONS = (MOL2CAP, CAP2MOL)
COLUMNS = {MOL2CAP: ("molecule", "caption"), CAP2MOL: ("caption", "molecule")}  # of a pair: source, target

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


# How each system of recipes/systems.yaml is asked. A prompt is part of a model: to the letter, blanks included.
STYLES = {
    "paper": TEMPLATES,
    # MolT5: the source and nothing else (its README; the authors' create_negative.py)
    "bare": dict.fromkeys(DIRECTIONS, "{source}"),
    # Text+Chem T5: the prefixes of its training tasks
    "text_chem": {
        MOL2CAP: "Caption the following molecule: {source}",
        CAP2MOL: "Write in SMILES the described molecule: {source}",
    },
    # what the paper's authors put before a T5's source instead (their inference_t5.py)
    "translate": {
        MOL2CAP: "Translate the following molecule smile string to a descriptive caption: {source}",
        CAP2MOL: "Translate the following descriptive caption to a molecule smile string: {source}",
    },
    # the two Meditrons' cards: the paper's wording, other blanks
    "meditron": {
        direction: template.replace("{source}\n", "{source} \n").replace("?\n\n### Response:\n", "?\n\n\n### Response:")
        for direction, template in TEMPLATES.items()
    },
}
# ChemLLM: the authors' wording in the chat format of its tokenizer_config.json
STYLES["chem_llm"] = {
    direction: "<|im_start|>system\nYou are an AI Chemist assistant whose name is ChemLLM.<|im_end|>\n"
    f"<|im_start|>user\n{template}<|im_end|>\n<|im_start|>assistant\n"
    for direction, template in STYLES["translate"].items()
}


CHAT = "<|im_start|>"  # a template that begins with it is written in special tokens

# Styles of models that were tuned on prompt and output as one text, and the end of that prompt. Behind it
# SentencePiece's Llama writes an output's first word without the blank that it has alone: `:` `CC` and not `:` `▁CC`.
# Their prompts are encoded as ever: prompt ids are the same in both.
JOINED = {"meditron": "### Response:"}


def build_prompt(direction: str, source: str, style: str = "paper") -> str:
    """The prompt for one source text, in a style of `STYLES`; `ValueError` on an unknown direction or style."""
    if style not in STYLES:
        raise ValueError(f"unknown prompt style {style!r}; use one of {', '.join(STYLES)}")
    if direction not in STYLES[style]:
        raise ValueError(f"unknown direction {direction!r}; use one of {', '.join(DIRECTIONS)}")
    return STYLES[style][direction].replace("{source}", source)


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt: exactly one BOS where the tokenizer has one, and no EOS.

    Prompt and output are tokenized apart and their ids concatenated, so that no merge crosses the boundary and
    training sees the very ids that generation starts from. What reads like a special token in a text is text.
    """
    ids = _encode_text(tokenizer, prompt, chat=prompt.startswith(CHAT))
    return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]


def encode_output(tokenizer, output: str, prompt: str = "") -> list[int]:
    """Token ids of an output with exactly one EOS at its end. The EOS is scored like any other token.

    Behind a `prompt` of a style of `JOINED` its first token is the one it has behind that prompt in one text.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token; set `eos_token` in its tokenizer_config.json")
    ids = _encode_text(tokenizer, output)
    if end := next((end for end in JOINED.values() if prompt.endswith(end)), None):
        before, joined = _encode_text(tokenizer, end), _encode_text(tokenizer, end + output)
        if joined[: len(before)] == before:  # else a merge crosses the boundary, and there is no such first token
            ids = joined[len(before) :]
    return [*ids, tokenizer.eos_token_id]


def encode_source(tokenizer, source: str) -> list[int]:
    """Token ids of an encoder's input, as its tokenizer frames them (T5: one EOS at the end)."""
    special, frame = _special(tokenizer), len(tokenizer("")["input_ids"])
    for options in ({}, {"split_special_tokens": True}):
        ids = tokenizer(source, **options)["input_ids"]
        if sum(map(special.__contains__, ids)) <= frame:
            return ids
    raise ValueError(
        f"the text {source[:80]!r} holds a special token that this tokenizer can't read as text; remove it"
    )


def _encode_text(tokenizer, text: str, chat: bool = False) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    special = _special(tokenizer)
    if not chat and not special.isdisjoint(ids):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if not special.isdisjoint(ids):
            found = tokenizer.convert_ids_to_tokens(next(iter(special.intersection(ids))))
            raise ValueError(
                f"the text {text[:80]!r} holds {found!r}, which this tokenizer can't read as text; remove it"
            )
    return ids


def _special(tokenizer) -> set[int]:
    """Ids of the tokens that begin, end, pad or mask; an unknown token stands for a text that there is."""
    return set(tokenizer.all_special_ids) - {unknown_id(tokenizer)}


def unknown_id(tokenizer) -> int | None:
    """The id of the token for what a tokenizer doesn't know; None where it begins or ends texts as well: such a
    tokenizer (GPT-2's, of bytes) knows all."""
    unknown = tokenizer.unk_token_id
    return None if unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id) else unknown
