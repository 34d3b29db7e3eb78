"""Which form of a tree's attention a run takes on a GPU: tiles or FlexAttention, by flag or by measurement."""

import itertools

import torch
from accelerate.utils import broadcast_object_list

from lmolt.models.forms import faster_form, time_steps, why_not_flex
from lmolt.models.tree import build_tree, tree_logps

MEASURED = 5  # micro-batches, of which two compile or plan


def choose(trainer, wanted: str) -> tuple[str, dict]:
    """ "tiles" or "flex", and what was measured in ms: as `wanted`, or ("auto") what the first process finds faster.

    What is faster in one layer needn't be so in a step, which waits for the processor that launches it where a
    micro-batch is small. So the first micro-batches are timed whole, where this process has the whole model.
    """
    if wanted != "auto":
        if wanted == "flex" and (why := why_not_flex(trainer.model)):
            raise ValueError(f"--tree_attention flex: {why}; leave it out")
        return wanted, {}
    found = [None]
    if trainer.args.process_index == 0:
        trees = first_trees(trainer)
        form, of_a_layer = faster_form(trainer.model, trees[0])
        measured = {"a layer": of_a_layer}
        if form == "flex" and all(p.numel() and p.device == trees[0].device for p in trainer.model.parameters()):
            measured["a micro-batch"] = of_steps = time_micro_batches(trainer, trees)
            form = min(of_steps, key=of_steps.get, default=form)
        found = [(form, measured)]
    return broadcast_object_list(found)[0]


def first_trees(trainer) -> list:
    """Trees of the run's first micro-batches on its device, over and over where there are fewer than `MEASURED`."""
    trees = []
    for batch in itertools.islice(trainer.get_train_dataloader().batch_sampler, MEASURED):
        examples = [trainer.train_dataset.examples[index] for index, _ in batch]
        packed = build_tree([(e.prompt, ids) for e in examples for ids in (e.chosen, e.rejected) if len(ids)])
        trees.append(packed.to(trainer.args.device))
    return list(itertools.islice(itertools.cycle(trees), MEASURED))


def time_micro_batches(trainer, trees: list, forms=("tiles", "flex")) -> dict[str, float]:
    """ms of a micro-batch in each form, forward and backward, as training runs it; {} where memory runs out."""
    args, model = trainer.args, trainer.model

    def score(tree, form):
        with trainer.accelerator.autocast():  # which training puts around the model's forward pass
            return tree_logps(model, tree, args.score_chunk, form)

    was_training = model.training
    model.train()
    if args.activation_checkpointing:  # Trainer does so when it starts
        options = dict(args.activation_checkpointing_kwargs or {})
        sizes = {"every_n_layers": options.pop("every_n_layers", 1), "offload": options.pop("offload", False)}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options or None, **sizes)
    try:
        return {form: 1000 * seconds for form, seconds in time_steps(score, trees, forms).items()}
    except torch.OutOfMemoryError:  # which training will say, with what to change
        return {}
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
