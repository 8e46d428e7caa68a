"""Samples that cannot be read: what is wrong with which, and how many a run may do without."""

from collections.abc import Iterable
from typing import NamedTuple

from xar_scale.errors import DataError, XarScaleError


class Fault(NamedTuple):
    """Why one sample could not be had."""

    shard: str
    position: int
    error: XarScaleError  # a DataError where the sample is to blame, and not what it lies on


class BadSamples:
    """The bad samples that a run has met, each counted once however often it comes, and its budget of them."""

    def __init__(self, allowed: int, known: Iterable[tuple[str, int]] = ()) -> None:
        self.allowed = allowed
        self.known = {(shard, position) for shard, position in known}

    def add(self, faults: Iterable[Fault]) -> list[Fault]:
        """The faults of samples that were not known to be bad. The same on all ranks that are given the same faults.

        Raises DataError where there are more bad samples now than ``allowed``, and the error of a fault that is no sample's.
        """
        fresh = dict[tuple[str, int], Fault]()
        for fault in sorted(faults, key=lambda fault: fault[:2]):
            if not isinstance(fault.error, DataError):
                raise fault.error
            if fault[:2] not in self.known:
                fresh.setdefault(fault[:2], fault)
        self.known |= fresh.keys()
        if len(self.known) > self.allowed and fresh:
            first = next(iter(fresh.values()))
            raise DataError(f"{first.error} (bad samples: {len(self.known)}, data.max_bad_samples is {self.allowed})")
        return list(fresh.values())
