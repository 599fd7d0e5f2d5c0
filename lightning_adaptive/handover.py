"""What crosses a switch: the learning rate, the momentum and the weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from lightning_adaptive.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Handover:
    """Rules by which the next phase starts.

    Args:
        lr: ``"own"``: the next phase begins with the learning rate of its own configuration.
        momentum: ``"zero"``: the next optimizer begins with an empty state.
        weight_decay: ``"own"``: the next optimizer's configured value.

    Raises:
        ConfigError: for a rule that does not exist.
    """

    lr: Literal["own"] = "own"
    momentum: Literal["zero"] = "zero"
    weight_decay: Literal["own"] = "own"

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            rule, rules = getattr(self, name), get_args(kind)
            if rule not in rules:
                raise ConfigError(
                    f"the rule {rule!r} does not exist or is not available yet. Rules: {', '.join(rules)}."
                    + did_you_mean(str(rule), rules),
                    name,
                )

    @classmethod
    def of(cls, value: Handover | str, key: str = "handover") -> Handover:
        """A `Handover` from itself or from the name of a preset, which is ``"own"``.

        Raises:
            ConfigError: for an unknown name.
        """
        if isinstance(value, cls):
            return value
        if value == "own":
            return cls()
        raise ConfigError(f"{value!r} does not exist or is not available yet. Write 'own' or a Handover.", key)
