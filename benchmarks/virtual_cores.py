"""Regions of a step on virtual cores: what the extension records of their tasks, and when they would end."""

from __future__ import annotations

import collections
import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from contrastive_ops.core import extension

REGION_SECONDS = 5e-6  # to hand a region to threads that are awake, and to wait for the last

Stages = tuple[tuple[int, tuple[int, ...]], ...]  # of each: its tasks, and the stages that it waits for


@dataclass(frozen=True)
class Region:
    """Tasks that were handed out together, in their order, with the seconds of each."""

    stages: Stages
    seconds: tuple[float, ...]

    def makespan(self, cores: int) -> float:
        """Seconds until the last task ends: the core that is free first takes the next one, and waits for its stage."""
        free = [0.0] * min(cores, len(self.seconds))
        ends: list[float] = []
        tasks = iter(self.seconds)
        for count, after in self.stages:
            begin = max((ends[stage] for stage in after), default=0.0)
            end = begin
            for _ in range(count):
                done = max(free[0], begin) + next(tasks)
                heapq.heapreplace(free, done)
                end = max(end, done)
            ends.append(end)
        return max(free)


@dataclass(frozen=True)
class Modelled:
    """One step on some cores: its regions, and the seconds outside of them."""

    cores: int
    regions: tuple[Region, ...]
    outside: float

    @property
    def work(self) -> float:
        """Seconds of all tasks."""
        return sum(sum(region.seconds) for region in self.regions)

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        handed_out = sum(len(region.seconds) > 1 and self.cores > 1 for region in self.regions)
        return self.outside + sum(region.makespan(self.cores) for region in self.regions) + handed_out * REGION_SECONDS

    def lost(self) -> list[tuple[float, int, int, float, float]]:
        """(seconds lost, regions, their tasks, work, longest task) of the regions of as many tasks, the worst first."""
        groups: dict[int, list[Region]] = {}
        for region in self.regions:
            groups.setdefault(len(region.seconds), []).append(region)
        found = []
        for tasks, alike in groups.items():
            work = sum(sum(region.seconds) for region in alike)
            lost = sum(region.makespan(self.cores) for region in alike) - work / self.cores
            found.append((lost, len(alike), tasks, work, max(max(region.seconds) for region in alike)))
        return sorted(found, reverse=True)


def record(step: Callable[[], object], cores: int) -> Modelled:
    """One step in tasks that are cut for so many cores, on this thread."""
    switch = extension.load().virtual_cores
    switch(cores)
    try:
        begin = time.thread_time()
        step()
        whole = time.thread_time() - begin
    finally:
        recorded = switch(0)
    regions = tuple(
        Region(tuple((tasks, tuple(after)) for tasks, after in stages), tuple(seconds))
        for _, _, stages, seconds in recorded
    )
    return Modelled(cores, regions, whole - sum(elapsed for elapsed, *_ in recorded))


def fastest(found: Sequence[Modelled]) -> list[Modelled]:
    """The same records with the least seconds of each task, and of what is outside.

    Regions of the same tasks share what was recorded, whatever they were cut for: the n-th of its kind of every step.
    """
    least: dict[tuple[Stages, int], tuple[float, ...]] = {}
    outside: dict[int, float] = {}
    named: list[list[tuple[Stages, int]]] = []
    for each in found:
        counts: collections.Counter[Stages] = collections.Counter()
        names = []
        for region in each.regions:
            name = region.stages, counts[region.stages]
            counts[region.stages] += 1
            names.append(name)
            least[name] = tuple(map(min, least.get(name, region.seconds), region.seconds))
        named.append(names)
        outside[len(names)] = min(outside.get(len(names), each.outside), each.outside)
    return [
        Modelled(each.cores, tuple(Region(name[0], least[name]) for name in names), outside[len(names)])
        for each, names in zip(found, named, strict=True)
    ]


def model(step: Callable[[], object], counts: Sequence[int], rounds: int) -> list[Modelled]:
    """A step on each number of virtual cores, in turns, and then in so many rounds for each way it is cut.

    Regions that are cut alike share their records, so that what is compared is how tasks are scheduled and not when
    they were timed. Others are cut for their cores, and timed as often.
    """
    found: dict[int, list[Modelled]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for turn in range(rounds + 1):
            cuts = {tuple(region.stages for region in first.regions): cores for cores, (first, *_) in found.items()}
            for cores in counts if turn == 0 else cuts.values():
                found.setdefault(cores, []).append(record(step, cores))
    finally:
        torch.set_num_threads(threads)
    every = fastest([each for cores in counts for each in found[cores]])
    return [next(each for each in every if each.cores == cores) for cores in counts]
