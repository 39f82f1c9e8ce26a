"""Which KV pages are whose: counted references, and full pages kept for whoever begins with the same tokens. Plain Python.

Page 0 is the padding's and never handed out. A page that nobody holds is free, or *kept*: it still has the keys and values of known
tokens and is given out for others only when no page is free, the one unused longest first (as in vLLM's and SGLang's prefix caches).

Pages change hands without waiting for the device: it runs steps in the order in which they were sent, so whoever got a page early
reads it before, and whoever got it late writes it after. For the same reason a page may be shared as soon as the step that fills it
has been planned.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence

Node = int  # a run of tokens from the start of a context, whole pages long
Key = tuple[Node, tuple[int, ...]]  # what comes before a page, and the page's own tokens: compared whole, so nothing can collide


class OutOfPages(Exception):
    """Fewer pages can be had than were asked for."""


class PageAllocator:
    """Hands out the pages 1 to ``num_pages`` - 1."""

    def __init__(self, num_pages: int, page_size: int, max_kept: int | None = None) -> None:
        """``max_kept``: pages that nobody holds and that are kept all the same, None: as many as there are. Pages given back are the
        first to be used again, so a limit also bounds what a cache that takes memory as it is written ever takes."""
        self.num_pages, self.page_size = num_pages, page_size
        self._max_kept = num_pages if max_kept is None else max_kept
        self.num_evictions = 0
        self._free = list(range(num_pages - 1, 0, -1))
        self._holders = [0] * num_pages
        self._nodes: dict[Key, tuple[Node, int]] = {}  # and the page that holds it
        self._keys: dict[int, Key] = {}  # of pages with known contents
        self._kept: OrderedDict[int, None] = OrderedDict()  # pages nobody holds, unused longest first
        self._roots: dict[Hashable, Node] = {}
        self._last_node = 0

    @property
    def num_free(self) -> int:
        """Pages that can be had now."""
        return len(self._free) + len(self._kept)

    @property
    def num_kept(self) -> int:
        """Those of them that still hold a prefix."""
        return len(self._kept)

    def pages_for(self, tokens: int) -> int:
        """Pages that ``tokens`` tokens of one sequence need."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` pages; raises OutOfPages and takes none when there are fewer."""
        if count > self.num_free:
            raise OutOfPages(f"{count} pages asked, {self.num_free} free")
        while len(self._free) < count:
            self._evict()
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Let pages go, in the order of their tokens. The last ones are the first to be given to others: what comes before a page
        can be used without it, but not the other way round."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._keys:
                self._kept[page] = None
            else:
                self._free.append(page)
        while len(self._kept) > self._max_kept:
            self._evict()

    def match(self, tokens: Sequence[int], root: Hashable) -> tuple[list[int], Node]:
        """Take the pages that hold the beginning of these tokens, at most all but the last one, and the node they end in.

        ``root`` names what else keys and values depend on: the weights' version.
        """
        pages: list[int] = []
        node = self._root(root)
        for start in range(0, len(tokens) - self.page_size, self.page_size):
            found = self._nodes.get((node, tuple(tokens[start : start + self.page_size])))
            if found is None:
                break
            node, page = found
            pages.append(page)
        for page in pages:
            self._holders[page] += 1
            self._kept.pop(page, None)
        return pages, node

    def share(self, before: Node, tokens: tuple[int, ...], page: int) -> Node:
        """Note that a held page has the keys and values of these tokens, after the node ``before``; its own node."""
        key = (before, tokens)
        if key not in self._nodes:  # else another page has the same: that one stays known, this one will be free
            self._nodes[key] = self._new_node(), page
            self._keys[page] = key
        return self._nodes[key][0]

    def kept(self, root: Hashable, most: int) -> list[tuple[int, int, tuple[int, ...]]]:
        """Up to ``most`` of the pages that nobody holds but whose tokens are known, used last first: page, index of the one before it
        (-1 for none), tokens. None comes before the one it follows."""
        found: list[tuple[int, int, tuple[int, ...]]] = []
        indices = {self._root(root): -1}
        for page in reversed(self._kept):
            before, tokens = key = self._keys[page]
            if before in indices and len(found) < most:
                indices[self._nodes[key][0]] = len(found)
                found.append((page, indices[before], tokens))
        return found

    def restore(self, pages: Sequence[tuple[int, tuple[int, ...]]], root: Hashable) -> list[int]:
        """Page numbers for `kept` ones of another time, as (index of the one before, tokens), as many as there is room for; they are
        kept here too, and have to be filled before anything else is done."""
        numbers = self.allocate(min(len(pages), self.num_free, self._max_kept))
        nodes: list[Node] = []
        for number, (before, tokens) in zip(numbers, pages, strict=False):
            nodes.append(self.share(self._root(root) if before < 0 else nodes[before], tokens, number))
        self.free(numbers)
        return numbers

    def _root(self, root: Hashable) -> Node:
        if root not in self._roots:
            self._roots[root] = self._new_node()
        return self._roots[root]

    def _new_node(self) -> Node:
        self._last_node += 1
        return self._last_node

    def _evict(self) -> None:
        page, _ = self._kept.popitem(last=False)
        del self._nodes[self._keys.pop(page)]
        self._free.append(page)
        self.num_evictions += 1
