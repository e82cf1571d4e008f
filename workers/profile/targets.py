"""The functions that a profile names, and how they get their names: replaced while it records, and put back at its end.

So code that can be profiled carries nothing of it, and costs nothing while no profile records.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Function = Callable[..., Any]


@dataclass(frozen=True)
class Target:
    """`owner.name`, a method of a class, an object or a module; `label`: what the trace calls it. instead: runs in its place, unnamed."""

    owner: Any
    name: str
    label: str
    instead: Function | None = None


@contextlib.contextmanager
def replaced(targets: Iterable[Target], wrap: Callable[[str, Function], Function]) -> Iterator[None]:
    """Inside the block, each target is what `wrap` makes of its label and of itself. Raises AttributeError for one that does not exist."""
    with contextlib.ExitStack() as stack:
        for target in targets:
            function = getattr(target.owner, target.name)
            # What the owner inherits or has from its class is not its own, and is found again once the replacement is gone.
            own = vars(target.owner).get(target.name)
            if own is None:
                stack.callback(delattr, target.owner, target.name)
            else:
                stack.callback(setattr, target.owner, target.name, own)
            setattr(target.owner, target.name, target.instead or wrap(target.label, function))
        yield
