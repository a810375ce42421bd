"""A whole run on a GPU that is not there: `DPOTrainer.train()` among fake tensors, and what each optimizer step waits for.

Rows are read and collated with numbers, as on the host of a GPU; from there on tensors have shapes alone.
"""

from __future__ import annotations

import contextlib
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import tiny
import torch
import torch.utils.data.dataloader as loaders
from datasets import Dataset
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from traced import model_of
from transformers import TrainerCallback, masking_utils

import dpo_trainer.trainer as trainer_module
from dpo_trainer import DataCollatorForPreference, DPOConfig, DPOTrainer
from dpo_trainer.models import adapters
from dpo_trainer.reference import choose

ROWS = [{"prompt_ids": [1, 2, 3 + i], "chosen_ids": [5, 6, 7 + i], "rejected_ids": [8, 9 + i]} for i in range(16)]
SHAPE_DEPENDS_ON_NUMBERS = {"aten::nonzero", "aten::masked_select", "aten::_unique2"}


class Waits(TorchDispatchMode):
    """Lists where the host waits for the device: "what, file, function". Numbers that it asks for are all 0."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        if name == "aten::_local_scalar_dense" and args[0].device.type == "cuda":
            self._note("item")
            return False if args[0].dtype is torch.bool else 0
        if name in SHAPE_DEPENDS_ON_NUMBERS and args[0].device.type == "cuda":
            self._note(name.removeprefix("aten::"))
        out = func(*args, **kwargs)
        if name in ("aten::_to_copy", "aten::copy_"):
            source, target = (args[0], out) if name == "aten::_to_copy" else (args[1], args[0])
            later = kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:] == (True,))
            if source.device.type != target.device.type and not later:
                self._note(f"{source.device.type} to {target.device.type}")
        return out

    def tolist(self, tensor: Tensor) -> Any:
        """One wait, however many numbers."""
        if tensor.device.type == "cuda":
            self._note("tolist")
        with unset_fake_temporarily():
            return torch.zeros(tensor.shape, dtype=tensor.dtype).tolist()

    def _note(self, what: str) -> None:
        """The innermost line that is neither torch's nor of this file."""
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        where = (
            frames[-1].filename.partition("site-packages/")[2]
            or f"dpo_trainer{frames[-1].filename.partition('/dpo_trainer')[2]}"
        )
        self.seen.append(f"{what} in {where}, {frames[-1].name}")


def of_another_library(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Padded rows as TRL collates them."""
    inputs = DataCollatorForPreference(0, layout="padded")(rows)
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "completion_mask")}


class _StepEnds(TrainerCallback):
    def __init__(self, waits: Waits, ends: list[int]):
        self.waits, self.ends = waits, ends

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(len(self.waits.seen))


def waits_of_steps(
    rows: list[dict[str, Any]] = ROWS, *, collator: Callable | None = None, adapter: bool = False, **options: Any
) -> list[list[str]]:
    """What each optimizer step of a run of Qwen2 waits for, in float32 under bfloat16 autocast unless `options` say otherwise.

    The first batch's checks of layout and reference are left out: once per run, they wait by design.
    """
    waits, ends = Waits(), []
    steps: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    quiet: dict[str, Any] = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_steps": 1000}
    with tempfile.TemporaryDirectory() as folder, _numbers_where_rows_are_read():
        args = DPOConfig(output_dir=folder, **{**steps, **quiet, **options})
        model = model_of("qwen2", torch.float32)
        with unset_fake_temporarily():
            data, tokenizer = Dataset.from_list(rows), tiny.tokenizer()
        trainer = DPOTrainer(
            model,
            args=args,
            data_collator=collator,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[_StepEnds(waits, ends)],
            peft_config=tiny.lora() if adapter else None,
        )
        assert trainer.args.device.type == "cuda"
        assert trainer.args.bf16
        trainer.layout.settled = trainer.reference_check.begun = True
        trainer.reference_check.applies = False
        trainer.prepare_run = lambda: setattr(trainer, "identity", {})  # type: ignore[method-assign]
        with waits, mock.patch.object(FakeTensor, "tolist", lambda tensor: waits.tolist(tensor)):
            trainer.train()
    return [waits.seen[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


@contextlib.contextmanager
def _numbers_where_rows_are_read() -> Iterator[None]:
    """Data loaders work with real tensors, and hand out fake ones on the host. What asks for memory of a GPU does nothing."""
    mode: FakeTensorMode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)  # type: ignore[assignment]

    def with_numbers(method: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with unset_fake_temporarily():
                return method(*args, **kwargs)

        return run

    loader, single = loaders._BaseDataLoaderIter, loaders._SingleProcessDataLoaderIter
    read, adapted = with_numbers(loader.__next__), adapters.get_peft_model

    def adapted_there(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cuda"):
            return adapted(*args, **kwargs)

    def read_as_fake(self: Any) -> Any:
        return tree_map(lambda value: mode.from_tensor(value) if isinstance(value, Tensor) else value, read(self))

    with (
        mock.patch.object(loader, "__init__", with_numbers(loader.__init__)),
        mock.patch.object(single, "__init__", with_numbers(single.__init__)),
        mock.patch.object(loader, "__next__", read_as_fake),
        mock.patch.object(FakeTensorMode, "__deepcopy__", lambda self, _: self, create=True),  # in copies of a model
        mock.patch.object(Tensor, "pin_memory", lambda self, *_: self),
        mock.patch.object(torch.cuda, "set_device"),
        mock.patch.object(nn.Module, "to", lambda self, *_, **__: self),  # all is there already
        mock.patch.object(adapters, "get_peft_model", adapted_there),
        mock.patch.object(choose, "begins_at_zero", return_value=True),
        mock.patch.object(trainer_module, "check_saving"),  # fake weights share their memory
        mock.patch.object(masking_utils, "is_tracing", return_value=False),  # it asks less of fake tensors
    ):
        yield
