"""The model of the heap: blocks do not overlap, holes are joined, the threshold grows."""

from hypothesis import given
from hypothesis import strategies as st

from deltaw.analysis.memory.heap import MOST, PADDING, SMALL, THRESHOLD, Heap
from deltaw.analysis.memory.peak import most, peak
from deltaw.analysis.memory.trace import PARTS, Block, Event, Record

MB = 1 << 20


@given(
    st.lists(
        st.tuples(st.integers(1, 6 * MB), st.booleans(), st.booleans(), st.integers(0, 99)),
        min_size=1,
        max_size=60,
    )
)
def test_laws(steps: list[tuple[int, bool, bool, int]]) -> None:
    heap, sizes = Heap(objects=0.6), dict[int, int]()
    for number, (size, frees, graph, which) in enumerate(steps):
        heap.allocate(number, size, graph=graph)
        sizes[number] = size if size > SMALL else 0
        if frees:
            gone = sorted(sizes)[which % len(sizes)]
            heap.free(gone)
            del sizes[gone]
        assert heap.taken >= sum(sizes.values())
        spans = sorted(heap._blocks.values())
        spans += [*heap._objects, *((start, size) for size, start in heap._holes)]
        end = 0
        for start, length in sorted(spans):
            assert start == end
            end = start + length
        assert end == heap.top
    for number in sizes:
        heap.free(number)
    heap.free_graph()
    assert heap.mapped == 0
    assert heap._holes == ([(heap.top, 0)] if heap.top else [])


def test_the_smallest_hole_is_taken() -> None:
    heap = Heap()
    for number, size in enumerate((3 * MB, 2 * SMALL, 2 * MB, 2 * SMALL)):
        heap.allocate(number, size)
    heap.free(0)
    heap.free(2)
    top = heap.top
    heap.allocate(4, 2 * MB)
    heap.allocate(5, 3 * MB)
    assert heap.top == top
    heap.allocate(6, MB)
    assert heap.top == top + -(-(MB + PADDING) // 16) * 16


def test_large_blocks_come_and_go() -> None:
    heap = Heap()
    heap.allocate(0, THRESHOLD)
    assert heap.top == 0 and heap.taken >= THRESHOLD
    heap.free(0)
    assert heap.taken == 0
    heap.allocate(1, THRESHOLD)
    assert heap.top > 0, "the threshold has grown to the size of the freed block"
    heap.allocate(2, MOST + MB)
    heap.free(2)
    heap.allocate(3, MOST + MB)
    assert heap.mapped > MOST, "beyond its limit the threshold does not grow"


def test_objects_of_the_graph_leave_a_hole_too_small() -> None:
    plain, graph = Heap(), Heap(objects=1.0)
    for heap in (plain, graph):
        for number in range(0, 40, 2):
            heap.allocate(number, MB, graph=heap is graph)
            heap.allocate(number + 1, 2 * SMALL, graph=heap is graph)
            heap.free(number)
    assert graph.top > 10 * plain.top


def test_a_second_step_is_played() -> None:
    """What the first step left stays, what it freed comes once more, beside what stayed."""
    blocks = (
        Block(3 * MB, "weights", mapped=True),
        Block(2 * MB, "activations"),
        Block(5 * MB, "optimiser"),
    )
    events = (
        Event(0, True, "load"),
        Event(1, True, "forward"),
        Event(1, False, "backward"),
        Event(2, True, "update"),
    )
    found = peak(Record(blocks, events))
    assert found["weights"] == 3 * MB
    assert found["activations"] == 2 * MB
    assert found["optimiser"] == 5 * MB
    assert 0 <= found["allocator"] < 16384


def test_pages_that_are_never_written_count_for_nothing_but_the_threshold() -> None:
    heap = Heap()
    heap.allocate(0, MB, 8 * MB)
    assert heap.top == 0 and MB <= heap.taken < MB + 8192
    heap.free(0)
    heap.allocate(1, THRESHOLD)
    assert heap.mapped == 0 and heap.top > 0, "the freed block had asked for nine times as much"


def test_what_comes_after_the_last_step_is_played_once() -> None:
    blocks = (Block(MB, "activations"), Block(5 * MB, "temporaries", mapped=True))
    events = (
        Event(0, True, "forward"),
        Event(0, False, "backward"),
        Event(1, True, "end"),
        Event(1, False, "end"),
    )
    assert peak(Record(blocks, events))["temporaries"] == 5 * MB
    assert most(Record(blocks, events)) == {**dict.fromkeys(PARTS, 0), "activations": MB}
