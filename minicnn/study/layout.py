"""Where the steps stand in the drawing: one below the other, in lanes side by side, so that a branch is seen as one.

Like the graph of a version history: a step continues the lane of the value it uses up; a value that is still needed further down
keeps its lane, and what is made of it meanwhile runs in another.
"""
from __future__ import annotations

from typing import NamedTuple

from minicnn.study.tape import Tape


class Edge(NamedTuple):
    """From the step that made a value (-1: it came from outside) to one that uses it, in a lane."""

    source: int
    target: int
    lane: int


class Layout(NamedTuple):
    """The lane of each step, and the edges between them."""

    lanes: list[int]
    edges: list[Edge]
    width: int              # how many lanes there are


def layout(tape: Tape) -> Layout:
    """Give every step of a tape its lane. Parameters and constants are no edges; the model's input and leaves are."""
    uses = {v.number: [n for n in v.used_by if n < len(tape.steps)] for v in tape.values}
    flows = {v.number for v in tape.values if v.kind in ("input", "leaf", "step")}
    in_lane: dict[int, int] = {}            # value -> the lane that it occupies until its last use
    lanes: list[int] = []
    edges: list[Edge] = []
    for step in tape.steps:
        arriving = list(dict.fromkeys(v.number for v in step.inputs.values() if v.number in flows))
        for number in arriving:
            if number not in in_lane:
                in_lane[number] = _first_free(in_lane)
        ending = [number for number in arriving if uses[number][-1] == step.number]
        lane = min((in_lane[number] for number in ending), default=None)
        for number in arriving:
            made_by = tape.values[number].made_by
            edges.append(Edge(-1 if made_by is None else made_by, step.number, in_lane[number]))
        for number in ending:
            del in_lane[number]
        lane = _first_free(in_lane) if lane is None else lane
        lanes.append(lane)
        if uses[step.output.number]:
            in_lane[step.output.number] = lane
    return Layout(lanes, edges, 1 + max([*lanes, *(edge.lane for edge in edges)], default=0))


def _first_free(in_lane: dict[int, int]) -> int:
    taken = set(in_lane.values())
    return next(lane for lane in range(len(taken) + 1) if lane not in taken)
