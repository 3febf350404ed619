"""The cases of tools.kernel_report, which reach every instance of our CUDA kernels.

On a GPU each backend computes all of them; on the CPU, where the report executes the kernels as
PTX, the C++ kernels do, which shows that the cases are right.
"""

from __future__ import annotations

import pytest
import torch

from dinov2_fast.backends import availability
from dinov2_fast.errors import BackendUnavailable
from tests.tolerance import assert_within_error_budget
from tools.kernel_report.__main__ import CASES
from tools.kernel_report.cases import Case, Place, as_it_is, exactly

CONTENDERS = [
    pytest.param("cpu", "native"),
    pytest.param("cuda", "native", marks=pytest.mark.gpu),
    pytest.param("cuda", "triton", marks=pytest.mark.gpu),
]
MOST_NUMBERS_ON_A_CPU = 10_000  # what the reference takes in under a second; more are slow


def quick(case: Case) -> bool:
    return max(case.sizes) <= MOST_NUMBERS_ON_A_CPU and 1370 not in case.sizes


@pytest.mark.parametrize(("place", "ours"), CONTENDERS)
@pytest.mark.parametrize(
    ("stem", "case"),
    [
        pytest.param(
            stem, case, id=f"{stem}-{case.shape}", marks=[] if quick(case) else pytest.mark.slow
        )
        for stem, cases in CASES.items()
        for case in cases
    ],
)
def test_every_case_matches_the_reference(stem: str, case: Case, place: str, ours: str):
    if place == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    reason = availability(stem, place)[ours]
    if reason:
        pytest.skip(reason)

    def calls(backend: str, inputs: Place = as_it_is) -> list[tuple[str, dict[str, torch.Tensor]]]:
        with torch.device(place):
            return list(case.run(case.sizes, case.types, inputs, backend))

    low, truth = calls("reference"), calls("reference", exactly)
    try:
        found = calls(ours)
    except BackendUnavailable as error:
        assert (place, ours) != ("cuda", "native")  # the cases are made for those kernels
        pytest.skip(str(error))
    for (call, outputs), (_, expected), (_, exact) in zip(found, low, truth, strict=True):
        for name, out in outputs.items():
            assert_within_error_budget(
                out, low_precision=expected[name], truth=exact[name], name=f"{stem} {call} {name}"
            )
