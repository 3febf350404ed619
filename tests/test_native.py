"""Which instruction sets the extension takes, on processors that are made up."""

from __future__ import annotations

import warnings

import pytest

from dinov2_fast import native

pytestmark = pytest.mark.usefixtures("on_native")

NARROW = ("baseline", "avx2", "avx512")
ALL = (*NARROW, "avx512_bf16", "amx")
FLOATS_ONLY = {"intel": False, "bf16_dot": False, "bf16_tiles": False}
INTEL_WITH_AMX = {"intel": True, "bf16_dot": True, "bf16_tiles": True}
INTEL_WITHOUT = {"intel": True, "bf16_dot": True, "bf16_tiles": False}
AMD_WITH_DOT = {"intel": False, "bf16_dot": True, "bf16_tiles": False}


def levels_of(*, permitted: bool, avx2: bool = True, avx512: bool = True, **has: bool):
    """Levels of a processor, and how often its system was asked for tiles."""
    found = native.module().cpu_levels_of(avx2=avx2, avx512=avx512, permitted=permitted, **has)
    return tuple(found[0]), found[1]


@pytest.mark.parametrize(
    ("has", "permitted", "levels", "asked"),
    [
        (INTEL_WITH_AMX, True, ALL, 1),
        # Without tiles, Intel's dot product is slower than float's: it goes with them.
        (INTEL_WITH_AMX, False, NARROW, 1),
        (INTEL_WITHOUT, True, NARROW, 0),
        (AMD_WITH_DOT, True, ALL[:4], 0),
        (AMD_WITH_DOT | {"bf16_tiles": True}, False, ALL[:4], 1),
        (FLOATS_ONLY, True, NARROW, 0),
        (FLOATS_ONLY | {"avx512": False}, True, NARROW[:2], 0),
        (INTEL_WITH_AMX | {"avx512": False}, True, NARROW[:2], 0),
        (INTEL_WITH_AMX | {"avx2": False}, True, NARROW[:1], 0),
    ],
)
def test_tiles_are_a_level_where_the_system_permits_them(has, permitted, levels, asked):
    assert levels_of(permitted=permitted, **has) == (levels, asked)


def test_this_system_permits_tiles_where_they_are_a_level():
    # Elsewhere the system itself refuses: the processor has none, or they are switched off.
    assert native.module().ask_for_tiles() == ("amx" in native.cpu_levels())


# The first and last sum, one of the ragged block of tiles (rows from 32 on) and one inside.
@pytest.mark.parametrize("damaged", [0, 17 * 112 + 5, 40 * 112 + 100, 48 * 112 - 1])
@pytest.mark.parametrize("level", ["defined_avx512_bf16", "defined_amx"])
def test_one_wrong_sum_of_a_product_is_noticed(level, damaged):
    agrees = native.module().defined_bf16_products_agree_cpu
    assert agrees(level)
    assert not agrees(level, damaged=damaged)


def choose(*names: str, wrong: tuple[str, ...] = ()) -> list[tuple[str, bool]]:
    """(level, whether it multiplies bf16 matrices) on a processor that has every level."""
    return native.module().choose_bf16_products_cpu(names=names, levels=ALL, wrong=wrong)


def test_products_that_come_out_right_are_taken():
    assert choose("auto", "avx512_bf16", "avx512", "avx2") == [
        ("amx", True),
        ("avx512_bf16", True),
        ("avx512", False),
        ("avx2", False),
    ]


def test_products_that_come_out_wrong_are_warned_about_once_and_left():
    with pytest.warns(RuntimeWarning, match="by amx come out wrong") as caught:
        assert choose("auto", "auto", wrong=("amx",)) == [("amx", False)] * 2
    assert len(caught) == 1


def test_products_that_come_out_wrong_are_refused_by_name():
    with pytest.raises(ValueError, match=r"by amx come out wrong.*use another"):
        choose("amx", wrong=("amx",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("avx512_bf16", wrong=("amx",)) == [("avx512_bf16", True)]
