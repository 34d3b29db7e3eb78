"""The transformers Trainer with the paper's losses over preference trees."""

import json
import logging
import math
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import EarlyStoppingCallback, ProgressCallback, Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from lmolt import ownership
from lmolt.distributed import strategy
from lmolt.models import self_check
from lmolt.models.lora import lean_adapters
from lmolt.models.tiles import Shapes
from lmolt.models.tree import build_tree, padded_logps, tree_logps
from lmolt.training import attention_choice, checkpoints, identity, liger, reference
from lmolt.training.arguments import PreferenceArguments
from lmolt.training.batches import (
    Example,
    MicroBatch,
    StepBatchSampler,
    Triples,
    collate,
    micro_batches_for,
    tokens_that_fit,
    tree_costs,
)
from lmolt.training.callbacks import FiniteLossCallback, OneLineProgress
from lmolt.training.efficiency import Efficiency
from lmolt.training.losses import LOSSES, kto_z
from lmolt.training.statistics import Statistics, translation_scores

logger = logging.getLogger(__name__)


class _EpochLoader(DataLoader):
    def set_epoch(self, epoch: int):
        self.batch_sampler.set_epoch(epoch)


class PreferenceTrainer(Trainer):
    """Trains on `MicroBatch`es, each packed into one tree (lmolt/models/tree.py).

    Losses are normalised by the counts of the whole optimizer step, over ranks and accumulation, so that the gradient
    doesn't depend on how a step is split.
    """

    def __init__(
        self,
        model,
        args: PreferenceArguments,
        train: list[Example],
        evaluation: list[Example],
        fixed: dict | None = None,
        changeable: dict | None = None,
        **kwargs,
    ):
        """`fixed` is what identity.of_inputs found, `changeable` what may be another in a resumed run."""
        self.loss = LOSSES[args.loss]
        self.costs = tree_costs(train)
        self.seed = args.seed if args.data_seed is None else args.data_seed
        self.pairs_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        lean_adapters(model)
        alone = args.train_batch_size == 1 and not self.loss.depends_on_split
        if args.tokens_per_batch is None and args.device.type == "cuda" and alone:
            args.tokens_per_batch = max(tokens_that_fit(model, args.gradient_checkpointing), *self.costs)
        args.tokens_per_batch = args.tokens_per_batch or None
        if args.tokens_per_batch is not None:
            args.gradient_accumulation_steps = micro_batches_for(
                self.costs,
                self.pairs_per_step,
                args.tokens_per_batch,
                world=args.world_size,
                seed=self.seed,
                epochs=self._epochs(args, len(train)),
            )
        if args.use_liger_kernel:
            liger.check_model(model)
            if not args.load_in_4bit:
                model.to(args.device)
            precision = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
            without = liger.hidden_states(model, precision)
        super().__init__(
            model,
            args,
            train_dataset=Triples(train),
            eval_dataset=Triples(evaluation) if evaluation else None,
            **kwargs,
        )
        if args.use_liger_kernel:  # which Trainer has put in
            liger.check_equal(without, liger.hidden_states(model, precision), precision)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(OneLineProgress)
        self.strategy = strategy.strategy_of(self.accelerator) | {"triples_per_step": self.pairs_per_step}
        if self.strategy["name"] == "FSDP":
            strategy.keep_outputs_exact(self.accelerator.state.fsdp_plugin)
        if args.eval_translations:
            strategy.check_translations(self.strategy)
        self.loss_is_scaled_for_ga = True
        if self.accelerator.mixed_precision != (ran := "fp16" if args.fp16 else "bf16" if args.bf16 else "no"):
            raise ValueError(
                f"--bf16 and --fp16 ask for {ran!r}, and accelerate would run {self.accelerator.mixed_precision!r}; "
                "look at the mixed precision in its configuration, or DeepSpeed's"
            )
        policy = identity.of_policy(self.model, self.accelerator)
        strategy.all_agree(identity.unlike(strategy.first_decides(lambda: policy), policy))
        self.fixed = (fixed or {}) | policy
        self.fixed["triples a step"] = self.pairs_per_step
        self.changeable, self.changes = changeable or {}, []
        self.chosen = {"attention": model.config._attn_implementation, "packing": args.packing}
        self.chosen["tokens_per_batch"] = args.tokens_per_batch
        self.add_callback(FiniteLossCallback(self))
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        self.step_loss, self.best_before = 0.0, None
        self.kept_step = None  # that of the best checkpoint, where it is loaded at the end
        self.efficiency = Efficiency(model)
        self.statistics = Statistics(args)
        self._model_is_proved = False
        self.attention, self.attention_ms = "tiles", {}
        if args.packing == "tree" and args.device.type == "cuda":
            self.attention, self.attention_ms = attention_choice.choose(self, args.tree_attention)
        self.chosen["tree attention"] = self.attention
        self.shapes = Shapes()  # of training's passes with gradient: others round alike whatever was scored before

    # --- batches

    def _epochs(self, args, rows: int) -> int:
        """How many epochs are begun, also where --max_steps goes on beyond --num_train_epochs."""
        steps = math.ceil(rows / self.pairs_per_step)
        return math.ceil(args.num_train_epochs if args.max_steps < 1 else args.max_steps / steps)

    def _sampler(self, costs, pairs_per_step, **kwargs) -> StepBatchSampler:
        rank, world = self.args.process_index, self.args.world_size
        return StepBatchSampler(costs, pairs_per_step, rank=rank, world=world, seed=self.seed, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        most = self.args.train_batch_size if self.args.tokens_per_batch is None else None
        sampler = self._sampler(
            self.costs, self.pairs_per_step, micro_batches=self.args.gradient_accumulation_steps, most=most
        )
        return _EpochLoader(self.train_dataset, batch_sampler=sampler, collate_fn=collate, **self._workers())

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        per_step = self.args.eval_batch_size * self.args.world_size
        sampler = self._sampler(tree_costs(dataset.examples), per_step, shuffle=False)
        return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, **self._workers())

    def _workers(self) -> dict:
        args = self.args
        if not args.dataloader_num_workers:
            return {}
        return {
            "num_workers": args.dataloader_num_workers,
            "persistent_workers": args.dataloader_persistent_workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "multiprocessing_context": args.dataloader_multiprocessing_context,
        }

    def _prepare_inputs(self, inputs: MicroBatch) -> MicroBatch:
        return inputs  # trees are built, and moved to the device, in `_logps`

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, and what normalises their losses."""
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        return batches, self._normalisers(batches)

    def _normalisers(self, batches: list[MicroBatch]) -> dict[str, torch.Tensor]:
        """Counts over the whole step and all ranks, and KTO's z (Eq. 11) over the same."""
        live = [example for batch in batches if batch.live for example in batch.examples]
        counts = [len(live), sum(len(example.chosen) for example in live), 0.0]
        if "z" in self.loss.reads:
            counts[2] = self._mismatched_log_ratio(batches)
        counts = torch.tensor(counts, dtype=torch.float64, device=self.args.device)
        num_pairs, num_tokens, log_ratio = self.accelerator.reduce(counts, "sum")
        return {"num_pairs": num_pairs, "num_tokens": num_tokens, "z": kto_z(log_ratio, num_pairs)}

    @torch.no_grad()
    def _mismatched_log_ratio(self, batches: list[MicroBatch]) -> float:
        """Sum of logp - ref over this rank's mismatched pairs, dropout off."""
        was_training = self.model_wrapped.training
        self.model_wrapped.eval()
        total = 0.0
        for batch in batches:
            logps = self._logps(self.model_wrapped, [(e.prompt, e.mismatched) for e in batch.examples])
            reference = self._reference(batch, 2)
            total += (logps - reference).sum().item() if batch.live else 0.0
        self.model_wrapped.train(was_training)
        return total

    # --- the loss

    def _logps(self, model, sequences) -> torch.Tensor:
        """Log-probabilities (N,) of (prompt, output) pairs, packed as the arguments say."""
        if self.args.packing == "padded":
            self.efficiency.count_padded(sequences)
            return padded_logps(model, sequences)
        packed = build_tree(sequences)
        self.efficiency.count(packed.input_ids.size, int(packed.num_tokens.sum()))
        shapes = self.shapes if torch.is_grad_enabled() else None
        return tree_logps(model, packed.to(self.args.device), self.args.score_chunk, self.attention, shapes)

    def _reference(self, batch: MicroBatch, column: int) -> torch.Tensor:
        return batch.references[:, column].to(self.args.device)

    def _forward(self, model, batch: MicroBatch, num_pairs, num_tokens, z) -> tuple[torch.Tensor, torch.Tensor]:
        """This micro-batch's share of the loss, and its statistics (directions, STATISTICS)."""
        examples, n = batch.examples, len(batch.examples)
        sequences = [(e.prompt, e.chosen) for e in examples]
        if "rejected" in self.loss.reads:
            sequences += [(e.prompt, e.rejected) for e in examples]
        logps = self._logps(model, sequences)
        if not batch.live:
            return 0.0 * logps.sum(), self.statistics.zeros()
        tokens = torch.tensor([len(output) for _, output in sequences], device=logps.device)
        given = {"chosen": logps[:n], "chosen_tokens": tokens[:n], "z": z}
        given |= {"rejected": logps[n:], "rejected_tokens": tokens[n:]}
        given |= {"num_pairs": num_pairs, "num_tokens": num_tokens}
        if self.loss.has_reference:
            given |= {"ref_chosen": self._reference(batch, 0), "ref_rejected": self._reference(batch, 1)}
        loss = self.loss(given, self.args.loss_parameters)
        return loss.float(), self.statistics.of(examples, given)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_loss = self.step_loss + loss  # FiniteLossCallback looks at it once a step
        return loss

    def compute_loss(self, model, inputs: MicroBatch, return_outputs=False, num_items_in_batch=None):
        self._check_first_batch(model)
        loss, statistics = self._forward(model, inputs, **num_items_in_batch)
        self.statistics.add(statistics)
        # DDP, FSDP and DeepSpeed average gradients over ranks; the shares of a global mean have to be summed
        return loss * self.args.world_size

    def check_model(self) -> None:
        """Prove the model on this run's longest triples before anything is computed with it (models/self_check.py).

        It decides the packing, on the first process for all. Weights that are shared out already (ZeRO-3 without NF4,
        FSDP's loading on the first rank) are proved through the wrapped model, before the first step.
        """
        if all(p.numel() and not p.is_meta for p in self.model.parameters()):
            if not self.args.load_in_4bit:
                self.model.to(self.args.device)  # where DeepSpeed and FSDP would bring it later
            self._choose_packing(self.model)

    def _choose_packing(self, model) -> None:
        examples = self.train_dataset.examples + (self.eval_dataset.examples if self.eval_dataset else [])
        triples = [(list(e.prompt), list(e.chosen), list(e.rejected)) for e in examples]
        sequences, made = self_check.at_hand(triples, self.model)
        say = print if self.is_world_process_zero() else lambda _: None
        decided = [None]
        if self.is_world_process_zero() or model is self.model_wrapped:
            options = (self.args.device, self.compute_loss_context_manager, say)
            packing = self_check.choose_scoring(model, sequences, self.args.packing, *options, made)
            decided = [(packing, self.model.config._attn_implementation)]
        self.args.packing, attention = broadcast_object_list(decided)[0]
        if attention == "eager":
            self_check.use_eager(model)
        self.chosen |= {"attention": attention, "packing": self.args.packing}
        self._model_is_proved = True

    def _check_first_batch(self, model) -> None:
        """Before the first step: the model is proved through its wrapper, if it could not be before."""
        if not self._model_is_proved:
            wanted = self.args.packing
            self._choose_packing(model)
            if self.loss.has_reference and self.args.packing != wanted:
                raise ValueError(f"the reference was scored with --packing {wanted}, which is wrong here; use padded")

    # --- evaluation, logging, saving

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Loss and statistics over the held-out triples, normalised like one optimizer step."""
        model = self.model_wrapped
        model.eval()
        batches = list(dataloader)
        normalisers = self._normalisers(batches)
        totals, loss = self.statistics.zeros(), torch.zeros((), dtype=torch.float64, device=self.args.device)
        for batch in tqdm(
            batches, desc=description, disable=self.args.disable_tqdm or not self.is_local_process_zero()
        ):
            share, statistics = self._forward(model, batch, **normalisers)
            loss, totals = loss + share, totals + statistics
        loss = self.accelerator.reduce(loss, "sum").item()
        if not math.isfinite(loss):
            raise ValueError(f"step {self.state.global_step}: the held-out loss is {loss}, and training stops")
        means = self.statistics.means(self.accelerator.reduce(totals, "sum"))
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in {"loss": loss, **means}.items()}
        if self.args.eval_translations:
            scores = translation_scores(self, self.eval_dataset.examples)
            metrics |= {f"{metric_key_prefix}_{key}": value for key, value in scores.items()}
        return EvalLoopOutput(None, None, metrics, len(dataloader.dataset))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training step, and not an evaluation or the end of training
            logs |= self.statistics.drain(self.accelerator) | self.efficiency.rates()
        super().log(logs, start_time)

    # --- resuming

    def check_resumable(self, checkpoint: Path) -> None:
        """`ValueError` where this run isn't the one that saved `checkpoint`, or can't go on as that chose to."""
        strategy.check_resumable(checkpoint, self.strategy)
        record = identity.read(checkpoint)
        identity.check_same(checkpoint, record["fixed"], self.fixed)
        if self.attention_ms:  # both could run here: what was measured at the start counts
            self.attention = record["chosen"].get("tree attention", self.attention)
            self.chosen["tree attention"] = self.attention
        for name, value in record["chosen"].items():
            if self.chosen.get(name, value) != value:
                raise ValueError(
                    f"{checkpoint} was trained with {name} {value}, which doesn't run here ({self.chosen[name]} does)"
                )
        self.changes = identity.changes_since(record, self.changeable, checkpoints.step_of(checkpoint))
        if self.args.load_best_model_at_end:
            self.best_before = checkpoints.best_so_far(checkpoint, Path(self.args.output_dir))

    def _init_training_state(self, max_steps, steps_an_epoch, epochs, resume_from_checkpoint, trial):
        begun, skipped = super()._init_training_state(max_steps, steps_an_epoch, epochs, resume_from_checkpoint, trial)
        if resume_from_checkpoint is not None:
            self.state.best_model_checkpoint = self.best_before and str(self.best_before)  # not where it once was
            if self.state.global_step > max_steps:
                raise ValueError(
                    f"{resume_from_checkpoint} has {self.state.global_step} steps behind it, over the {max_steps} "
                    "asked for (--max_steps, --num_train_epochs); start anew in another --output_dir"
                )
            if self.state.global_step == max_steps:
                begun, skipped = epochs, 0  # all steps are done
        return begun, skipped

    def _determine_best_metric(self, metrics, trial):
        key = f"eval_{self.args.metric_for_best_model}"
        if self.args.metric_for_best_model is not None and key not in metrics:
            logger.warning("step %d: %s is undefined here, so this is not the best step", self.state.global_step, key)
            return False
        return super()._determine_best_metric(metrics, trial)

    def _load_best_model(self):
        best = Path(self.state.best_model_checkpoint)
        if wrong := checkpoints.what_is_wrong(best):
            raise ValueError(
                f"{best} is the best checkpoint, and can't be loaded: {wrong}; "
                "--load_best_model_at_end false keeps the last one"
            )
        super()._load_best_model()
        self.kept_step = self.state.best_global_step

    def floating_point_ops(self, inputs) -> float:
        return self.efficiency.drain_flops()

    def save_model(self, output_dir=None, _internal_call=False):
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        # Trainer would save the whole base too, or nothing where FSDP's checkpoints are sharded
        trained = {name: p.full_tensor() for name, p in self.model.named_parameters() if p.requires_grad}
        return self._save(output_dir, trained)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return  # FSDP and ZeRO-3 bring all processes here
        folder = Path(output_dir or self.args.output_dir)
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # pickled arguments; they stand in run.json, as text
        config = json.loads((folder / "adapter_config.json").read_text())
        modules = config.get("target_modules")  # a set's, whose order is another in each process
        config |= {"target_modules": sorted(modules)} if isinstance(modules, list) else {}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))

    def _save_rng_state(self, output_dir):
        """What makes a resumed run the same to the bit: random states, and the shapes its attention was computed in."""
        super()._save_rng_state(output_dir)
        file = Path(output_dir) / f"attention_shapes_{self.args.process_index}.json"
        file.write_text(json.dumps(self.shapes.entries))

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        file = Path(checkpoint or "") / f"attention_shapes_{self.args.process_index}.json"
        if checkpoint is not None and file.exists():
            self.shapes.entries = [tuple(shape) for shape in json.loads(file.read_text())]

    def _save_checkpoint(self, model, trial):
        """Save, seal with a manifest, and only then delete older checkpoints."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not parameter.isfinite().all():
                raise ValueError(
                    f"step {self.state.global_step}: {name} isn't finite any more, so no checkpoint is saved and "
                    "training stops; the checkpoints before are kept. Lower --learning_rate"
                )
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        if self.args.should_save:
            ownership.claim(Path(self.args.output_dir), "train_pref", [f"checkpoint-{self.state.global_step}"])
        super()._save_checkpoint(model, trial)
        self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        efficiency = self.efficiency.summary(self.accelerator, self.state.total_flos)
        if self.args.should_save:
            output_dir = Path(self.args.output_dir)
            checkpoint = output_dir / f"checkpoint-{self.state.global_step}"
            (checkpoint / "efficiency.json").write_text(json.dumps(efficiency, indent=1))
            strategy.write(checkpoint, self.strategy)
            identity.write(checkpoint, self.fixed, self.changeable, self.chosen, self.changes)
            checkpoints.write_manifest(checkpoint)
            rotate_checkpoints(
                output_dir=str(output_dir),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    # --- the reference

    def set_references(self, identity: dict) -> str:
        """Give every example its log-probabilities under the model as it stands now; "computed" or "cached"."""
        datasets = [self.train_dataset, *([self.eval_dataset] if self.eval_dataset else [])]
        examples = [example for dataset in datasets for example in dataset.examples]
        with strategy.gathered(self.model):
            logps, outcome = reference.log_probabilities(self, examples, identity)
        for dataset in datasets:
            dataset.references, logps = logps[: len(dataset)], logps[len(dataset) :]
        return outcome
