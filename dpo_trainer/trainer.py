"""DPOTrainer: builds the parts of a run once, and hands each batch from one to the next. No arithmetic here.

    rows -> data/ -> PairBatch -> layout.py -> logprobs.py (policy), reference/ -> losses/ -> metrics.py
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from .batch import PairBatch, pair_weight
from .config import DPOConfig
from .data import DataCollatorForPreference, DataReport, check_tokenizer, prepare_dataset
from .layout import Layout
from .loading import apply_peft, disable_dropout, load_model, load_tokenizer
from .logprobs import METRIC_STATS, Scorer, base_model, router_loss_weight
from .losses import Objective
from .metrics import FallingChosenWarning, FiniteCheck, MetricSums, StepParts, per_pair, step_loss
from .model_card import write_model_card
from .reference import choose_reference

logger = logging.get_logger(__name__)

STATE_FILE = "dpo_state.json"
EvalDatasets = Dataset | IterableDataset | dict[str, Dataset | IterableDataset]


class DPOTrainer(Trainer):
    """Trains a causal language model on preference pairs with DPO or a loss of its family.

    Args:
        model: a hub id or local path, a `PreTrainedModel`, or a `PeftModel`.
        ref_model: the reference, as path or model. None: a frozen copy of `model`, or `model` without its adapter.
        args: the options; None takes every default.
        data_collator: None takes `DataCollatorForPreference` in the layout that the model allows. One of your own may
            return what other DPO libraries expect (see `PairBatch.from_completion_mask`).
        train_dataset: rows in any form that `data/schema.py` reads, or tokenized ones.
        eval_dataset: likewise, or a dict of them; `evaluate(dataset)` takes raw rows as well.
        processing_class: the tokenizer; None loads the model's.
        compute_metrics: receives an `EvalPrediction` whose `predictions` is a dict of arrays [pairs]: `rewards/chosen`,
            `rewards/rejected`, `logps/chosen`, `logps/rejected`, `ref_logps/chosen`, `ref_logps/rejected`; `label_ids`
            are the example ids. Logits never exist as a whole.
        callbacks, optimizers: as in `transformers.Trainer`.
        quantization_config: for a model given by name.
        peft_config: trains a new adapter; the reference is then the model below it.
        model_init: makes the model, for hyperparameter search; instead of `model`.

    Raises:
        ValueError: for everything that cannot work, at construction: it names the option and the way out.
    """

    _tag_names = ("dpo_trainer", "dpo")

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | None = None,
        ref_model: str | PreTrainedModel | PeftModel | None = None,
        args: DPOConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: EvalDatasets | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        model_init: Callable | None = None,
    ):
        args = DPOConfig() if args is None else args
        if (model is None) == (model_init is None):
            raise ValueError("Give DPOTrainer either a model or a model_init that makes one.")
        self.dpo_args, self.peft_config, self.quantization_config = args, peft_config, quantization_config
        self.given_ref_model = ref_model
        self.objective = Objective.from_config(args)
        self.model_init = model_init
        model = self._adopt(model) if model is not None else self.call_model_init()

        tokenizer = processing_class or load_tokenizer(
            base_model(model).config._name_or_path, trust_remote_code=args.trust_remote_code
        )
        self.pad_token_id = check_tokenizer(tokenizer)
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self.data_reports: dict[str, DataReport] = {}
        self._build_layout(model)
        if train_dataset is not None:
            train_dataset = self._prepared(train_dataset, "train")
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {name: self._prepared(rows, f"eval {name}") for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._prepared(eval_dataset, "eval")
        if data_collator is None:
            data_collator = DataCollatorForPreference(self.pad_token_id, self.layout.name, args.pad_to_multiple_of)

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class or tokenizer,
            compute_metrics=compute_metrics,
            callbacks=[_StopOnNonFinite(self), *(callbacks or [])],
            optimizers=optimizers,
        )
        self.model_init = model_init
        # The loss that compute_loss returns is already a mean over the whole optimizer step.
        self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = True
        has_router = self.objective.router_weight > 0
        self.metric_sums = {mode: MetricSums(aux_loss=has_router) for mode in ("train", "eval")}
        self.finite = FiniteCheck()
        self.falling_chosen = FallingChosenWarning(args.beta, has_reference=self.objective.needs_reference)
        self.num_tokens = 0
        self._logged_at = time.perf_counter()
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(list(self._tag_names))
        self._place_reference()

    # --- the parts, built once ---

    def _adopt(self, model: str | nn.Module) -> nn.Module:
        """Make `model` the policy: adapters, dropout, and the parts that read it."""
        args = self.dpo_args
        if isinstance(model, str):
            model = load_model(
                model,
                model_init_kwargs=args.model_init_kwargs,
                trust_remote_code=args.trust_remote_code,
                quantization_config=self.quantization_config,
            )
        elif args.model_init_kwargs or self.quantization_config is not None:
            raise ValueError(
                "model_init_kwargs and quantization_config are for a model given by name; this one is loaded already: "
                "pass them to its from_pretrained."
            )
        if self.peft_config is not None:
            quantized = bool(getattr(model, "is_quantized", False))
            model = apply_peft(
                model, self.peft_config, quantized=quantized, gradient_checkpointing=args.gradient_checkpointing
            )
        if args.model_adapter_name is not None:
            _activate_adapter(model, args.model_adapter_name)
        if args.disable_dropout:
            disable_dropout(model, lora=args.disable_lora_dropout)

        self.objective.router_weight = router_loss_weight(base_model(model), args.router_aux_loss_coef)
        self.scorer = Scorer(
            model, stats=METRIC_STATS | self.objective.token_stats, router_loss=self.objective.router_weight > 0
        )
        self.reference = choose_reference(
            model,
            self._reference_model(),
            self.scorer,
            needed=self.objective.needs_reference,
            reference_free=args.reference_free,
            fresh_adapter=self.peft_config is not None,
            ref_adapter_name=args.ref_adapter_name,
        )
        logger.warning(f"Reference: {self.reference.description}.")
        return model

    def _reference_model(self) -> nn.Module | None:
        given, args = self.given_ref_model, self.dpo_args
        if isinstance(given, str):
            given = load_model(
                given,
                model_init_kwargs=args.model_init_kwargs,
                trust_remote_code=args.trust_remote_code,
                quantization_config=self.quantization_config,
            )
        if given is not None and args.disable_dropout:
            disable_dropout(given, lora=True)
        return given

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Hyperparameter search makes a new model for each trial: the parts that read the model are made anew too."""
        rebuilt = hasattr(self, "layout")
        model = self._adopt(super().call_model_init(trial))
        if rebuilt:
            self._build_layout(model)
            self._place_reference()
        return model

    def _build_layout(self, model: nn.Module) -> None:
        args = self.dpo_args
        self.layout = Layout(
            args.layout,
            [(self.scorer, model), *((self.reference.scorer, own) for own in self.reference.models)],
            self.pad_token_id,
            autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
            reason="the noise of --neftune_noise_alpha depends on the length of a row" if args.neftune_noise_alpha else None,
        )

    def _place_reference(self) -> None:
        """A reference of its own goes where the policy is, under the same mixed precision, and is never wrapped for training."""
        for model in self.reference.models:
            if self.is_fsdp_enabled or self.accelerator.state.deepspeed_plugin is not None:
                _refuse_sharding(self.accelerator)
            self.accelerator.prepare_model(model.to(self.args.device), evaluation_mode=True)
            # evaluate() before train() prepares the policy only while accelerate knows no model yet.
            self.accelerator._models.remove(model)

    def _prepared(self, dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
        args = self.dpo_args
        with args.main_process_first(desc=f"preparing the {name} data"):
            dataset, report = prepare_dataset(
                dataset,
                self.tokenizer,
                max_length=args.max_length,
                max_prompt_length=args.max_prompt_length,
                max_completion_length=args.max_completion_length,
                truncation_mode=args.truncation_mode,
                useless_pairs=args.useless_pairs,
                num_proc=args.dataset_num_proc,
                name=name,
                progress=not args.disable_tqdm,
            )
        self.data_reports[name] = report
        return dataset

    # --- the data, as Trainer asks for it ---

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["example_id", "prompt_ids", "chosen_ids", "rejected_ids", "weight", "length"]

    def get_eval_dataloader(self, eval_dataset: Any = None):
        if isinstance(eval_dataset, Dataset | IterableDataset):
            eval_dataset = self._prepared(eval_dataset, "eval")
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any):
        return super().get_test_dataloader(self._prepared(test_dataset, "test"))

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """The weight of all pairs of the optimizer step, on all ranks: what the sum of their losses is divided by."""
        if batch_samples:
            self._unweigh_fillers(batch_samples[-1])
        return self._sum_over_ranks(sum((pair_weight(batch).sum() for batch in batch_samples), torch.zeros((), device=device)))

    # --- the step ---

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        with self.scorer.step():  # holds the attention of flat rows in place until backward is over
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ):
        """One line per stage; the comment is the module to read next."""
        batch = self.layout.settle(model, PairBatch.from_inputs(inputs))  # batch.py, layout.py
        policy = self.scorer(model, batch)  # logprobs.py
        reference = self.reference.logps(model, batch)  # reference/
        losses = self.objective(policy, reference, training=model.training, weight=batch.weight).total  # losses/  [N]
        parts = StepParts(batch=batch, policy=policy, reference=reference, losses=losses, beta=self.dpo_args.beta)
        self.metric_sums["train" if model.training else "eval"].add(parts)  # metrics.py
        if model.training:
            self.finite.watch(batch.example_ids, losses)
        loss = step_loss(losses, batch.weight, num_items_in_batch, self.accelerator.num_processes)
        return (loss, per_pair(parts)) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        self._unweigh_fillers(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return (loss, None, None) if prediction_loss_only else (loss, outputs, outputs.pop("example_ids"))

    # --- numbers ---

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        began = time.perf_counter()
        self.metric_sums["eval"].clear()
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        means, _ = self.metric_sums["eval"].reduce(self._sum_over_ranks, self.args.device)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        self._logged_at += time.perf_counter() - began  # tokens_per_second is about training
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a line of training; evaluation brings its own means
            means, tokens = self.metric_sums["train"].reduce(self._sum_over_ranks, self.args.device)
            now = time.perf_counter()
            self.num_tokens += tokens
            logs = {**logs, **means, "num_tokens": self.num_tokens, "tokens_per_second": tokens / (now - self._logged_at)}
            self._logged_at = now
            self.falling_chosen.look(means, self.state.global_step)
        super().log(logs, start_time)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    def _unweigh_fillers(self, inputs: dict[str, Any]) -> None:
        """Rows that accelerate repeats to fill the last batch of all ranks get weight 0.

        The last round of batches holds `remainder` rows that are not repeats, in the order of the ranks.
        """
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return
        weight = pair_weight(inputs)
        before = self.accelerator.process_index * self.accelerator.gradient_state.active_dataloader.batch_size
        real = torch.arange(len(weight), device=weight.device) + before < state.remainder
        inputs["weight"] = weight * real

    # --- checkpoints and cards ---

    def train(self, *args, **kwargs):
        self._logged_at = time.perf_counter()
        return super().train(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = {"num_tokens": self.num_tokens, "objective": self.objective.state_dict()}
            Path(output_dir, STATE_FILE).write_text(json.dumps(state))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint, STATE_FILE)
        if not path.exists():
            raise ValueError(f"{checkpoint} has no {STATE_FILE}: it was not written by DPOTrainer, or with save_only_model.")
        state = json.loads(path.read_text())
        self.num_tokens = state["num_tokens"]
        self.objective.load_state_dict(state["objective"])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            write_model_card(self, Path(output_dir or self.args.output_dir))

    def create_model_card(self, *args, **kwargs) -> None:
        """Called by `push_to_hub`: our card, with the loss, the data and the metrics."""
        if self.is_world_process_zero():
            write_model_card(self, Path(self.args.output_dir))


class _StopOnNonFinite(TrainerCallback):
    """Looks before the weights are touched."""

    def __init__(self, trainer: DPOTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.trainer.finite.check(self.trainer._sum_over_ranks, state.global_step + 1)


def _activate_adapter(model: nn.Module, name: str) -> None:
    adapters = list(getattr(model, "peft_config", {}))
    if name not in adapters:
        has = f"which has {', '.join(adapters)}" if adapters else "which has none: pass a PeftModel or a peft_config"
        raise ValueError(f"--model_adapter_name {name!r} is not an adapter of the model, {has}.")
    model.set_adapter(name)


def _refuse_sharding(accelerator: Any) -> None:
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage < 3:
        return
    raise ValueError(
        "A reference model of its own cannot be sharded by FSDP or ZeRO-3 in this version. Train an adapter (peft_config: "
        "the reference is then the same sharded model with its adapter off), pick a loss without a reference, or use DDP, "
        "ZeRO-1 or ZeRO-2."
    )
