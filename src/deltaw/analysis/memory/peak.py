"""The most memory that a recorded run takes, and what it consists of at that moment."""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from deltaw.analysis.memory.heap import SMALL, Heap
from deltaw.analysis.memory.trace import PARTS, Event, Record

ALLOCATOR = "allocator"
ONCE = ("load", "begin", "end")
"""The phases that are no part of a step."""
OUTSIDE = ("load", "end")
"""The phases that are not on a GPU."""
NODES, SAVED = 0.3, 0.75
"""How many small objects of a graph outlive the blocks around them: for each block that is made
while it is built, and for each that it keeps; measured."""


def peak(record: Record) -> dict[str, int]:
    """Return the bytes of every part, and of the allocator's holes, when they are the most.

    The step that was recorded is the first, which makes the optimiser's state; a second one is
    played after it, which makes all but what stayed.
    """
    heap, live = Heap(_objects(record)), Counter(dict.fromkeys(PARTS, 0))
    most, found = -1, dict(live)
    blocks = record.blocks
    first = [event for event in record.events if event.phase != "end"]
    events = [*first, *_again(record), *(e for e in record.events if e.phase == "end")]
    for event, following in pairwise([*events, Event(0, False, "")]):
        block = blocks[event.number % len(blocks)]
        if event.born:
            live[block.part] += block.size
            graph = event.phase == "forward"
            heap.allocate(
                event.number, block.size, block.untouched, mapped=block.mapped, graph=graph
            )
            again = event.number >= len(blocks)
            if heap.taken > most and (again or event.phase in ONCE):
                most = heap.taken
                found = {**live, ALLOCATOR: max(heap.taken - live.total(), 0)}
        else:
            live[block.part] -= block.size
            heap.free(event.number)
        if event.phase == "backward" != following.phase:
            heap.free_graph()
    return found


def most(record: Record) -> dict[str, int]:
    """Return the bytes of every part when all tensors together are the most, after loading."""
    live, found, total = Counter(dict.fromkeys(PARTS, 0)), dict[str, int](), -1
    for event in [*record.events, *_again(record)]:
        block = record.blocks[event.number % len(record.blocks)]
        live[block.part] += block.size if event.born else -block.size
        if event.phase not in OUTSIDE and live.total() > total:
            total, found = live.total(), dict(live)
    return found


def _again(record: Record) -> Iterator[Event]:
    """Yield the events of a second step, with numbers beyond those of all blocks."""
    dead = {event.number for event in record.events if not event.born}
    step = [event for event in record.events if event.phase not in ONCE]
    passing = dead & {event.number for event in step if event.born}
    for event in step:
        if event.number in passing:
            yield Event(event.number + len(record.blocks), event.born, event.phase)


def _objects(record: Record) -> float:
    """Return how many small objects a graph has for each of its blocks, at most one."""
    numbers = [e.number for e in record.events if e.born and e.phase == "forward"]
    made = [block for n in numbers if (block := record.blocks[n]).size > SMALL]
    kept = sum(block.part == "activations" for block in made)
    return min(1.0, NODES + SAVED * kept / max(len(made), 1))
