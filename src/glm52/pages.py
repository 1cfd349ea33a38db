"""Which pages of the row pool are whose: allocation, and sharing of equal prefixes by content. No torch, no model.

A page holds ``page_size`` consecutive rows. A full page whose tokens are known is *committed*: a later sequence that
begins with the same tokens uses it instead of computing it. Content is compared, not hashed away: a page is found
through its parent and its own tokens. Released pages keep their content and are given out again oldest first.

The MTP layer's row of a position depends on the token after it. So the last MTP row of a shared prefix may have been
written for another continuation; that can cost a draft its acceptance and can never change an output.
"""

from collections import OrderedDict
from collections.abc import Sequence

from glm52.errors import CapacityError

_ROOT = 0
_Block = tuple[int, tuple[int, ...]]


class Pages:
    """Accounting of ``num_pages`` pages. A page is free (never committed), cached (committed, unused) or in use."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self._users = [0] * num_pages
        self._unused: OrderedDict[int, None] = OrderedDict((page, None) for page in range(num_pages))
        self._blocks: dict[_Block, tuple[int, int]] = {}  # (parent node, tokens) -> (node, page)
        self._block_of: dict[int, _Block] = {}  # committed page -> its block
        self._next_node = _ROOT + 1

    @property
    def available(self) -> int:
        """Pages that could be allocated now."""
        return len(self._unused)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def match(self, tokens: Sequence[int]) -> list[int]:
        """Take the committed pages of the longest shared prefix; at least the last token is left to be computed."""
        pages, node = [], _ROOT
        for begin in range(0, len(tokens) - self.page_size, self.page_size):
            found = self._blocks.get((node, tuple(tokens[begin : begin + self.page_size])))
            if found is None:
                break
            node, page = found
            pages.append(page)
            self._use(page)
        return pages

    def allocate(self, count: int) -> list[int]:
        """Take pages, oldest unused first; what they cached is forgotten. CapacityError if there are too few."""
        if count > self.available:
            raise CapacityError(
                f"cache: {count} pages of {self.page_size} rows are needed, {self.available} are unused"
            )
        pages = []
        for _ in range(count):
            page = next(iter(self._unused))
            block = self._block_of.pop(page, None)
            if block is not None:
                del self._blocks[block]
            self._use(page)
            pages.append(page)
        return pages

    def commit(self, pages: Sequence[int], tokens: Sequence[int]) -> None:
        """Make the full pages that hold ``tokens`` findable. Content that another page holds stays with that page."""
        node = _ROOT
        for page, begin in zip(pages, range(0, len(tokens) - self.page_size + 1, self.page_size), strict=False):
            block = (node, tuple(tokens[begin : begin + self.page_size]))
            if block not in self._blocks:
                if page in self._block_of:  # its parent was forgotten and is committed anew
                    del self._blocks[self._block_of[page]]
                self._blocks[block] = (self._next_node, page)
                self._block_of[page] = block
                self._next_node += 1
            node = self._blocks[block][0]

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back. A prefix is forgotten from its end: the last page becomes the oldest of them."""
        for page in reversed(pages):
            assert self._users[page] > 0
            self._users[page] -= 1
            if not self._users[page]:
                self._unused[page] = None
                if page not in self._block_of:
                    self._unused.move_to_end(page, last=False)

    def _use(self, page: int) -> None:
        self._users[page] += 1
        self._unused.pop(page, None)

    def check(self, in_use: Sequence[Sequence[int]] = ()) -> None:
        """Assert every invariant, given the pages each living sequence holds."""
        users = [0] * self.num_pages
        for pages in in_use:
            assert len(set(pages)) == len(pages), "a sequence holds a page twice"
            for page in pages:
                users[page] += 1
        assert users == self._users, "reference counts"
        assert set(self._unused) == {page for page, n in enumerate(users) if not n}, "unused pages"
        assert {page: block for block, (_, page) in self._blocks.items()} == self._block_of, "index of content"
