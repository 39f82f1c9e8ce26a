"""Which KV pages are free. Plain Python; page 0 is the padding's and never handed out."""


class OutOfPages(Exception):
    """Fewer pages are free than were asked for."""


class PageAllocator:
    """A stack of free page numbers, 1 to ``num_pages`` - 1."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages - 1, 0, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that ``tokens`` tokens of one sequence need."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` pages; raises OutOfPages and takes none when there are fewer."""
        if count > len(self._free):
            raise OutOfPages(f"{count} pages asked, {len(self._free)} free")
        return [self._free.pop() for _ in range(count)]

    def free(self, pages: list[int]) -> None:
        """Give pages back."""
        self._free.extend(reversed(pages))
