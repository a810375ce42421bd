"""The types that flow: batches of other libraries, index tensors of segments, sums by completion."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

from dpo_trainer.data import DataCollatorForPreference
from dpo_trainer.types import (
    PairBatch,
    PairLogps,
    Segments,
    TokenLogps,
    micro_batches,
    pair_weight,
    with_scored_tokens,
)

# Two pairs as another library would collate them: chosen rows, then rejected rows.
#   pair 0: prompt 5 6, chosen 7 8 9, rejected 4      pair 1: prompt 1, chosen 2, rejected 3 3
FOREIGN = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 9], [1, 2, 0, 0, 0], [5, 6, 4, 0, 0], [1, 3, 3, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]),
    "completion_mask": torch.tensor([[0, 0, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 1, 1, 0, 0]]),
}


# --- batches of other libraries ---


def test_completion_mask_by_hand():
    """Row r, column c is predicted at position 5 r + c - 1 of the flattened rows."""
    batch = PairBatch.from_inputs(FOREIGN)
    assert batch.score_at.tolist() == [1, 2, 3, 5, 11, 15, 16]
    assert batch.target_ids.tolist() == [7, 8, 9, 2, 4, 3, 3]
    assert batch.completion.tolist() == [0, 0, 0, 1, 2, 3, 3]
    assert batch.completion_position.tolist() == [0, 1, 2, 0, 0, 0, 1]
    assert batch.lengths.tolist() == [3, 1, 1, 2]
    assert batch.chosen.tolist() == [0, 1]
    assert batch.rejected.tolist() == [2, 3]
    assert batch.num_tokens == 13
    assert batch.weight.tolist() == [1.0, 1.0]
    assert batch.weight.dtype == torch.float32
    assert not batch.is_flat
    assert batch.position_ids is None


def test_left_padding_is_read_from_the_masks_alone():
    flipped = {name: value.flip(1) for name, value in FOREIGN.items()}
    columns = {
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1]] * 2),
        "completion_mask": torch.tensor([[0, 0, 0, 0, 1]] * 2),
    }
    batch = PairBatch.from_inputs({"input_ids": flipped["input_ids"][:2], **columns})
    assert batch.score_at.tolist() == [3, 8]
    assert batch.num_tokens == 6


def test_masks_of_bool_and_other_columns_are_welcome():
    batch = PairBatch.from_inputs(
        {**FOREIGN, "completion_mask": FOREIGN["completion_mask"].bool(), "another": torch.zeros(4, 3)}
    )
    assert batch.lengths.tolist() == [3, 1, 1, 2]


def test_images_of_a_foreign_batch_are_refused():
    with pytest.raises(ValueError, match=r"has pixel_values, which would not reach the model"):
        PairBatch.from_inputs({**FOREIGN, "pixel_values": torch.zeros(4, 3)})


def test_ids_and_weights_of_a_foreign_batch_are_kept():
    batch = PairBatch.from_inputs({**FOREIGN, "example_ids": torch.tensor([8, 3]), "weight": torch.tensor([0.0, 2.0])})
    assert batch.example_ids.tolist() == [8, 3]
    assert batch.weight.tolist() == [0.0, 2.0]
    assert pair_weight(FOREIGN).tolist() == [1.0, 1.0]


def test_margins_of_a_foreign_batch_reach_the_losses():
    assert PairBatch.from_inputs(FOREIGN).margin is None
    margin = torch.tensor([0.5, 2.0])
    assert PairBatch.from_inputs({**FOREIGN, "margin": margin}).margin is margin


def test_tokens_inside_a_completion_may_be_unmarked():
    """A tool's reply, say: read, not scored, and not counted."""
    mask = FOREIGN["completion_mask"].clone()
    mask[0, 3] = 0
    batch = PairBatch.from_inputs({**FOREIGN, "completion_mask": mask})
    assert batch.score_at.tolist()[:2] == [1, 3]
    assert batch.target_ids.tolist()[:2] == [7, 9]
    assert batch.completion_position.tolist()[:2] == [0, 1]
    assert batch.lengths.tolist() == [2, 1, 1, 2]
    assert batch.num_tokens == 13


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "completion_mask"])
def test_a_missing_key_is_named(name):
    with pytest.raises(ValueError, match=rf"lacks \['{name}'\].*DataCollatorForPreference"):
        PairBatch.from_inputs({key: value for key, value in FOREIGN.items() if key != name})


def test_odd_rows_are_refused():
    with pytest.raises(ValueError, match="3 rows cannot be halved"):
        PairBatch.from_inputs({key: value[:3] for key, value in FOREIGN.items()})


def test_a_completion_in_the_first_column_is_refused():
    mask = FOREIGN["completion_mask"].clone()
    mask[1, 0] = 1
    with pytest.raises(ValueError, match="marks the first token of a row"):
        PairBatch.from_inputs({**FOREIGN, "completion_mask": mask})


# --- segments ---


