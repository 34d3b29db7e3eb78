"""Loading a model and its tokenizer; attention over the preference tree."""
