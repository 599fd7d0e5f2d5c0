"""The project itself: the direction of its imports, its public names, its messages, its files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_adaptive
from tests.support import ROOT

PACKAGE = ROOT / "lightning_adaptive"

# What each file may import of the package; top to bottom. Any other arrow is a fault of design.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "tables": set(),
    "pictures": set(),
    "durations": {"errors"},
    "schedules": {"durations", "errors"},
    "curves": {"durations", "errors", "schedules"},
    "rules": {"errors"},
    "partitions": {"errors", "rules"},
    "param_groups": {"errors", "partitions", "rules"},
    "triggers": {"durations", "errors"},
    "lr_schedulers": {"durations", "errors", "schedules"},
    "combined": {"errors", "partitions"},
    "moments": {"partitions"},
    "guard": {"moments"},
    "handover": {"combined", "durations", "errors", "moments", "partitions"},
    "phases": {"combined", "partitions", "durations", "errors", "lr_schedulers"},
    "random_states": set(),
    "data_order": {"random_states"},
    "checkpoints": {"errors"},
    "trainers": {"durations", "errors"},
    "module_parameters": {"rules"},
    "strategies": {"combined", "errors", "module_parameters"},
    "gradient_norms": set(),
    "noise_scale": {"errors"},
    "noise": {"combined", "errors", "gradient_norms", "noise_scale", "partitions", "strategies", "trainers"},
    "exact_resume": {"checkpoints", "data_order", "errors", "random_states", "strategies"},
    "settings": {"combined", "partitions", "schedules"},
    "switch_state": {"errors", "partitions", "settings", "triggers"},
    "chain": {
        "combined", "durations", "errors", "handover", "lr_schedulers", "moments", "param_groups", "partitions", "phases",
        "rules", "schedules", "settings", "triggers",
    },
    "switch": {
        "chain", "checkpoints", "combined", "durations", "errors", "guard", "handover", "lr_schedulers",
        "module_parameters", "moments", "noise", "param_groups", "partitions", "phases", "rules", "schedules", "settings",
        "strategies", "switch_state", "trainers", "triggers",
    },
    "series": {"lr_schedulers", "partitions", "phases"},
    "plan": {
        "chain", "combined", "lr_schedulers", "partitions", "phases", "pictures", "series", "strategies", "switch",
        "tables", "trainers",
    },
    "report": {"checkpoints", "combined", "errors", "lr_schedulers", "noise", "phases", "pictures", "strategies", "switch"},
    "trust": {"errors"},
    "signatures": {"durations", "errors"},
    "config": {
        "combined", "durations", "errors", "handover", "lr_schedulers", "param_groups", "phases", "schedules", "signatures",
        "switch", "triggers", "trust",
    },
    "hooks": {"config", "errors", "lr_schedulers", "module_parameters", "param_groups", "phases", "strategies", "trainers"},
    "tasks.digits": set(),
    "app.interrupt": set(),
    "app.messages": {"errors"},
    "app.arguments": {"app.resume", "errors", "trust"},
    "app.checks": {"durations", "errors", "trust"},
    "app.complete": {"app.list"},
    "app.list": {"app.arguments", "errors", "tables"},
    "app.recipe": set(),
    "app.sweep": {"app.interrupt", "errors"},
    "app.job": {"app.interrupt", "app.sweep", "errors"},
    "app.resume": {"checkpoints", "errors"},
    "app.stop": {"app.interrupt", "strategies"},
    "app.progress": {"combined", "phases", "strategies", "switch"},
    "app.show": {"plan", "tables"},
    "app.assemble": {"config", "errors", "hooks"},
    "app.train": {
        "app.assemble", "app.checks", "app.job", "app.interrupt", "app.progress", "app.recipe", "app.resume", "app.show",
        "app.stop", "app.sweep", "checkpoints", "errors", "strategies", "report", "tables",
    },
    "app.preview": {"app.assemble", "app.checks", "app.interrupt", "app.job", "app.recipe", "app.show", "errors", "plan"},
    "app.cli": {"app.arguments", "app.complete", "app.messages", "errors"},
    "__main__": {"app.cli"},
}  # fmt: skip

# Which third-party packages a file may import; files that are not named may import any.
FOREIGN: dict[str, set[str]] = {
    "errors": set(),
    "tables": set(),
    "pictures": {"matplotlib"},
    "durations": set(),
    "schedules": set(),
    "curves": set(),
    "rules": set(),
    "partitions": set(),
    "param_groups": set(),
    "moments": {"torch"},
    "guard": {"torch"},
    "handover": {"torch"},
    "triggers": set(),
    "lr_schedulers": {"torch"},
    "combined": {"torch"},
    "phases": {"torch"},
    "random_states": {"torch", "numpy"},
    "data_order": {"torch"},
    "checkpoints": {"torch"},
    "module_parameters": {"torch"},
    "trainers": {"torch", "lightning"},
    "trust": set(),
    "signatures": {"torch"},
    "strategies": {"torch", "lightning", "deepspeed"},
    "exact_resume": {"torch", "lightning"},
    "gradient_norms": {"torch"},
    "noise_scale": {"torch", "torchmetrics"},
    "noise": {"torch", "lightning"},
    "settings": {"torch"},
    "switch_state": set(),
    "chain": {"torch"},
    "switch": {"torch", "lightning"},
    "series": {"torch"},
    "plan": {"torch", "lightning"},
    "report": {"torch", "lightning"},
    "hooks": {"torch", "lightning"},
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "__init__.py":
            yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts), ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> Iterator[str]:
    """Every module that is imported anywhere in a file, as far as the name of a module goes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = (ROOT / Path(*whole.split("."))).with_suffix(".py").is_file()
                yield whole if is_module else str(node.module)


