"""Bad samples: why each cannot be read, and how many a run may skip."""

from collections.abc import Iterable
from typing import NamedTuple

from xar_scale.errors import ConfigError, DataError, XarScaleError


class Fault(NamedTuple):
    """Why one sample could not be read."""

    shard: str
    position: int
    error: XarScaleError
    fatal: bool = False  # ends the run: the storage is at fault and not the sample, or there is no substitute


class BadSamples:
    """The bad samples that a run has met, each counted once however often it comes, and the budget for them.

    Every rank holds the same state, because it gets the faults of all ranks.
    """

    def __init__(self, allowed: int, known: Iterable[tuple[str, int]] = ()) -> None:
        """Raises ConfigError if the run has already met more than ``allowed``."""
        self.allowed = allowed
        self.known = {(shard, position) for shard, position in known}
        if len(self.known) > allowed:
            raise ConfigError(f"data.max_bad_samples is {allowed}, but the run has already met {len(self.known)}")

    def new_faults(self, faults: Iterable[Fault]) -> list[Fault]:
        """Return the ``faults`` that are new to the run, or fatal: one per sample, in order."""
        fresh = dict[tuple[str, int], Fault]()
        for fault in sorted(faults, key=lambda fault: (*fault[:2], not fault.fatal)):  # a sample's fatal fault first
            if fault.fatal or fault[:2] not in self.known:
                fresh.setdefault(fault[:2], fault)
        return list(fresh.values())

    def add(self, faults: Iterable[Fault]) -> list[Fault]:
        """Count all ranks' new faults. Raises the error of a fatal one, and DataError if there are more than ``allowed``."""
        fresh = self.new_faults(faults)
        for fault in fresh:
            if fault.fatal:
                raise fault.error
        self.known |= {fault[:2] for fault in fresh}
        if len(self.known) > self.allowed:
            raise DataError(f"{fresh[0].error} (bad samples: {len(self.known)}, data.max_bad_samples is {self.allowed})")
        return fresh