@st.composite
def segments(draw) -> Segments:
    """Some segments, the prefix of each anywhere in what stands before it."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    prefix_start, prefix_length = [], []
    for i in range(len(lengths)):
        before = sum(lengths[:i])
        start = draw(st.integers(0, before))
        prefix_start.append(start)
        prefix_length.append(draw(st.integers(0, before - start)))
    return Segments(length=tuple(lengths), prefix_start=tuple(prefix_start), prefix_length=tuple(prefix_length))


@given(segments())
@settings(deadline=None, max_examples=50)
def test_varlen_index_gathers_prefix_then_segment(layout):
    index = layout.varlen(torch.device("cpu"))
    assert index.cu_queries.dtype == index.cu_keys.dtype == torch.int32  # what the kernels ask for
    keys, row = index.keys_at.tolist(), 0
    for s, (n, start, prefix) in enumerate(zip(layout.length, layout.prefix_start, layout.prefix_length, strict=True)):
        assert (index.cu_queries[s], index.cu_queries[s + 1]) == (row, row + n)
        mine = keys[index.cu_keys[s] : index.cu_keys[s + 1]]
        assert mine == [*range(start, start + prefix), *range(row, row + n)]
        assert len(mine) <= index.max_keys
        assert n <= index.max_queries
        row += n
    assert index.cu_keys[-1] == len(keys)


def test_what_layers_share_is_made_once():
    layout, made = Segments(length=(3,), prefix_start=(0,), prefix_length=(0,)), []
    for _ in range(3):
        layout.remember("mask", lambda: made.append(1))
    assert made == [1]
    assert layout.varlen(torch.device("cpu")) is layout.varlen(torch.device("cpu"))
    again = dataclasses.replace(layout)  # another batch with the same lengths has a memory of its own
    assert again.varlen(torch.device("cpu")) is not layout.varlen(torch.device("cpu"))


# --- log-probs of pairs ---


def shared_completions() -> TokenLogps:
    """Three samples of one prompt, ranked: 0 > 1 and 0 > 2, five scored tokens in all."""
    return TokenLogps(
        logps=torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0]),
        completion=torch.tensor([0, 0, 1, 2, 2]),
        position=torch.tensor([0, 1, 0, 0, 1]),
        chosen=torch.tensor([0, 0]),
        rejected=torch.tensor([1, 2]),
        lengths=torch.tensor([2, 1, 2]),
    )


def test_pairs_may_share_a_completion():
    logps = PairLogps.from_tokens(shared_completions())
    assert logps.chosen.tolist() == [-3.0, -3.0]
    assert logps.rejected.tolist() == [-4.0, -24.0]
    assert logps.margin().tolist() == [1.0, 21.0]
    assert logps.mean_chosen().tolist() == [-1.5, -1.5]
    assert logps.mean_rejected().tolist() == [-4.0, -12.0]
    assert logps.chosen_lengths.tolist() == [2, 2]
    assert logps.rejected_lengths.tolist() == [1, 2]
    assert logps.aux_loss is None


def test_a_shared_completion_gets_the_gradient_of_both_pairs():
    tokens = shared_completions()
    leaf = tokens.logps.requires_grad_()
    PairLogps.from_tokens(tokens).margin().sum().backward()
    assert leaf.grad.tolist() == [2.0, 2.0, -1.0, -1.0, -1.0]


def test_sums_are_float32_whatever_the_tokens_are():
    """1,000 tokens of -1.001 nats: bfloat16 sums would stand still at -256."""
    tokens = dataclasses.replace(
        shared_completions(),
        completion=torch.zeros(1000, dtype=torch.int64),
        lengths=torch.tensor([1000]),
    )
    sums = tokens.sum_by_completion(torch.full((1000,), -1.0, dtype=torch.bfloat16))
    assert sums.dtype == torch.float32
    assert sums.tolist() == [-1000.0]


def test_a_batch_survives_pinning(monkeypatch):
    """As the data loader pins it: tensors at any depth, everything else as it is."""
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self, *_: pinned.append(self) or self.clone())
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}] * 4
    for max_tokens in (None, 10):
        inputs = DataCollatorForPreference(0, keyed=True, max_tokens=max_tokens)(rows)
        after = pin_memory(inputs)
        for before, part in zip(micro_batches(inputs), micro_batches(after), strict=True):
            want, got = PairBatch.from_inputs(before), PairBatch.from_inputs(part)
            assert got.segments == want.segments
            assert list(got.keys) == list(want.keys)
            assert torch.equal(got.input_ids, want.input_ids)
    assert len(pinned) > 20


def test_masks_of_another_library_are_read_before_a_batch_is_sent():
    """The same batch, with entries of its own first: accelerate takes the batch size from the first tensor."""
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}] * 2
    padded = DataCollatorForPreference(0, layout="padded")(rows)
    foreign = {name: padded[name] for name in ("input_ids", "attention_mask", "completion_mask")}
    inputs = with_scored_tokens(foreign)
    assert list(inputs)[:3] == list(foreign)
    got, want = PairBatch.from_inputs(inputs), PairBatch.from_completion_mask(foreign)
    for field in dataclasses.fields(PairBatch):
        a, b = getattr(got, field.name), getattr(want, field.name)
        assert torch.equal(a, b) if isinstance(b, Tensor) else a == b, field.name
    assert with_scored_tokens(padded) == padded
