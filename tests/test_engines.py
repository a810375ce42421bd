"""What stands between engines and models, as far as one process shows it; the rest is in tests/distributed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from dpo_trainer.distributed.engines import evaluation, shards_weights
from dpo_trainer.distributed.sharding import class_of, copy_of, gathered, is_sharded, kept


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def accelerator(zero: object = None, models: tuple = ()) -> SimpleNamespace:
    return SimpleNamespace(_models=list(models), is_fsdp2=False, state=SimpleNamespace(deepspeed_plugin=zero))


def test_nothing_is_evaluated_before_training_under_deepspeed():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"cannot evaluate before train\(\).*--eval_on_start true"):
        evaluation(model, accelerator(zero=object())).__enter__()
    with evaluation(model, accelerator(zero=object(), models=(model,))):  # its engine is there
        pass


@pytest.mark.parametrize("fails", [False, True])
def test_an_evaluation_before_training_leaves_no_mark(fails):
    """What accelerate marks it does not wrap for training any more; also after an evaluation that broke off."""
    model, state = nn.Linear(2, 2), accelerator()

    def evaluate() -> None:
        with evaluation(model, state):
            state._models.append(model)
            model._is_accelerate_prepared = True
            if fails:
                raise RuntimeError("broke off")

    if fails:
        with pytest.raises(RuntimeError, match="broke off"):
            evaluate()
    else:
        evaluate()
    assert state._models == []
    assert not model._is_accelerate_prepared


def test_an_evaluation_while_it_trains_leaves_the_model_prepared():
    model = nn.Linear(2, 2)
    model._is_accelerate_prepared = True
    state = accelerator(models=(model,))
    with evaluation(model, state):
        pass
    assert state._models == [model]
    assert model._is_accelerate_prepared


@pytest.mark.parametrize(("stage", "cut"), [(1, False), (2, False), (3, True)])
def test_which_stage_cuts_weights(stage, cut):
    assert shards_weights(SimpleNamespace(fsdp=None, deepspeed_plugin=SimpleNamespace(zero_stage=stage))) is cut


def test_the_launcher_says_that_weights_are_cut(monkeypatch):
    alone = SimpleNamespace(fsdp=None, deepspeed_plugin=None)
    assert not shards_weights(alone)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert shards_weights(alone)


def test_what_a_block_makes_of_a_cut_weight_is_kept(one_rank):
    model = fully_shard(tiny.llama(), mesh=one_rank)
    weight = model.lm_head.weight
    assert is_sharded(weight)
    before = kept({"head": weight})["head"]
    with torch.no_grad(), gathered(weight, write=True) as full:
        full.add_(1.0)
    after = kept({"head": weight})["head"]
    assert not is_sharded(after)
    torch.testing.assert_close(after, before + 1.0, rtol=0, atol=0)


def test_a_plain_weight_is_itself(one_rank):
    weight = nn.Parameter(torch.ones(2))
    with torch.no_grad(), gathered(weight) as full:
        assert full is weight
    copy = kept({"a": weight})["a"]
    assert copy.data_ptr() != weight.data_ptr()  # safetensors may write while training goes on


def test_the_class_of_a_cut_model_is_its_own(one_rank):
    model = tiny.llama()
    own = type(model)
    assert class_of(fully_shard(model, mesh=one_rank)) is class_of(tiny.llama()) is own
    assert type(model) is not own


def test_a_copy_shares_nothing():
    model = tiny.llama()
    copied = copy_of(model)
    tiny.assert_same_weights(tiny.weights(copied), tiny.weights(model))
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    assert tiny.moved(tiny.weights(copied), tiny.weights(model)) == 1.0
