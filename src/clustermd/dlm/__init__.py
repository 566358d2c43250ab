"""The distributed lock manager: a replicated state machine over a process group.

For programs there are `clustermd.lockd.api` (asyncio) and `clustermd.lockd.plain` (threads), described with examples in
`docs/locks.md`; for people `clustermd lock` and `clustermd locks`. The words in which they speak are these:

- a `Mode` says what a holder may do and with whom it goes together: NL, CR, CW, PR, PW, EX;
- a lock is held on a *resource*, a name in a *lockspace*, and may be converted from mode to mode;
- a *value block* of 64 bytes travels with a resource: who gives PW or EX up writes it, who gets a mode reads it;
- a *blocking callback* tells a holder that somebody waits for what it excludes.

They and their exact rules are those of Linux's DLM. Inside: `resource` has the queues and the grant rules, `engine` the
sessions and lockspaces around them, `machine` and `replica` keep one state on all nodes, `session` is a client's side
of it and `lockspace` what that client sees.
"""

from clustermd.dlm.lockspace import Lock, Lockspace, LockspaceEvents, Slot
from clustermd.dlm.modes import Flag, Mode, StatusFlag, compatible

__all__ = [
    "Flag",
    "Lock",
    "Lockspace",
    "LockspaceEvents",
    "Mode",
    "Slot",
    "StatusFlag",
    "compatible",
]
