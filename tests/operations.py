"""What a call costs, as a count: entries of an object's containers that it looks at. The same on any machine.

    counted = Counted(BlockAllocator(1000))         its lists, deques, dictionaries and sets now count
    counted.of(lambda: allocator.num_free)          1000 where the free blocks are counted one by one, else 0 or 1

One entry for an index; as many as there are for what walks through all. An end of a deque and a key of a dictionary
cost nothing. A container that an implementation keeps elsewhere is not seen: nothing that is right is refused.
"""

from collections import OrderedDict, deque
from collections.abc import ItemsView, KeysView, ValuesView

KINDS = (list, deque, dict, OrderedDict, set, bytearray)
WALKS = (  # methods that walk through all entries
    "count", "index", "find", "insert", "copy", "sort", "reverse", "rotate", "__add__", "__mul__",
    "__sub__", "__rsub__", "__and__", "__or__", "__xor__", "difference", "intersection", "union", "isdisjoint",
)  # fmt: skip
VIEWS = {"keys": KeysView, "values": ValuesView, "items": ItemsView}
NESTED_UP_TO = 64  # entries of a list whose own entries are looked into, as a list of free lists


class Counted:
    def __init__(self, thing):
        self.entries = 0
        self.kinds = {kind: self._counting(kind) for kind in KINDS}
        for name, value in vars(thing).items():
            setattr(thing, name, self._exchanged(value))

    def of(self, call):
        """How many entries a call looks at."""
        self.entries = 0
        call()
        return self.entries

    def _exchanged(self, value):
        if type(value) not in self.kinds:
            return value
        if isinstance(value, list) and len(value) <= NESTED_UP_TO:
            value = [self._exchanged(entry) for entry in value]
        more = (value.maxlen,) if isinstance(value, deque) else ()
        return self.kinds[type(value)](value, *more)

    def _counting(self, kind):
        """The container, with methods that count."""
        methods = {name: self._walks(getattr(kind, name)) for name in WALKS if hasattr(kind, name)}
        if kind in (list, deque, bytearray):
            methods["__contains__"] = self._walks(kind.__contains__)
            methods["__delitem__"] = self._walks(kind.__delitem__)
            methods["remove"] = self._walks(kind.remove)
        if kind in (dict, OrderedDict):
            methods |= {name: lambda mapping, view=view: view(mapping) for name, view in VIEWS.items()}

        def iterate(container):
            for entry in kind.__iter__(container):
                self.entries += 1
                yield entry

        def pop(container, *index):
            self.entries += len(container) if index and index[0] not in (-1, len(container) - 1) else 1
            return kind.pop(container, *index)

        def item(container, index):
            self.entries += len(range(len(container))[index]) if isinstance(index, slice) else 1
            return kind.__getitem__(container, index)

        methods["__iter__"] = iterate
        if kind in (list, bytearray):
            methods["pop"] = pop
        if kind in (list, bytearray, deque):
            methods["__getitem__"] = item
        return type(f"Counting{kind.__name__}", (kind,), methods)

    def _walks(self, method):
        def walks(container, *arguments, **options):
            self.entries += len(container)
            return method(container, *arguments, **options)

        return walks
