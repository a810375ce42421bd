"""Which layout a model gets: by its configuration, then by a check that a cheating model does not pass."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import oracles
import pytest
import tiny
import torch
import transformers
from peft import PromptTuningConfig, get_peft_model
from test_architectures import PADDED, SIZES
from torch import Tensor, nn
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from dpo_trainer.data.batches import collate as collate_module
from dpo_trainer.data.batches.collate import flat_inputs, padded_inputs
from dpo_trainer.scoring import layout as layout_module
from dpo_trainer.scoring.attention import NAME, why_not_flat
from dpo_trainer.scoring.layout import CHECK_TOKENS, TOLERANCE, Layout, reason_for_padding
from dpo_trainer.scoring.logprobs import Scorer
from dpo_trainer.types import PairBatch

pytestmark = pytest.mark.filterwarnings(
    "ignore:`(gradient_checkpointing_enable|is_gradient_checkpointing)` is deprecated"
)

PAIRS = oracles.random_pairs([(5, 3, 6), (2, 4, 3), (9, 4, 2)])
RANKED = oracles.random_pairs([(5, 3, 6, 4), (2, 4, 3), (3, 4, 2, 3, 5)])
RANKED[0] = dataclasses.replace(RANKED[0], unscored=((1, 1, 3), (2, 0, 2)))


def batch_of(layout: str = "flat", pairs: Any = PAIRS) -> PairBatch:
    return PairBatch.from_inputs({"flat": flat_inputs, "padded": padded_inputs}[layout](pairs, 0))


def choose(model: nn.Module, requested: str = "auto", **options: Any) -> tuple[Layout, Scorer]:
    scorer = Scorer(model)
    return Layout(requested, [(scorer, model)], pad_token_id=0, **options), scorer


@torch.no_grad()
def assert_scores_right(scorer: Scorer, model: nn.Module, batch: PairBatch, pairs: Any = PAIRS) -> None:
    logps = scorer(model, batch)
    got = torch.stack([logps.chosen, logps.rejected], dim=1).flatten().double()
    torch.testing.assert_close(got, oracles.sums(model, pairs), rtol=0, atol=oracles.NATS)


# --- models that cheat ---


class IgnoresSegments(LlamaForCausalLM):
    """Runs its own attention over whatever row it gets, as a model with fused kernels of its own might."""

    def forward(self, *args, segments=None, **kwargs):
        before = self.config._attn_implementation_internal
        self.config._attn_implementation_internal = "sdpa"
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.config._attn_implementation_internal = before


class DropsSegments(LlamaForCausalLM):
    """Keeps what it does not know to itself, as Nemotron does."""

    def forward(self, *args, segments=None, **kwargs):
        return super().forward(*args, **kwargs)


class WrongGradients(LlamaForCausalLM):
    """The right log-probs for a flat row, with a gradient that misses half of the way."""

    def forward(self, input_ids=None, segments=None, **kwargs):
        if segments is None:
            return super().forward(input_ids=input_ids, **kwargs)
        embedded = self.get_input_embeddings()(input_ids)
        half = (embedded + embedded.detach()) / 2
        return super().forward(inputs_embeds=half, segments=segments, **kwargs)


class DoublesLogits(LlamaForCausalLM):
    """Does something to its logits, after the head, that nothing in its configuration tells."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out