@pytest.mark.parametrize(("name", "tree"), list(modules()), ids=[name for name, _ in modules()])
def test_imports_run_downwards_only(name: str, tree: ast.Module) -> None:
    ours = {module.removeprefix("lightning_adaptive.") for module in imported(tree) if module.startswith("lightning_adaptive.")}
    assert ours == ARROWS[name], "the table of arrows and the file disagree"
    if name in FOREIGN:
        others = {module.partition(".")[0] for module in imported(tree)} - set(sys.stdlib_module_names) - {"lightning_adaptive"}
        assert others <= FOREIGN[name]


def test_the_arrows_have_no_circle() -> None:
    order = list(ARROWS)
    for name, targets in ARROWS.items():
        for target in targets:
            assert name.startswith("app.") or order.index(target) < order.index(name), f"{name} -> {target}"


def test_the_guide_names_every_room() -> None:
    house = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Follow a setting")[0]
    rooms = {name for name, _ in modules() if "." not in name} - {"__main__"}
    assert rooms == {
        Path(file).stem
        for row in house.splitlines()
        if row.startswith("| `")
        for file in re.findall(r"`(\w+\.py)`", row.split("|")[1])
    }


def test_every_exported_name_exists_where_it_is_said_to_be() -> None:
    for name in lightning_adaptive.__all__:
        home = lightning_adaptive._HOMES[name]
        assert getattr(lightning_adaptive, name).__module__ == f"lightning_adaptive.{home}"
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    typed = {alias.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names if alias.asname}
    assert typed == set(lightning_adaptive.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'switch_now'"):
        _ = lightning_adaptive.switch_now  # type: ignore[attr-defined]


def test_importing_the_package_or_the_callback_imports_neither_hydra_nor_jsonargparse() -> None:
    lines = [
        "import sys, lightning_adaptive",
        "assert not {'torch', 'lightning', 'hydra', 'omegaconf', 'jsonargparse'} & set(sys.modules)",
        "from lightning_adaptive import OptimizerSwitchCallback, Cosine",
        "assert not {'hydra', 'jsonargparse'} & set(sys.modules)",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, check=True, timeout=60)


def test_public_names_are_documented() -> None:
    for name in lightning_adaptive.__all__:
        assert (getattr(lightning_adaptive, name).__doc__ or "").strip(), name


def test_messages_of_several_lines_have_no_glued_words() -> None:
    """Neighbouring pieces of a message must be parted by a blank."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8").replace('\\n"', ' "')  # a line break parts words as well
        pieces = re.findall(r'(\S)"\s*\n\s*f?"(\S)', text)
        glued = [pair for pair in pieces if pair[0] not in "([{," and (pair[0].isalnum() or pair[0] in ".;:") and pair[1].isalnum()]
        assert not glued, f"{path.name}: {glued}"


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_place_of_one_machine() -> None:
    pattern = re.compile(r"/(?:home|root|Users|work|mnt|opt)/[\w.]+")
    for path in tracked_files():
        if path.suffix in {".png"} or path.name == "test_project.py":
            continue
        assert not pattern.search(path.read_text(encoding="utf-8")), path


def test_the_pinned_packages_hold_no_torchvision() -> None:
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "torch==2.13.0" in pinned
    assert not re.search(r"^(torchvision|timm)\b", pinned, re.MULTILINE)
