"""The command line: finds the sub-command, and turns errors into one message and an exit code. Imports nothing heavy."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from lightning_adaptive.app import arguments
from lightning_adaptive.errors import ConfigError, UserError, did_you_mean

COMMANDS = {
    "train": "train a model: lightning-adaptive train recipe=digits_adam_to_sgd switch.at=3ep",
    "preview": "the plan of a run and its curves, without training: lightning-adaptive preview recipe=digits_adam_to_sgd",
    "list": "what there is to choose, and where it comes from: lightning-adaptive list optimizers",
}

_USAGE = """usage: lightning-adaptive COMMAND [option=value ...]

commands:
{commands}

  COMMAND --help      the command's groups and options
  --trust NAME        a package of your own, in this folder, that configs may name
  -sc install=bash    completion for bash: eval "$(lightning-adaptive -sc install=bash)"
"""


def main() -> None:
    """Runs a sub-command with the arguments of the process, and exits with its code."""
    try:
        _main(sys.argv[1:])
    except UserError as error:
        _fail(str(error), error.exit_code)


def _main(given: Sequence[str]) -> None:
    if not given or given[0] in ("-h", "--help"):
        usage = _USAGE.format(commands="\n".join(f"  {name:<10}{line}" for name, line in COMMANDS.items()))
        print(usage, end="", file=sys.stdout if given else sys.stderr)
        sys.exit(0 if given else 2)
    command, *others = given
    if command in ("-sc", "--shell-completion"):
        from lightning_adaptive.app import complete

        complete.main(others, COMMANDS)
    elif command not in COMMANDS:
        raise ConfigError(f"{command!r} is no command.{did_you_mean(command, COMMANDS)} Commands: {', '.join(COMMANDS)}.")
    elif command == "list":
        importlib.import_module("lightning_adaptive.app.list").main(others)
    else:
        _run(command, others)


def _run(command: str, given: Sequence[str]) -> None:
    """Runs a command that is an application of Hydra's."""
    # Hydra must not see the sub-command; app/job.py puts it back for the processes that Lightning starts.
    sys.argv = [sys.argv[0], *arguments.for_hydra(given)]
    # Hydra then raises its errors instead of printing them and exiting with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    from hydra.errors import CompactHydraException

    try:
        importlib.import_module(f"lightning_adaptive.app.{command}").main()
    except (CompactHydraException, OSError, ValueError) as error:
        if isinstance(error, UserError) or "HYDRA_FULL_ERROR" not in os.environ:
            raise  # a job had begun, so this is no fault of the command line
        from lightning_adaptive.app.messages import hydra_message

        _fail(hydra_message(error, sys.argv[1:]), 2)


def _fail(message: str, code: int) -> None:
    print(f"lightning-adaptive: {message}", file=sys.stderr)
    sys.exit(code)
