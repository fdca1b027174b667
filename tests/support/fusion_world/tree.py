"""A radix tree of single tokens with locks, one per namespace, and the free list of the pool."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from rag_pipeline.sglang_plugin.fusion.request.namespace import RadixNamespace


class Node:
    """One token of the tree and the slot that holds its KV."""

    __slots__ = ("children", "locks", "parent", "slot", "token")

    def __init__(self, token: int, slot: int, parent: Node | None) -> None:
        self.token, self.slot, self.parent = token, slot, parent
        self.children: dict[int, Node] = {}
        self.locks = 0


class Tree:
    """Exact KV by tokens."""

    def __init__(self, free: list[int]) -> None:
        self.free = free
        self.roots: dict[Hashable, Node] = {}

    def _root(self, space: Hashable) -> Node:
        return self.roots.setdefault(space, Node(-1, 0, None))

    def path(self, space: Hashable, ids: Sequence[int]) -> list[Node]:
        """Nodes of the longest prefix that is stored."""
        node, found = self._root(space), []
        for token in ids:
            node = node.children.get(token)
            if node is None:
                break
            found.append(node)
        return found

    def match_prefix(self, params: Any) -> Any:
        """SGLang's look-up, with the path beside what fusion reads of the answer."""
        key = params.key
        path = self.path(RadixNamespace(key.extra_key, key.cache_salt), key.raw_token_ids())
        return SimpleNamespace(device_prefix_len=len(path), host_hit_length=0, path=path)

    def insert(self, space: Hashable, ids: Sequence[int], slots: Sequence[int]) -> list[int]:
        """Store tokens; the slots that hold them now. Given slots that were there already are freed."""
        node, kept = self._root(space), []
        for token, slot in zip(ids, slots, strict=True):
            child = node.children.get(token)
            if child is None:
                child = node.children[token] = Node(token, slot, node)
            elif child.slot != slot:
                self.free.append(slot)
            kept.append(child.slot)
            node = child
        return kept

    def lock(self, nodes: Sequence[Node], by: int) -> None:
        """Change the locks of a path."""
        for node in nodes:
            node.locks += by
            assert node.locks >= 0

    def leaves(self) -> Iterator[tuple[Hashable, list[Node]]]:
        """Every leaf's path, with its namespace."""
        for space, root in self.roots.items():
            stack = [[child] for child in root.children.values()]
            while stack:
                path = stack.pop()
                if not path[-1].children:
                    yield space, path
                stack += [[*path, child] for child in path[-1].children.values()]

    def evict(self, keep: int) -> int:
        """Free unlocked nodes of every leaf down to depth ``keep``; how many."""
        freed = 0
        for _, path in list(self.leaves()):
            for node in reversed(path[keep:]):
                if node.locks or node.children or node.parent is None:
                    break
                del node.parent.children[node.token]
                self.free.append(node.slot)
                freed += 1
        return freed

    def slots(self) -> list[int]:
        """All slots that the tree owns."""
        owned, stack = [], list(self.roots.values())
        while stack:
            node = stack.pop()
            stack += node.children.values()
            if node.parent is not None:
                owned.append(node.slot)
        return owned
