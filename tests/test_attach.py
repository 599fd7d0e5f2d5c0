"""`configure_optimizers` and `attach`: what people's modules use, and what an attached module survives."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import StepLR

from lightning_adaptive import ConfigError, Cosine, Inherit, OptimizerSwitchCallback, attach, configure_optimizers
from tests.support import Net, counted_steps, digest, loader, trainer

TO_SGD = partial(SGD, lr=0.1)


def through_pickle(model: Net) -> Net:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: Net) -> Net:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


NODES = {
    "callables": {"optimizer": partial(AdamW, lr=3e-3), "scheduler": Cosine(warmup="10%")},
    "nodes": {
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 3e-3},
        "scheduler": {"_target_": "lightning_adaptive.Cosine", "warmup": "10%"},
        "param_groups": {"_target_": "lightning_adaptive.ParamGroups"},
    },
    "DictConfig": {
        "optimizer": OmegaConf.create({"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 3e-3, "betas": [0.9, 0.999]}),
        "scheduler": OmegaConf.create({"_target_": "lightning_adaptive.Cosine", "warmup": "10%"}),
    },
}


@pytest.mark.parametrize("arguments", NODES.values(), ids=NODES)
def test_nodes_and_callables_give_the_same_run(arguments: dict[str, Any]) -> None:
    class Own(Net):
        def configure_optimizers(self) -> Any:
            return configure_optimizers(self, **arguments)

    reference, own, attached = attach(Net(), **NODES["callables"]), Own(), attach(Net(), **arguments)
    for model in (reference, own, attached):
        runner = trainer(max_epochs=2)
        runner.fit(model, loader())
        [config] = runner.lr_scheduler_configs
        assert (config.interval, config.name, config.scheduler.last_epoch) == ("step", "lr", 16)
        assert type(runner.optimizers[0]) is AdamW
    assert digest(reference) == digest(own) == digest(attached)


def test_torch_schedulers_and_lightnings_dictionary_pass_through() -> None:
    for scheduler in (
        partial(StepLR, step_size=1, gamma=0.5),
        {"scheduler": partial(StepLR, step_size=1, gamma=0.5), "interval": "epoch"},
        {"scheduler": {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 1, "gamma": 0.5}},
    ):
        runner = trainer(max_epochs=2)
        runner.fit(attach(Net(), optimizer=TO_SGD, scheduler=scheduler), loader())
        assert runner.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.025)


def test_only_trainable_parameters_are_optimized_and_a_tied_one_once() -> None:
    model = Net()
    model.tied = model.net[2].weight
    model.net[0].requires_grad_(False)
    runner = trainer(max_epochs=1)
    runner.fit(attach(model, optimizer=TO_SGD), loader())
    [group] = runner.optimizers[0].param_groups
    assert [id(tensor) for tensor in group["params"]] == [id(model.net[2].weight), id(model.net[2].bias)]


@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_optimizes_its_own_parameters(way: Any) -> None:
    original = attach(Net(), optimizer=TO_SGD)
    copied, before = way(original), digest(original)
    with counted_steps() as counts:
        trainer(max_epochs=1).fit(copied, loader())
    assert counts == {"SGD": 8}
    assert digest(original) == before != digest(copied)


def test_attach_replaces_a_hook_and_returns_the_module_itself() -> None:
    model = Net()
    assert attach(model, optimizer=TO_SGD) is model
    with counted_steps() as counts:
        trainer(max_epochs=1).fit(model, loader())
    assert counts == {"SGD": 8}


class SilentNet(Net):
    """Logs nothing: torch 2.13 cannot trace through Lightning 2.6's ``self.log``."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def test_a_compiled_module_before_and_after() -> None:
    reference = attach(SilentNet(), optimizer=TO_SGD)
    trainer(max_epochs=1).fit(reference, loader())
    first = torch.compile(attach(SilentNet(), optimizer=TO_SGD), backend="eager")
    later = attach(torch.compile(SilentNet(), backend="eager"), optimizer=TO_SGD)
    for compiled in (first, later):
        with counted_steps() as counts:
            trainer(max_epochs=1).fit(compiled, loader())
        assert counts == {"SGD": 8}
        assert digest(compiled._orig_mod) == digest(reference)


def test_a_compiled_module_switches() -> None:
    plain, compiled = SilentNet(), torch.compile(SilentNet(), backend="eager")
    for model in (plain, compiled):
        trainer(max_epochs=2, callbacks=[OptimizerSwitchCallback(at="1ep", optimizer=TO_SGD)]).fit(model, loader())
    assert digest(plain) == digest(compiled._orig_mod)


def test_a_module_from_a_checkpoint_has_its_own_hook_again(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="saved")
    trainer(max_epochs=1, callbacks=[saver], enable_checkpointing=True).fit(attach(Net(), optimizer=TO_SGD), loader())
    loaded = Net.load_from_checkpoint(tmp_path / "saved.ckpt", weights_only=True)
    assert type(loaded.configure_optimizers()) is Adam


def test_a_callback_alone_serves_a_module_and_leaves_it_as_it_was() -> None:
    model = Net()
    trainer(max_epochs=2, callbacks=[OptimizerSwitchCallback(at="1ep", optimizer=TO_SGD)]).fit(model, loader())
    assert "configure_optimizers" not in vars(model)
    assert type(model.configure_optimizers()) is Adam


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"optimizer": TO_SGD, "param_groups": Inherit()},
            "param_groups: the first phase has no groups to inherit. Leave it out, or write none.",
        ),
        (
            {"optimizer": TO_SGD, "param_groups": "inherit"},
            "param_groups: the first phase has no groups to inherit. Leave it out, or write none.",
        ),
        (
            {"optimizer": TO_SGD, "param_groups": SGD},
            "param_groups: <class 'torch.optim.sgd.SGD'> says nothing about groups. Write ParamGroups(...), or leave it out.",
        ),
        (
            {"optimizer": SGD([torch.zeros(1)], lr=0.1)},
            "optimizer: a SGD that is already built holds its own parameters. Pass a factory: partial(SGD, ...) from functools.",
        ),
        (
            {"optimizer": "sgd"},
            "optimizer: 'sgd' is a word where a node belongs. To choose a file of the group, write optimizer=sgd.",
        ),
        (
            {"optimizer": {"_target_": "torch.optim.SGD", "lrr": 0.1}},
            "optimizer.lrr: SGD has no option 'lrr'. Did you mean 'lr'? Options: lr, momentum, dampening, weight_decay, nesterov, "
            "maximize, foreach, differentiable, fused.",
        ),
    ],
)
def test_attach_refuses_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        attach(Net(), **arguments)
    assert str(caught.value) == message
