"""The heap of a Linux process: what glibc's malloc takes of memory for what torch asks of it.

A request of the mapping threshold or more gets pages of its own, which leave with it. Any other is
put into the smallest hole that holds it, or on top of the heap. A freed block is joined with the
holes beside it and stays resident. A hole on top that is larger than twice the threshold is given
back down to what is small and in use within it, which is taken to lie in its middle, once a graph
has been run backwards. The threshold grows to the size of every mapped block that is freed, up to
32 MiB.

Torch wants blocks that begin at a multiple of 64, so malloc looks for `PADDING` bytes more and
gives them back. While a graph is built, its small objects move in there and stay until it has been
run backwards. Then a freed block is a little too small for the next one of its size, and the heap
grows instead: this is most of what a process holds beyond its tensors.

Source: glibc, malloc/malloc.c (best fit, `_int_memalign`, the dynamic `mmap_threshold`,
`systrim`).
"""

from bisect import bisect_left, insort

THRESHOLD, MOST = 4 << 20, 32 << 20
"""Where the mapping threshold is once torch and transformers are imported, and where it ends."""
TRIM = 2
"""From how many times the threshold on a hole on top is given back."""
PADDING = 96
"""The alignment of 64 bytes, and the 32 of the smallest block."""
SMALL = 1024
"""Blocks up to this size come from caches that are filled anyway."""
PAGE = 4096


class Heap:
    """Blocks by number, and the bytes of memory that they take together.

    Args:
        objects: the share of paddings that an object of the graph moves into.
    """

    def __init__(self, objects: float = 0.0) -> None:
        self.top = 0
        self.mapped = 0
        self._threshold = THRESHOLD
        self._blocks: dict[int, tuple[int, int]] = {}
        self._apart: dict[int, tuple[int, int]] = {}
        self._holes: list[tuple[int, int]] = []
        self._starts: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._objects: list[tuple[int, int]] = []
        self._share = objects
        self._due = 0.0

    @property
    def taken(self) -> int:
        """Bytes of memory that the process has got."""
        return self.top + self.mapped

    def allocate(
        self,
        number: int,
        size: int,
        untouched: int = 0,
        *,
        mapped: bool = False,
        graph: bool = False,
    ) -> None:
        """Find room for a block; in pages of its own if `mapped`, while a `graph` is built.

        Of `size + untouched` bytes that are asked for only the first are written to.
        """
        if size <= SMALL:
            return
        need = -(-(size + PADDING) // 16) * 16
        if mapped or need + untouched >= self._threshold:
            need = -(-need // PAGE) * PAGE
            self.mapped += need
            self._apart[number] = need, need + untouched
            return
        start = self._room(need)
        self._due += self._share * graph
        if self._due >= 1:
            self._due -= 1
            need -= PADDING
            self._objects.append((start + need, PADDING))
        self._blocks[number] = start, need

    def free(self, number: int) -> None:
        """Give a block back."""
        if number in self._blocks:
            self._leave(*self._blocks.pop(number))
            return
        size, asked = self._apart.pop(number, (0, 0))
        self.mapped -= size
        if asked <= MOST:
            self._threshold = max(self._threshold, asked)

    def free_graph(self) -> None:
        """Give back what the objects of the graph took, and half of a large hole on top."""
        for start, size in self._objects:
            self._leave(start, size)
        self._objects = []
        last = self._ends.get(self.top, 0)
        if last >= TRIM * self._threshold:
            start, kept = self.top - last, last // 32 * 16
            self._take(start, last)
            self._put(start, kept)
            self.top = start + kept

    def _room(self, need: int) -> int:
        """Return where a block begins: in the smallest hole that holds it, or on top."""
        place = bisect_left(self._holes, (need, 0))
        if place == len(self._holes):
            last = self._ends.get(self.top, 0)
            start = self.top - last
            if last:
                self._take(start, last)
            self.top = start + need
            return start
        size, start = self._holes[place]
        self._take(start, size)
        self._put(start + need, size - need)
        return start

    def _leave(self, start: int, size: int) -> None:
        """Make a hole, one with those that lie beside it."""
        after = self._starts.get(start + size, 0)
        if after:
            self._take(start + size, after)
        before = self._ends.get(start, 0)
        if before:
            self._take(start - before, before)
        self._put(start - before, before + size + after)

    def _put(self, start: int, size: int) -> None:
        if size:
            insort(self._holes, (size, start))
            self._starts[start] = size
            self._ends[start + size] = size

    def _take(self, start: int, size: int) -> None:
        self._holes.pop(bisect_left(self._holes, (size, start)))
        del self._starts[start], self._ends[start + size]
