"""Groups in pickles of whole models: ``torch.save(model)``, multiprocessing, joblib.

The container of a group's root is pickled as the whole group. Members and other containers are
pickled as None, and are made again when the root is unpickled. A part that is pickled alone has no
group when it is unpickled, as with deepcopy. An import of this file registers that with
``copyreg``.
"""

from __future__ import annotations

import copyreg
from typing import Any, NamedTuple

from torch import nn

from ..hook_ids import count_on_from, last_hook_id
from . import scopes
from .members import Container, Member, NormedList, Roster
from .running import steps
from .threads import new_threads


class _PickledMember(NamedTuple):
    place: int
    weights: NormedList
    name: str
    bucket: int
    around: list[nn.Module]


class _PickledGroup(NamedTuple):
    reuse: str
    autocast: bool
    root: int
    """The index of the root's container."""
    counts: tuple[int, int]
    """How many members and containers there were, including those that no longer exist."""
    members: list[_PickledMember]
    containers: list[tuple[int, nn.Module, list[int]]]
    last_hook: int
    """The highest number of a hook, see wnkernel/hook_ids.py."""


def _reduce_member(member: Member) -> tuple[Any, ...]:
    return _nothing, ()


def _reduce_container(container: Container) -> tuple[Any, ...]:
    roster, root = container.roster, container.module()
    if root is None or not container.is_root():
        return _nothing, ()
    members = [
        _PickledMember(m.index, weights, m.name, m.bucket, m.modules_around())
        for ref in roster.members
        if (m := ref()) is not None and (weights := m.weights()) is not None
    ]
    containers = [
        (c.index, module, sorted(c.members))
        for ref in roster.containers
        if (c := ref()) is not None and (module := c.module()) is not None
    ]
    counts = len(roster.members), len(roster.containers)
    group = _PickledGroup(
        roster.reuse,
        roster.autocast,
        container.index,
        counts,
        members,
        containers,
        last_hook_id(module for _, module, _ in containers),
    )
    # The state comes after the object, so that references to the root in it find this object.
    return Container.__new__, (Container,), group, None, None, _restore


def _restore(container: Container, group: _PickledGroup) -> None:
    """Make a group again, around the container of its root."""
    count_on_from(group.last_hook)
    modules = {index: module for index, module, _ in group.containers}
    roster = Roster(modules[group.root], group.reuse, group.autocast, new_threads)
    roster.reserve(*group.counts)
    for m in group.members:
        m.weights.owner = Member(roster, m.weights, m.name, m.bucket, m.around, m.place)
        m.weights.bucket, m.weights.casts = m.bucket, group.autocast
    for index, module, members in group.containers:
        if index == group.root:
            Container.__init__(container, roster, module, members, index)
        else:
            setattr(module, scopes.ATTRIBUTE, Container(roster, module, members, index))
    steps.watch()


def _nothing() -> None:
    """Unpickle a part of a group without its root as None."""


copyreg.pickle(Member, _reduce_member)
copyreg.pickle(Container, _reduce_container)
