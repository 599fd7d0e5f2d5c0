"""``lightning-adaptive preview``: composes a run as ``train`` does, and shows its plan without training a step."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from hydra_plugins.lightning_adaptive import data_folder
from lightning_adaptive.app import checks, job, recipe
from lightning_adaptive.app.assemble import assemble
from lightning_adaptive.app.interrupt import Signals
from lightning_adaptive.errors import ConfigError

FOLDER = "hydra.run.dir=previews/${run_stamp:}"
"""The config is that of ``train``; where a preview leaves its files is the one difference."""

_PAGE = (
    "hydra.help.app_name='lightning-adaptive preview'",
    "hydra.help.header='Shows the plan of a run, and draws its curves, without training. Takes what train takes.'",
)


def main() -> None:
    """One plan."""
    given = sys.argv[1:]
    if {"-m", "--multirun"} & set(given):
        raise ConfigError("a preview is of one run. Leave -m out.")
    ahead = [] if any(item.startswith("hydra.run.dir=") for item in given) else [FOLDER]
    if not {"-sc", "--shell-completion"} & set(given):
        place = next((index for index, item in enumerate(given) if not item.startswith("-") and "=" in item), len(given))
        sys.argv = [sys.argv[0], *given[:place], *ahead, *_PAGE, *given[place:]]
    _app()


@hydra.main(version_base="1.3", config_path=str(data_folder("conf")), config_name="train")
def _app(config: DictConfig) -> None:
    """The Hydra application."""
    job.run("preview", _preview, config)


def _preview(config: DictConfig, _: Signals) -> None:
    checks.check(config)
    for key in ("resume", "ckpt_path"):
        if config[key] is not None:
            raise ConfigError("a preview shows a run from its first step on. Leave it out.", key)
    folder = Path(config.output_dir)
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from lightning_adaptive.app.show import show_plan
    from lightning_adaptive.plan import preview

    trainer, model, data = assemble(config, folder, logger=False, enable_progress_bar=False)
    for line in recipe.lines(HydraConfig.get().runtime.choices, job.overrides()):
        print(line)
    try:
        plan = preview(trainer, model, datamodule=data)
    except MisconfigurationException as error:
        raise ConfigError(str(error)) from error
    folder.mkdir(parents=True, exist_ok=True)
    show_plan(plan, folder / "plan.txt")
    plan.write_csv(folder / "preview.csv")
    plan.draw(folder / "preview.png")
    print(f"saved  {folder}: plan.txt  preview.csv  preview.png\nNothing was trained.")
