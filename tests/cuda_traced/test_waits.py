"""Where a run on a GPU waits for the device: once in an ordinary optimizer step, however many micro-batches it has."""

from __future__ import annotations

import pytest
from whole_run import of_another_library, waits_of_steps

VERDICT = "tolist in dpo_trainer/checkpointing/step_watch.py, verdict"

ORDINARY = {
    "default": {},
    "reentrant checkpointing": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "adapter": {"adapter": True},
    "no clipping, no checkpointing": {"max_grad_norm": 0.0, "gradient_checkpointing": False},
    "bco": {"loss_type": "bco_pair"},
    "aot": {"loss_type": "aot"},
    "losses, shaped": {"loss_type": ["sigmoid", "hinge"], "use_weighting": True, "ld_alpha": 0.5, "rpo_alpha": 1.0},
    "cut batches": {"max_tokens_per_micro_batch": 10},
    "offloading": {"activation_offloading": True},
}


@pytest.mark.parametrize("options", ORDINARY.values(), ids=ORDINARY)
def test_an_optimizer_step_waits_once(on_cuda, options):
    """Two steps of two micro-batches. The first one also sets up the mean loss of the run, in transformers."""
    first, second = on_cuda(waits_of_steps, **options)
    assert [wait for wait in first if not wait.endswith("transformers/trainer.py, _inner_training_loop")] == [VERDICT]
    assert second == [VERDICT]


def test_a_collator_of_another_library_is_waited_for_by_transformers_alone(on_cuda):
    """Its masks ask in each padded forward whether anything is padded."""
    _, second = on_cuda(waits_of_steps, collator=of_another_library)
    assert [wait for wait in second if "masking_utils.py" not in wait] == [VERDICT]
    assert len(second) > 1, "else transformers takes the tensors for those of a compiler"


def test_a_log_line_is_three_waits_more(on_cuda):
    """One of ours for all metrics; transformers reads its loss and the norm of the gradient."""
    _, second = on_cuda(waits_of_steps, logging_steps=1)
    assert sum("dpo_trainer" in wait for wait in second) == 2
    assert len(second) == 4