class HeadFails(LlamaForCausalLM):
    """Expects logits of the whole vocabulary: log-probs instead of them are an error."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        assert out.logits.shape[-1] == self.config.vocab_size, "not my logits"
        return out


def cheat(kind: type[LlamaForCausalLM]) -> LlamaForCausalLM:
    model = kind(tiny.llama().config)
    model.load_state_dict(tiny.llama().state_dict())
    return model.eval()


ROW_CHEATS = {
    IgnoresSegments: "log-probs differ by",
    DropsSegments: "SegmentsLost",
    WrongGradients: "gradients differ by",
}


@pytest.mark.parametrize("kind", ROW_CHEATS)
def test_a_model_that_gets_flat_rows_wrong_falls_back_with_its_name(kind, caplog):
    model = cheat(kind)
    layout, scorer = choose(model)
    assert layout.name == "flat", "nothing in its configuration tells"
    batch = layout.settle(model, batch_of())
    assert layout.name == "padded"
    assert not batch.is_flat
    assert scorer.through_head
    assert f"{kind.__name__} is trained with padded rows. Checked on two short rows: flat: " in caplog.text
    assert ROW_CHEATS[kind] in caplog.text
    assert_scores_right(scorer, model, batch)


def test_after_a_fall_back_batches_are_collated_in_padded_rows(tmp_path, monkeypatch):
    """Only those that were made before the verdict, the first two, are collated twice."""
    came_flat: list[bool] = []
    inner = layout_module.as_padded
    monkeypatch.setattr(layout_module, "as_padded", lambda b, *rest: came_flat.append(b.is_flat) or inner(b, *rest))
    fell_back = tiny.trained(tmp_path, model=cheat(IgnoresSegments), max_steps=4)
    assert fell_back.data_collator.layout == fell_back.layout.name == "padded"
    assert came_flat == [True, True, False, False]
    padded = tiny.trained(tmp_path, model=cheat(IgnoresSegments), max_steps=4, layout="padded")
    tiny.assert_same_weights(tiny.weights(fell_back.model), tiny.weights(padded.model), 1e-6)


@pytest.mark.parametrize("kind", [*ROW_CHEATS, DoublesLogits])
def test_flat_that_was_asked_for_and_cannot_be_stops_the_run(kind):
    model = cheat(kind)
    layout, _ = choose(model, "flat")
    with pytest.raises(
        ValueError, match=f"--layout flat does not work with {kind.__name__}: .*Use --layout auto or padded"
    ):
        layout.settle(model, batch_of())


@pytest.mark.parametrize("requested", ["auto", "padded"])
@pytest.mark.parametrize("kind", [DoublesLogits, HeadFails])
def test_unknown_changes_of_logits_are_scored_from_the_logits(kind, requested, caplog):
    model = cheat(kind)
    layout, scorer = choose(model, requested)
    batch = layout.settle(model, batch_of("flat" if requested == "auto" else "padded"))
    assert layout.name == "padded"
    assert not scorer.through_head
    assert f"{kind.__name__} is trained with padded rows, with all logits of a batch in memory" in caplog.text
    assert_scores_right(scorer, model, batch)


def test_scales_that_a_real_architecture_applies_and_we_do_not_know(caplog):
    """HyperCLOVAX multiplies its logits by `logits_scaling`."""
    torch.manual_seed(0)
    config = transformers.HyperCLOVAXConfig(**SIZES, head_dim=8, logits_scaling=2.0)
    model = transformers.HyperCLOVAXForCausalLM(config).eval()
    layout, scorer = choose(model)
    batch = layout.settle(model, batch_of())
    assert (layout.name, scorer.through_head) == ("padded", False)
    assert_scores_right(scorer, model, batch)


def test_the_check_looks_past_completions_of_one_token():
    """Those are predicted from their prompts alone: a wrong mask among them would pass unseen."""
    for lengths in ([(3, 1, 1), (4, 1, 1), (6, 5, 5)], [(3, 4, 1), (4, 4, 1)], [(1, 1, 1)]):
        model = cheat(IgnoresSegments)
        layout, _ = choose(model)
        layout.settle(model, batch_of(pairs=oracles.random_pairs(lengths)))
        assert layout.name == "padded", lengths


def sees_also(number: int, row: int, what: str) -> Any:
    """`flat_inputs` with a wrong mask: completion `number` of row `row` sees more than its prompt."""

    def wrong(rows: Any, pad: int, multiple: int | None = None) -> dict[str, Any]:
        inputs = flat_inputs(rows, pad, multiple)
        segments = inputs["segments"]
        at = sum(len(r.completions) for r in rows[:row]) + number
        if at < len(segments.length):
            starts, lengths = list(segments.prefix_start), list(segments.prefix_length)
            if what == "the row before":
                starts[at], lengths[at] = 0, segments.length[0]
            else:
                lengths[at] += len(rows[row].chosen_ids)
            inputs["segments"] = dataclasses.replace(
                segments, prefix_start=tuple(starts), prefix_length=tuple(lengths)
            )
        return inputs

    return wrong


def test_a_batch_of_one_row_is_checked_against_a_neighbour(monkeypatch):
    """Micro-batches of 1 are common, evaluation batches are larger: rows that see each other must not pass."""
    monkeypatch.setattr(collate_module, "flat_inputs", sees_also(0, 1, "the row before"))
    model = tiny.llama()
    layout, _ = choose(model)
    layout.settle(model, batch_of(pairs=PAIRS[:1]))
    assert layout.name == "padded"


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("rows", [PAIRS, RANKED], ids=["rows of two", "ranked rows"])
def test_a_wrong_mask_of_any_completion_is_seen(rows, number, monkeypatch):
    """Of a third one too, whether or not the first batch has any: a later one may."""
    monkeypatch.setattr(collate_module, "flat_inputs", sees_also(number, 1, "the first completion"))
    model = tiny.llama()
    layout, _ = choose(model)
    layout.settle(model, batch_of(pairs=rows))
    assert layout.name == "padded"


def test_ranked_rows_fall_back_to_padded_ones():
    """The rows of the flat batch are collated again, unscored tokens and all: the same numbers as the oracle's."""
    model = cheat(IgnoresSegments)
    layout, scorer = choose(model)
    batch = layout.settle(model, batch_of(pairs=RANKED))
    assert not batch.is_flat
    assert batch.input_ids.shape[0] == 3 + 2 + 4
    assert len(batch.chosen) == 3 + 1 + 6
    assert_scores_right(scorer, model, batch, RANKED)


