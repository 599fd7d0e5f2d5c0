"""The command line: finds the sub-command, and turns errors into one message and an exit code. Imports nothing heavy."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from lightning_adaptive.errors import UserError, did_you_mean

COMMANDS = {"train": "train a model: lightning-adaptive train recipe=digits_adam_to_sgd switch.at=3ep"}

_USAGE = """usage: lightning-adaptive COMMAND [option=value ...]

commands:
{commands}

  --trust NAME      a package of your own, in this folder, that configs may name
  COMMAND --help    the command's groups and options
"""


def main() -> None:
    """Runs a sub-command with the arguments of the process, and exits with its code."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        usage = _USAGE.format(commands="\n".join(f"  {name:<10}{line}" for name, line in COMMANDS.items()))
        print(usage, end="", file=sys.stdout if arguments else sys.stderr)
        sys.exit(0 if arguments else 2)
    command = arguments[0]
    if command not in COMMANDS:
        _fail(f"{command!r} is no command.{did_you_mean(command, COMMANDS)} Commands: {', '.join(COMMANDS)}.", 2)
    # Hydra must not see the sub-command; app/job.py puts it back for the processes that Lightning starts.
    sys.argv = [sys.argv[0], *_quote_ckpt_path(_with_settings(_take_trust(arguments[1:])))]
    # Hydra then raises its errors instead of printing them and exiting with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    from hydra.errors import CompactHydraException

    try:
        importlib.import_module(f"lightning_adaptive.app.{command}").main()
    except UserError as error:
        _fail(str(error), error.exit_code)
    except (CompactHydraException, ValueError) as error:
        if "HYDRA_FULL_ERROR" not in os.environ:
            raise  # a job had begun, so this is no fault of the command line
        from lightning_adaptive.app.messages import hydra_message

        _fail(hydra_message(error, sys.argv[1:]), 2)


def _fail(message: str, code: int) -> None:
    print(f"lightning-adaptive: {message}", file=sys.stderr)  # noqa: T201
    sys.exit(code)


def _take_trust(arguments: Sequence[str]) -> list[str]:
    """Moves ``--trust NAME`` into the environment, where the processes that Lightning starts see it too."""
    rest: list[str] = []
    names: list[str] = []
    iterator = iter(arguments)
    for argument in iterator:
        if argument == "--trust":
            name = next(iterator, None)
            if name is None:
                _fail("--trust needs the name of a package.", 2)
            names.append(str(name))
        elif argument.startswith("--trust="):
            names.append(argument.removeprefix("--trust="))
        else:
            rest.append(argument)
    if names:
        variable = "LIGHTNING_ADAPTIVE_TRUST"
        os.environ[variable] = ":".join([*filter(None, [os.environ.get(variable)]), *names])
    if os.environ.get("LIGHTNING_ADAPTIVE_TRUST") and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where a trusted package lies; a console script does not look there
    return rest


def _with_settings(arguments: list[str]) -> list[str]:
    if not any(argument.startswith("resume=") for argument in arguments):
        return arguments
    from lightning_adaptive.app.resume import with_settings

    try:
        return with_settings(arguments)
    except UserError as error:
        _fail(str(error), error.exit_code)
        return []


def _quote_ckpt_path(arguments: Sequence[str]) -> list[str]:
    """Quotes the value of ``ckpt_path``: Lightning's default names hold ``=``, which Hydra's grammar refuses."""
    return [_quoted(argument) if argument.lstrip("+").startswith("ckpt_path=") else argument for argument in arguments]


def _quoted(override: str) -> str:
    key, _, value = override.partition("=")
    if not value or value == "null" or value[0] in "'\"":
        return override
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{escaped}'"
