"""What a kernel can do wrong: the error that is raised, and which checks are made."""

from __future__ import annotations

from dataclasses import dataclass


class Fault(Exception):
    """A kernel did what a GPU would not forgive, or what only luck makes right.

    `kind` is one of: bounds, misaligned, uninitialised, race, hazard, in-flight, proxy, mbarrier,
    deadlock, divergence, pending, wgmma, unsupported.
    """

    def __init__(self, kind: str, message: str, inst: object = None, lane: str = "") -> None:
        self.kind = kind
        self.inst = inst
        self.line = getattr(inst, "line", None)
        self.source = getattr(inst, "source", None)
        at = f"\n  at {inst}" if inst is not None else ""
        who = f"\n  by {lane}" if lane else ""
        super().__init__(f"{kind}: {message}{at}{who}")


@dataclass(frozen=True)
class Checks:
    """Which checks are made; all of them by default."""

    bounds: bool = True
    misaligned: bool = True
    # "fault": reading what nobody wrote is an error. "poison": it reads as NaN and is counted.
    uninitialised: str = "fault"
    race: bool = True  # between warps, and hazards between the lanes of a warp
    global_race: bool = True
    in_flight: bool = True
    proxy: bool = True
    mbarrier: bool = True
    divergence: bool = True
    pending: bool = True  # leaving with copies in flight
    wgmma: bool = True  # registers touched without wgmma.fence
    # One store by which lanes of a warp write different values to one place. Triton lets lanes
    # that hold the same sum, but for its rounding, write it together.
    same_store: bool = True

    @classmethod
    def none(cls) -> Checks:
        """No check that could be left out."""
        return cls(False, False, "poison", *[False] * 9)

    @property
    def shadow(self) -> bool:
        """Whether shared memory needs a shadow."""
        return self.race or self.in_flight or self.proxy or self.uninitialised == "fault"
