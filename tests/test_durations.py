"""Durations: what is read, what is refused, and how they become steps."""

from __future__ import annotations

import pickle
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_adaptive import Clock, ConfigError, Duration

CLOCK = Clock(steps_per_epoch=9, total_steps=90)
NO_LENGTH = Clock(steps_per_epoch=None, total_steps=None)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("10ep", "10ep"),
        ("10 epochs", "10ep"),
        ("1 epoch", "1ep"),
        ("2.5ep", "2.5ep"),
        (" 500st ", "500st"),
        ("500 steps", "500st"),
        ("30%", "30%"),
        ("30 percent", "30%"),
        ("12.5%", "12.5%"),
        ("0st", "0st"),
    ],
)
def test_reads_short_and_long_forms(text: str, written: str) -> None:
    assert str(Duration.parse(text)) == written
    assert repr(Duration.parse(text)) == f"Duration({written!r})"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("5", "switch.at: '5' has no unit. Write 5ep (epochs), 5st (optimizer steps) or 5% (of training)."),
        (5, "switch.at: 5 has no unit. Write 5ep (epochs), 5st (optimizer steps) or 5% (of training)."),
        (0.5, "switch.at: 0.5 has no unit. Write 0.5ep (epochs), 0.5st (optimizer steps) or 0.5% (of training)."),
        (None, "switch.at: None is not a duration. Write 5ep (epochs), 5st (optimizer steps) or 5% (of training)."),
        (True, "switch.at: True is not a duration. Write 5ep (epochs), 5st (optimizer steps) or 5% (of training)."),
        (
            "5epoch s",
            "switch.at: '5epoch s' is not a duration. Write a number and its unit: 5ep (epochs), 5st (optimizer steps) or 5%.",
        ),
        ("-3ep", "switch.at: '-3ep' is not a duration. Write a number and its unit: 5ep (epochs), 5st (optimizer steps) or 5%."),
        ("1e3st", "switch.at: '1e3st' is not a duration. Write a number and its unit: 5ep (epochs), 5st (optimizer steps) or 5%."),
        ("", "switch.at: '' is not a duration. Write a number and its unit: 5ep (epochs), 5st (optimizer steps) or 5%."),
        ("5 eps", "switch.at: '5 eps' has the unknown unit 'eps'. Units are ep (epochs), st (steps) and %."),
        ("2.5st", "switch.at: '2.5st' is not a whole number of steps."),
        ("120%", "switch.at: '120%' is more than the whole. A percentage lies between 0% and 100%."),
        ("9" * 40 + "ep", f"switch.at: '{'9' * 40}ep' is not a duration. Write a number and its unit: 5ep (epochs), "),
    ],
)
def test_refuses_what_is_no_duration(value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Duration.parse(value, key="switch.at")  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)
    assert isinstance(caught.value, ValueError)


def test_a_bare_number_is_a_type_error_too() -> None:
    with pytest.raises(TypeError, match="has no unit"):
        Duration.parse(30)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "steps"),
    [("3ep", 27), ("2.5ep", 23), ("0.5ep", 5), ("500st", 500), ("30%", 27), ("50.5%", 45), ("0%", 0), ("100%", 90)],
)
def test_counts_steps_to_the_nearest_halves_up(text: str, steps: int) -> None:
    assert Duration.parse(text).steps(CLOCK, whole=90) == steps


def test_what_the_clock_does_not_know_is_said() -> None:
    with pytest.raises(ConfigError, match=r"^at: 3ep cannot be counted: the training loader has no length\. Write it in steps"):
        Duration.parse("3ep").steps(NO_LENGTH, key="at")
    with pytest.raises(ConfigError, match=r"^at: 3% cannot be counted: .* Set trainer\.max_steps, or write it in steps \(st\)\.$"):
        Duration.parse("3%").steps(NO_LENGTH, whole=None, key="at")
    assert Duration.parse("3st").steps(NO_LENGTH) == 3


durations = st.one_of(
    st.builds(lambda n: f"{n}st", st.integers(0, 10**9)),
    st.builds(lambda n: f"{n / 100:.2f}ep", st.integers(0, 10**6)),
    st.builds(lambda n: f"{n / 100:.2f}%", st.integers(0, 10**4)),
)


@given(durations)
def test_survives_text_and_pickle(text: str) -> None:
    duration = Duration.parse(text)
    assert Duration.parse(str(duration)) == duration
    assert pickle.loads(pickle.dumps(duration)) == duration
    assert hash(Duration.parse(str(duration))) == hash(duration)


@given(durations, st.integers(1, 10**5), st.integers(1, 10**8))
def test_is_within_half_a_step_of_the_exact_length(text: str, steps_per_epoch: int, total: int) -> None:
    duration = Duration.parse(text)
    scale = {"st": Fraction(1), "ep": Fraction(steps_per_epoch), "%": Fraction(total, 100)}[duration.unit]
    steps = duration.steps(Clock(steps_per_epoch, total), whole=total)
    assert -Fraction(1, 2) < steps - duration.value * scale <= Fraction(1, 2)
