"""Pages of the cache, as the host knows them: which are free, who uses them, and the prefix tree of their tokens.

A page belongs to the rows and to the node of the tree that use it, and is free when nobody does. Tokens are only ever
added to a page by the row that took it, behind those that the tree knows, so whoever finds a page may read it.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

PAGE = 64
"""Tokens of a page."""


def count_pages(tokens: int) -> int:
    """Return the pages that hold so many tokens."""
    return -(-tokens // PAGE)


def count_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many first tokens are equal."""
    shorter, same = min(len(a), len(b)), 0
    while same + PAGE <= shorter and a[same : same + PAGE] == b[same : same + PAGE]:
        same += PAGE
    while same < shorter and a[same] == b[same]:
        same += 1
    return same


class Prefix(NamedTuple):
    """A prefix that is in pages: its length, its whole pages, and the page that holds the tokens behind them."""

    count: int
    pages: list[int]
    rest: int | None


class Node:
    """A page in the prefix tree, for the tokens in it behind those of its parent."""

    def __init__(self, tokens: list[int], page: int, parent: "Node | None"):
        self.tokens, self.page, self.parent = tokens, page, parent
        self.children: dict[tuple[int, ...], Node] = {}


class Pages:
    """The pages of one shard of the cache.

    free   pages that nobody uses
    users  the number of rows and nodes that use each page
    """

    def __init__(self, count: int):
        self.free = list(range(count - 1, -1, -1))
        self.users = [0] * count
        self._root = Node([], -1, None)
        self._nodes: dict[Node, None] = {}

    @property
    def known(self) -> int:
        """The number of pages in the tree."""
        return len(self._nodes)

    def take(self, count: int) -> list[int] | None:
        """Return `count` free pages, for which pages that only the tree uses are given up, those first that were used
        longest ago; None if there are not enough."""
        if count > len(self.free):
            for node in list(self._nodes):
                if self.users[node.page] == 1 and not node.children:
                    self._remove(node)
                    if count <= len(self.free):
                        break
        if count > len(self.free):
            return None
        taken = [self.free.pop() for _ in range(count)]
        self.use(taken)
        return taken

    def grow(self, count: int) -> None:
        """Have `count` pages in all."""
        self.free[:0] = range(count - 1, len(self.users) - 1, -1)
        self.users += [0] * (count - len(self.users))

    def use(self, pages: Iterable[int]) -> None:
        """Count one more user of each page."""
        for page in pages:
            self.users[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Count one user less of each page."""
        for page in pages:
            self.users[page] -= 1
            if not self.users[page]:
                self.free.append(page)

    def find(self, tokens: Sequence[int], most: int, ahead: int = 0) -> Prefix:
        """Return the longest prefix of `tokens` in the tree, at most `most` tokens; `ahead` more follow there."""
        path, pages, count = [self._root], [], 0
        while (node := path[-1].children.get(tuple(tokens[count : count + PAGE]))) and len(node.tokens) == PAGE:
            path.append(node)
            pages.append(node.page)
            count += PAGE
        following = tokens[count : count + PAGE]
        near = [(count_common(node.tokens, following), node) for node in path[-1].children.values()]
        more, node = max(near, key=lambda found: found[0], default=(0, None))
        if node is not None and more:
            path.append(node)
            pages.append(node.page)
        self._touch(path)
        known = max(0, min(count + more - ahead, most))
        whole = known // PAGE
        return Prefix(known, pages[:whole], pages[whole] if known % PAGE else None)

    def insert(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Let `tokens`, which are in `pages` of the caller, be found."""
        path = [self._root]
        for i, page in enumerate(pages[: count_pages(len(tokens))]):
            parent, part = path[-1], list(tokens[i * PAGE : (i + 1) * PAGE])
            known = [node for node in parent.children.values() if node.page == page or node.tokens == part]
            longest = max(known, key=lambda node: len(node.tokens), default=None)
            if longest is None or len(longest.tokens) < len(part):
                for node in known:
                    self._remove(node)
                longest = Node(part, page, parent)
                parent.children[tuple(part)] = longest
                self.use([page])
            path.append(longest)
        self._touch(path)

    def forget(self) -> None:
        """Empty the tree."""
        while self._nodes:
            for node in list(self._nodes):
                if not node.children:
                    self._remove(node)

    def _touch(self, path: Sequence[Node]) -> None:
        """Make the nodes of a path the last used ones, a parent later than its children."""
        for node in reversed(path[1:]):
            self._nodes.pop(node, None)
            self._nodes[node] = None

    def _remove(self, node: Node) -> None:
        assert node.parent is not None and not node.children
        del node.parent.children[tuple(node.tokens)]
        self._nodes.pop(node, None)
        self.release([node.page])
