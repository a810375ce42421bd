"""OnlineDPOTrainer: prompts -> sampled completions -> feedback -> pairs; from there on it is `DPOTrainer`.

prompts.py -> rollout.py: sampling/, feedback/ (rewards, judges), pairing.py -> the collator, losses and metrics of DPO
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import logging

from ..data.batches.padding_rows import mask_padding_rows
from ..data.files.dataset_inputs import Rows
from ..data.stream import PADDING_ROW_ID
from ..data.tokens.dates import dated
from ..data.tokens.tokenize import tokenize_prompts
from ..models.positions import table_of_positions, window_of
from ..models.vocabulary import refuse_smaller_reference
from ..trainer import DPOTrainer
from ..training.datasets import needs_of_models
from ..training.out_of_memory import MemoryAdvice
from ..types import Text, micro_batches
from .choose import check_sampler, choose_feedback, choose_generator
from .config import OnlineDPOConfig
from .feedback.protocol import Feedback, FeedbackUnavailable
from .metrics import ONLINE_METRICS, objective_means
from .prompts import PromptData, collate_prompts
from .rollout import Rollout
from .rounds import Batches, Rounds
from .samples import Completion, Sampled
from .sampling.generate import Generator

logger = logging.get_logger(__name__)


class OnlineDPOTrainer(DPOTrainer):
    """Trains on answers of the policy itself, compared by rewards or a judge (Guo et al. 2024, arXiv:2402.04792).

    Args:
        model, ref_model, data_collator, processing_class, peft_config, compute_metrics, callbacks, optimizers,
        quantization_config: as in `DPOTrainer`.
        reward_funcs: a reward or several: functions f(prompts, completions, **columns) -> list[float | None], reward models
            (a path, a sequence classifier with one label). Their weighted sum ranks the completions.
        judge: instead of rewards: a judge, or the name of one.
        train_dataset, eval_dataset: rows with a `prompt`, a string or messages; other columns go to the rewards.
        reward_processing_classes: the tokenizers of reward models, one for each reward (None for functions).
        reward_model, reward_processing_class: other names for `reward_funcs` and `reward_processing_classes`.
        generator: where completions come from; None: `model.generate`.

    `evaluate` samples as well: `eval_loss` is that of the pairs it makes, `eval_win_rate` says how often an answer is
    better than the reference's.

    Raises:
        ValueError: for everything that cannot work, at construction: it names the option and the way out.
    """

    _tag_names = ("dpo_trainer", "online-dpo")
    metric_table = ONLINE_METRICS
    args: OnlineDPOConfig
    data: PromptData

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | None = None,
        ref_model: str | PreTrainedModel | PeftModel | None = None,
        reward_funcs: Any = None,
        judge: Any = None,
        args: OnlineDPOConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        peft_config: PeftConfig | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        quantization_config: Any = None,
        *,
        reward_model: Any = None,
        reward_processing_class: Any = None,
        generator: Generator | None = None,
    ):
        args = OnlineDPOConfig() if args is None else args
        check_sampler(args, ref_model, generator)
        self.feedback: Feedback = choose_feedback(
            args,
            judge=judge,
            rewards=_one_of("reward_funcs", reward_funcs, "reward_model", reward_model),
            tokenizers=_one_of(
                "reward_processing_classes",
                reward_processing_classes,
                "reward_processing_class",
                reward_processing_class,
            ),
        )
        self.given_generator = generator
        args.remove_unused_columns = False  # they belong to the rewards
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self.trained_on = f"pairs of its own answers, compared by {_who(self.feedback)},"
        if hasattr(self.feedback, "to"):  # models among them
            self.feedback.to(self.args.device)
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "bind"):
                callback.bind(self)

    # --- the parts, built once ---

    def _make_data(self, model: nn.Module) -> PromptData:
        longest = (window_of(model), table_of_positions(model), self.args.max_length)
        window = min((tokens for tokens in longest if tokens is not None), default=None)
        self.generator: Generator = self.given_generator or choose_generator(
            self.args,
            self.processing_class,
            model,
            pad_token_id=self.pad_token_id,
            window=window,
            wait=lambda: self.accelerator.wait_for_everyone(),
        )
        refuse_smaller_reference(model, self.ref_model, self.processing_class)
        tokenizer = dated(self.processing_class, self.template_date)
        needs = needs_of_models(self.args, model, self.reference, self.loss_objective)
        return PromptData(self.args, tokenizer, window, vocabulary_size=needs.vocabulary_size)

    def _memory_advice(self) -> MemoryAdvice:
        return replace(super()._memory_advice(), second_model=False)  # its log-probs cannot be computed ahead

    def _check_best_metric(self) -> None:
        """Which metrics there are depends on the answers, and on who compares them."""

    def _collator(self) -> Callable:
        self.pair_collator = super()._collator()
        return collate_prompts

    def start_counting(self) -> None:
        super().start_counting()
        self.rollout = Rollout(self.args, self.feedback, self.sum_over_ranks)
        self.rounds = Rounds(self.args.generate_every)
        self.last_samples: list[tuple[Sampled, list[float | None]]] = []
        self._answers: dict[tuple[int, ...], Completion] = {}  # of a reference that stays, by prompt

    # --- sampling and feedback ---

    def train(self, *args, **kwargs):
        """See `DurableTrainer.train`."""
        self.rounds = Rounds(self.args.generate_every)  # what an earlier run left over belongs to its epoch
        self._set_beta_of_epoch(0.0)
        self.rollout.restart_clock()
        return super().train(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """The batches of an optimizer step, as pairs: Trainer asks for them before its first forward."""
        self._set_beta_of_epoch(self.state.epoch or 0.0)
        rows = self.rounds.next(
            lambda: [self._rows(batch, self._train_batch_size) for batch in islice(epoch_iterator, num_batches)],
            self._sample_steps,
            self.state.global_step,
        )
        if rows:
            self.rollout.tally["train"].add("staleness", [self.state.global_step - self.rounds.sampled_at])
        batches = [self._prepare_inputs(self.pair_collator(batch)) for batch in rows]
        return batches, self._get_num_items_in_batch(batches, device)

    def _rows(self, batch: dict[str, Any], rows_per_rank: int) -> list[dict[str, Any]]:
        """Of a batch of prompts. Those that only fill it are named so at once: accelerate knows them while the batch is at hand,
        and a round of sampling looks ahead."""
        rows = batch["prompts"].rows
        places = {
            "example_ids": batch["example_ids"],
            "weight": torch.ones(len(rows)),
            "row": torch.arange(len(rows)),
        }
        how: Any = {"rows_per_rank": rows_per_rank, "drop_last": self.args.dataloader_drop_last}
        real = mask_padding_rows(places, self.accelerator, **how).tolist()
        return [
            row if is_real else row | {"example_id": PADDING_ROW_ID} for row, is_real in zip(rows, real, strict=True)
        ]

    def _mask_padding_rows(self, inputs: dict[str, Any], rows_per_rank: int) -> list[Tensor]:
        """They weigh nothing since they were drawn."""
        return [part["example_ids"] != PADDING_ROW_ID for part in micro_batches(inputs)]

    @property
    def beta(self) -> float:
        """Of the epoch at hand."""
        return self.args.beta  # type: ignore[return-value]  # a number, once the config is made

    def _set_beta_of_epoch(self, epoch: float) -> None:
        beta = self.args.beta_of_epoch(epoch)
        if beta != self.beta:
            self.args.beta = beta  # type: ignore[assignment]
            self.loss_objective.set_beta(beta)

    def _sample_steps(self, steps: list[Batches]) -> list[Batches]:
        """Prompts of several steps -> rows of pairs in the same places, by one generation and one round of feedback."""
        rows = [row for step in steps for batch in step for row in batch]
        seed = _seed(self.args.seed, self.args.process_index, self.state.global_step)
        try:
            samples = self.rollout.sampled(self.generator, self.model_wrapped, rows, seed)
            scores = self.rollout.scored(samples)
        except FeedbackUnavailable as error:
            raise self._saved_for_later(error) from error
        self.last_samples = list(zip(samples, scores, strict=True))
        pairs = iter(self.rollout.paired(samples, scores, "train"))
        return [[[next(pairs) for _ in batch] for batch in step] for step in steps]

    def _saved_for_later(self, problem: FeedbackUnavailable) -> FeedbackUnavailable:
        """On all ranks: a checkpoint of the last step, if one was made, and the error that names it."""
        step = self.state.global_step
        if not step:
            return problem
        self._save_checkpoint(self.model_wrapped, trial=None)
        return FeedbackUnavailable(
            f"{problem} The run is saved at step {step}: start it again with --resume_from_checkpoint auto."
        )

    # --- evaluation ---

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys=None):
        """Pairs as in training, and each first answer against the reference's."""
        rows = self._rows(inputs, self.args.eval_batch_size)
        # The same at every evaluation: what differs is the model.
        seed = _seed(self.args.seed, *(row["example_id"] for row in rows))
        samples = self.rollout.sampled(self.generator, self.model_wrapped, rows, seed)
        pairs = self.rollout.paired(samples, self.rollout.scored(samples), "eval")
        answers = self._reference_answers([sampled.prompt_ids for sampled in samples], seed)
        if answers is not None:
            self.rollout.compared(samples, answers)
        return super().prediction_step(model, self.pair_collator(pairs), prediction_loss_only, ignore_keys)

    def _reference_answers(self, prompts: list[list[int]], seed: int) -> list[Completion] | None:
        """One for each prompt; of a reference that stays they are sampled once. None where there is no reference."""
        known = {} if self.reference.moving else self._answers
        new = [ids for ids in prompts if tuple(ids) not in known]
        with self.reference.in_place(self.model_wrapped) as model:
            if model is None:
                return None
            ask = partial(self.generator, model, new, 1, decoding=self.args.decoding, seed=seed)
            sampled = self.rollout.asked(lambda: ask() if new else [])
            known.update({tuple(ids): answer for ids, (answer,) in zip(new, sampled, strict=True)})
        return [known[tuple(ids)] for ids in prompts]

    def sample_answers(
        self, prompts: Sequence[Text], *, reference: bool = False, max_new_tokens: int | None = None
    ) -> list[str]:
        """The likeliest answer to each prompt, by the policy as it is now or by the reference, as text.

        Raises:
            ValueError: for the answers of a reference that is no model.
        """
        where = [f"Prompt {place}" for place in range(len(prompts))]
        ids = tokenize_prompts(prompts, self.data.tokenizer, where)
        ask = partial(self.generator, decoding=self.args.decoding.greedy(max_new_tokens), seed=self.args.seed)
        if not reference:
            return [answer.text for (answer,) in ask(self.model_wrapped, ids, 1)]
        with self.reference.in_place(self.model_wrapped) as model:
            if model is None:
                raise ValueError("This run has no reference model to sample answers from: give reference answers.")
            return [answer.text for (answer,) in ask(model, ids, 1)]

    # --- numbers ---

    def evaluation_loop(self, *args, **kwargs):
        self.rollout.tally["eval"].clear()
        return super().evaluation_loop(*args, **kwargs)

    def with_more_metrics(self, of_pairs: dict[str, float], split: str) -> dict[str, float]:
        found = objective_means(of_pairs | self.rollout.numbers(split), self.beta)
        return found | {"beta": self.beta} if split == "train" else found

    # --- checkpoints ---

    def run_identity(self) -> dict[str, Any]:
        args = self.args
        sampling = vars(args.decoding) | {
            name: getattr(args, name)
            for name in ("num_generations", "pair_selection", "generate_every", "stop_tokens")
        }
        feedback = [self.feedback.name, args.judge_kwargs, args.missing_eos_penalty]
        return super().run_identity() | {
            "sampling": {f"--{name}": value for name, value in sampling.items()},
            "feedback": [*feedback, args.reward_weights, args.reward_scale, args.betas],
        }

    def run_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        state, tensors = super().run_state()
        rounds = gather_object([self.rounds.state()]) if self.args.world_size > 1 else [self.rounds.state()]
        tally = self.rollout.tally["train"].table(self.sum_over_ranks, self.args.device)
        return {**state, "rounds": rounds, "tally": tally, "feedback_counts": self.rollout.counts()}, tensors

    def load_run_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().load_run_state(state, tensors)
        if len(state["rounds"]) == self.args.world_size:
            self.rounds.load(state["rounds"][self.args.process_index])
        elif any(of_rank["waiting"] for of_rank in state["rounds"]):
            logger.warning(
                "The number of processes has changed: completions that were not trained on yet are sampled again."
            )
        # The sum over ranks is what is shown, so that one rank can go on with all. Checkpoints of earlier releases have none.
        for name, total in state.get("feedback_counts", {}).items():
            self.feedback.counts[name] = total if self.is_world_process_zero() else 0.0
        if self.is_world_process_zero():
            self.rollout.tally["train"].load(state["tally"])


def _one_of(name: str, value: Any, alias: str, other: Any) -> Any:
    if value is not None and other is not None:
        raise ValueError(f"{alias} is another name for {name}: give one of the two.")
    return other if value is None else value


def _who(feedback: Feedback) -> str:
    rewards = ", ".join(getattr(feedback, "last", ()))
    return f"rewards ({rewards})" if rewards else f"the judge {feedback.name}"


def _seed(*parts: int) -> int:
    """63 bits, as good as unrelated for parts that differ in anything."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1
