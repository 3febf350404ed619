"""A refactor changes no bit: twenty training steps give the stored losses exactly."""

from __future__ import annotations

import platform

import pytest

from tests.train import trajectory


@pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.system() != "Linux",
    reason="the list was stored on Linux on x86-64; other machines round otherwise",
)
def test_twenty_steps_give_the_stored_losses_bit_for_bit():
    found, stored = trajectory.measure(), trajectory.stored()
    assert len(found) == trajectory.NUM_STEPS
    different = [
        step for step, pair in enumerate(zip(found, stored, strict=True)) if len(set(pair)) > 1
    ]
    assert different == [], (
        f"first different step {different[:1]}; `python -m tests.train.trajectory --write` stores "
        "the list anew if a change of numbers is meant"
    )


def test_the_stored_trajectory_learns():
    # The list is of a run that does something: the image-level loss falls.
    first, last = (
        [float.fromhex(word) for word in trajectory.stored()[step].split()] for step in (0, -1)
    )
    assert sum(last[:2]) < sum(first[:2])


# Twenty steps let roundings of 1e-7 grow, KoLeo's gradient between almost equal images most of all:
# relative distance allowed between the losses.
FAST_DISTANCE = 2e-3
CROSS_ENTROPIES = slice(0, 3)  # KoLeo's logarithm of almost equal features magnifies any rounding


def test_the_fast_step_repeats_itself_bit_for_bit_and_stays_near_the_list():
    found, again = (trajectory.measure(trajectory.FAST_ENVIRONMENT) for _ in range(2))

    assert found == again
    for step, lines in enumerate(zip(found, trajectory.stored(), strict=True)):
        fast, expected = (
            [float.fromhex(word) for word in line.split()][CROSS_ENTROPIES] for line in lines
        )
        assert fast == pytest.approx(expected, rel=FAST_DISTANCE), f"step {step}"