def test_an_honest_model_keeps_its_flat_rows_when_they_are_ranked():
    model = tiny.llama()
    layout, scorer = choose(model)
    batch = batch_of(pairs=RANKED)
    assert layout.settle(model, batch) is batch
    assert_scores_right(scorer, model, batch, RANKED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_honest_model_keeps_its_flat_rows(dtype, caplog):
    """Also where rounding differs between the layouts by more than float32 would allow."""
    model = tiny.llama().to(dtype)
    layout, scorer = choose(model)
    batch = batch_of()
    assert layout.settle(model, batch) is batch
    assert (layout.name, scorer.through_head) == ("flat", True)
    assert "is trained with padded rows" not in caplog.text


def test_tolerances_separate_honest_from_cheating(monkeypatch):
    """float32: an honest model stays 100 times below the limit, the cheats above are 10 times beyond it."""
    limit = TOLERANCE[torch.float32]
    monkeypatch.setitem(TOLERANCE, torch.float32, limit / 100)
    model = tiny.llama()
    layout, _ = choose(model)
    layout.settle(model, batch_of())
    assert layout.name == "flat"
    monkeypatch.setitem(TOLERANCE, torch.float32, limit * 10)
    for kind in (IgnoresSegments, WrongGradients, DoublesLogits):
        model = cheat(kind)
        layout, _ = choose(model)
        layout.settle(model, batch_of())
        assert layout.name == "padded", kind


def test_nan_is_a_difference():
    """A comparison with NaN is false either way round."""

    class NotANumber(LlamaForCausalLM):
        def forward(self, *args, segments=None, **kwargs):
            out = super().forward(*args, segments=segments, **kwargs) if segments else super().forward(*args, **kwargs)
            out.logits = out.logits * (float("nan") if segments else 1.0)
            return out

    model = cheat(NotANumber)
    layout, scorer = choose(model)
    layout.settle(model, batch_of())
    assert (layout.name, scorer.through_head) == ("padded", True)


def test_out_of_memory_is_not_taken_for_a_verdict(monkeypatch):
    model = cheat(LlamaForCausalLM)
    layout, _ = choose(model)
    original, calls = layout_module._measure, []

    def measure(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > 1:
            raise torch.OutOfMemoryError
        return original(*args)

    monkeypatch.setattr(layout_module, "_measure", measure)
    with pytest.raises(torch.OutOfMemoryError):
        layout.settle(model, batch_of())


# --- what the check leaves behind: nothing ---


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "random": torch.get_rng_state().tolist(),
        "modes": {name: module.training for name, module in model.named_modules()},
        "gradients": {name: None if p.grad is None else p.grad.tolist() for name, p in model.named_parameters()},
        "weights": {name: p.tolist() for name, p in model.state_dict().items()},
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "head": model.get_output_embeddings().__dict__.get("forward"),
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
    }


@pytest.mark.parametrize("inside", ["nothing", "no_grad", "step"])
@pytest.mark.parametrize("kind", [LlamaForCausalLM, IgnoresSegments, DropsSegments, DoublesLogits])
def test_the_check_leaves_no_trace(kind, inside):
    """Neither a check that passes nor one that fails, in training or evaluation; with dropout, frozen parts and gradients."""
    model = cheat(kind)
    model.config.attention_dropout = 0.5
    model.train()
    model.lm_head.eval()
    model.model.layers[0].requires_grad_(False)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    layout, scorer = choose(model)
    before = state_of(model)
    with {"nothing": torch.enable_grad(), "no_grad": torch.no_grad(), "step": scorer.step()}[inside]:
        layout.settle(model, batch_of())
        assert state_of(model) == before
    assert state_of(model) == before


def test_the_check_works_with_gradient_checkpointing_and_frozen_weights():
    """LoRA on frozen weights: the gradient of the check enters at the embeddings, not at the weights."""
    model = get_peft_model(tiny.llama(), tiny.lora()).train()
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    layout, _ = choose(model)
    layout.settle(model, batch_of())
    assert layout.name == "flat"


# --- settling ---


def test_only_the_first_batch_is_checked(monkeypatch):
    model = cheat(IgnoresSegments)
    layout, scorer = choose(model)
    checked: list[Any] = []
    verify = Layout.verify
    monkeypatch.setattr(Layout, "verify", lambda *args: (checked.append(args), verify(*args)))
    for _ in range(3):
        batch = layout.settle(model, batch_of())
        assert not batch.is_flat, "what comes flat later is collated again as well"
        assert_scores_right(scorer, model, batch)
    assert len(checked) == 1
    assert layout.settled


def test_a_padded_batch_under_the_flat_layout_stays_padded():
    """A collator of the user's own: its rows are scored as they come."""
    model = tiny.llama()
    layout, scorer = choose(model)
    batch = batch_of("padded")
    assert layout.settle(model, batch) is batch
    assert_scores_right(scorer, model, batch)


@pytest.mark.parametrize("settled", [False, True])
def test_a_flat_batch_without_its_rows_is_refused_with_a_way_out(settled):
    """Where the check needs them, and after a fall back to padded rows."""
    layout, _ = choose(tiny.llama(), "padded" if settled else "auto")
    layout.settled = settled
    with pytest.raises(ValueError, match=r"batch lacks tokenized_rows.*Use DataCollatorForPreference"):
        layout.settle(tiny.llama(), dataclasses.replace(batch_of(), tokenized_rows=None))


def test_a_reference_that_cannot_take_flat_rows_decides_for_both():
    policy, reference = tiny.llama(), cheat(IgnoresSegments)
    scorers = [Scorer(policy), Scorer(reference)]
    layout = Layout("auto", list(zip(scorers, (policy, reference), strict=True)), pad_token_id=0)
    assert not layout.settle(policy, batch_of()).is_flat

    layout = Layout("auto", [(scorers[0], policy), (Scorer(PADDED["lfm2"].build()), PADDED["lfm2"].build())], 0)
    assert layout.name == "padded"


def test_the_check_sees_the_model_that_is_trained():
    """`policy` may be wrapped or replaced after construction: it is the one that is measured."""
    layout, scorer = choose(tiny.llama())
    layout.settle(cheat(IgnoresSegments), batch_of())
    assert layout.name == "padded"
    assert scorer.through_head


def test_the_check_uses_few_tokens():
    """Long rows are cut: the end of the prompt, the beginnings of three completions."""
    rows = oracles.random_pairs([(100, 90, 80), (70, 60, 50, 55, 80), (300, 200, 100), (70, 60, 50, 55, 81)])
    short = layout_module._short(rows)
    assert [row.example_id for row in short] == [10, 11], "the two shortest"
    for cut, whole in zip(short, rows[:2], strict=True):
        assert cut.prompt_ids == whole.prompt_ids[-CHECK_TOKENS:]
        third = whole.more_ids[0] if whole.more_ids else whole.rejected_ids[::-1]
        assert cut.completions == [ids[:CHECK_TOKENS] for ids in (whole.chosen_ids, whole.rejected_ids, third)]
        assert {number for pair in cut.pairs for number in pair[:2]} == {0, 1, 2}, "each one counts"


@pytest.mark.parametrize("rows", [PAIRS, RANKED], ids=["rows of two", "ranked rows"])
def test_what_the_check_compares_is_the_same_whatever_the_layout(rows):
    """Sums, and one gradient row per token of prompt and completions: so that a difference means an error."""
    model = tiny.llama().eval()
    scorer = Scorer(model)
    (flat, flat_grad), (padded, padded_grad) = (
        layout_module._measure(scorer, model, rows, name, 0) for name in ("flat", "padded")
    )
    tokens = sum(len(row.prompt_ids) + sum(map(len, row.completions)) for row in rows)
    assert flat_grad.shape == padded_grad.shape == (tokens, tiny.SIZES["hidden_size"])
    torch.testing.assert_close(flat, padded, rtol=0, atol=oracles.NATS)
    assert (flat_grad - padded_grad).norm() < 1e-4 * padded_grad.norm()
    assert flat.tolist() == pytest.approx(oracles.sums(model, rows).view(-1, 2).T.flatten().tolist(), abs=oracles.NATS)
    last = torch.cat([torch.tensor([0] * (len(p.prompt_ids) + len(p.chosen_ids) - 1) + [1]) for p in rows[:1]])
    assert flat_grad[: len(last)][last == 1].abs().max() == 0, "a completion's last token predicts nothing"


# --- what is known before the first batch ---


def test_reasons_in_a_configuration():
    def reason(**changes: Any) -> str | None:
        model = tiny.llama()
        for name, value in changes.items():
            setattr(model.config, name, value)
        return why_not_flat(model)

    assert reason() is None
    assert reason(layer_types=["full_attention", "sliding_attention"]) is None
    assert (
        reason(layer_types=["mamba", "full_attention", "conv"]) == "its layers of type conv, mamba run along the row"
    )
    assert reason(alibi=True) == "its ALiBi positions count columns of the row"
    assert reason(attention_chunk_size=512) == "its attention is limited by column (attention_chunk_size)"
    assert reason(attention_chunk_size=None) is None
    assert reason(index_topk=64) == "its attention is limited by column (index_topk)"


def test_reasons_in_a_model():
    model = tiny.llama()
    model._is_stateful = True
    assert why_not_flat(model) == "its layers carry a state along the row"
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    assert why_not_flat(t5) == "it is an encoder-decoder"
    prompt = get_peft_model(tiny.llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert (
        reason_for_padding(Scorer(prompt), prompt) == "prompt-learning adapters put virtual tokens in front of a row"
    )
    adapted = get_peft_model(tiny.llama(), tiny.lora())
    assert reason_for_padding(Scorer(adapted), adapted) is None
    headless = tiny.llama()
    headless.get_output_embeddings = lambda: None
    assert "no output embedding" in reason_for_padding(Scorer(headless), headless)


def test_a_reason_refuses_flat_at_construction():
    model = PADDED["lfm2"].build()
    with pytest.raises(ValueError, match="--layout flat does not work with Lfm2ForCausalLM: its layers of type conv"):
        choose(model, "flat")


def test_a_reason_of_the_run_counts_like_one_of_the_model(caplog):
    layout, _ = choose(tiny.llama(), reason="context parallelism cuts rows")
    assert layout.name == "padded"
    assert "Layout for LlamaForCausalLM: padded (context parallelism cuts rows)." in caplog.text
    with pytest.raises(ValueError, match="context parallelism cuts rows"):
        choose(tiny.llama(), "flat", reason="context parallelism cuts rows")


@pytest.mark.parametrize(
    ("requested", "line"),
    [
        ("auto", "flat (each prompt once, no padding; verified on the first batch)"),
        ("flat", "flat (as asked)"),
        ("padded", "padded (as asked)"),
    ],
)
def test_one_line_says_which_layout_and_why(requested, line, caplog):
    with caplog.at_level(logging.WARNING, logger="dpo_trainer.scoring.layout"):
        choose(tiny.llama(), requested)
    assert [r.getMessage() for r in caplog.records] == [f"Layout for LlamaForCausalLM: {line}."]


# --- one verdict for all ranks ---


@pytest.mark.parametrize("other_rank_fails", [False, True])
def test_a_difference_on_another_rank_moves_this_one_too(other_rank_fails, monkeypatch, caplog):
    """Rank 0 of two: it finds nothing, and goes by the maximum of all ranks."""

    def all_reduce(flags: Tensor, op: Any) -> None:
        reduced.append(flags.item())
        if other_rank_fails and len(reduced) == 1:
            flags.fill_(1.0)

    reduced: list[float] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    model = tiny.llama()
    layout, _ = choose(model)
    layout.settle(model, batch_of())
    assert reduced == ([0.0, 0.0] if other_rank_fails else [0.0])
    assert layout.name == ("padded" if other_rank_fails else "flat")
    assert ("another rank found a difference" in caplog.text) == other_rank_fails
    assert model.config._attn_implementation != NAME
