"""Samples that cannot be read: what is wrong with which, and how many a run may do without."""

from collections.abc import Iterable
from typing import NamedTuple

from xar_scale.errors import ConfigError, DataError, XarScaleError


class Fault(NamedTuple):
    """Why one sample could not be had."""

    shard: str
    position: int
    error: XarScaleError
    fatal: bool = False  # the run cannot do without: not the sample is to blame but what it lies on, or there is no other


class BadSamples:
    """The bad samples that a run has met, each counted once however often it comes, and its budget of them.

    Every rank holds the same: it is told of all ranks' faults.
    """

    def __init__(self, allowed: int, known: Iterable[tuple[str, int]] = ()) -> None:
        """Raises ConfigError where the run has met more than ``allowed`` already."""
        self.allowed = allowed
        self.known = {(shard, position) for shard, position in known}
        if len(self.known) > allowed:
            raise ConfigError(f"data.max_bad_samples is {allowed}, but the run has already met {len(self.known)}")

    def new_faults(self, faults: Iterable[Fault]) -> list[Fault]:
        """Those of ``faults`` that the run does not know of, one for each sample, in order."""
        fresh = dict[tuple[str, int], Fault]()
        for fault in sorted(faults, key=lambda fault: (*fault[:2], not fault.fatal)):  # of a sample's, what is fatal first
            if fault.fatal or fault[:2] not in self.known:
                fresh.setdefault(fault[:2], fault)
        return list(fresh.values())

    def add(self, faults: Iterable[Fault]) -> list[Fault]:
        """Count all ranks' news. Raises the error of one that is fatal, and DataError where there are more than ``allowed``."""
        fresh = self.new_faults(faults)
        for fault in fresh:
            if fault.fatal:
                raise fault.error
        self.known |= {fault[:2] for fault in fresh}
        if len(self.known) > self.allowed:
            raise DataError(f"{fresh[0].error} (bad samples: {len(self.known)}, data.max_bad_samples is {self.allowed})")
        return fresh
