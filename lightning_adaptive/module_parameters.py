"""A module's parameters by name, and what rules can know of them, whatever wraps the module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from lightning_adaptive.rules import Parameter


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters by name; a tied one has the first of its names."""
    return {_plain(name): parameter for name, parameter in module.named_parameters()}


def names(module: nn.Module) -> dict[int, str]:
    """The names that `tensors` gives, by the parameter's ``id``."""
    return {id(parameter): name for name, parameter in tensors(module).items()}


def described(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[Parameter]:
    """What rules for groups can know of the parameters.

    Args:
        module: the module.
        shapes: of whole parameters, by the names that `tensors` gives; one that has none yet is left out.
    """
    found: dict[int, Parameter] = {}
    # With duplicates, so that a tied parameter is known under each of its names.
    for prefix, holder in module.named_modules(remove_duplicate=False):
        for name, tensor in holder.named_parameters(prefix, recurse=False):
            plain, classes = _plain(name), _class_names(type(holder))
            first = found.get(id(tensor))
            if first is None:
                found[id(tensor)] = Parameter(plain, shapes.get(plain), classes, tensor.requires_grad)
            elif plain not in first.names:
                both = tuple(dict.fromkeys((*first.modules, *classes)))
                found[id(tensor)] = replace(first, modules=both, aliases=(*first.aliases, plain))
    return list(found.values())


def _class_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """A module's class and its bases, as a user may write them; of torch's also the short path."""
    found: dict[str, None] = {}
    for base in cls.__mro__:
        if issubclass(base, nn.Module) and base is not nn.Module:
            found |= dict.fromkeys((base.__name__, f"{base.__module__}.{base.__qualname__}"))
            if vars(nn).get(base.__name__) is base:
                found[f"torch.nn.{base.__name__}"] = None
    return tuple(found)


def _plain(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for wrapper in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name
