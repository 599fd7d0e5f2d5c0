"""The table of planted faults fits the package and the tests as they are; `tests.planted_faults` plants them."""

from __future__ import annotations

import ast
import re

import pytest

from tests.planted_faults import FAULTS, Fault
from tests.support import ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.title for fault in FAULTS])
def test_a_fault_can_be_planted_and_names_a_test(fault: Fault) -> None:
    text = (ROOT / "lightning_adaptive" / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.old) == 1
    ast.parse(text.replace(fault.old, fault.new))  # or any test would catch it
    file, _, name = fault.node.partition("::")
    assert re.search(rf"^def {name.partition('[')[0]}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


def test_no_fault_stands_twice() -> None:
    assert len({fault.title for fault in FAULTS}) == len({(fault.file, fault.old) for fault in FAULTS}) == len(FAULTS) >= 50
