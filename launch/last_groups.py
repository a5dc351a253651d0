"""How plain scripts come to their end with torch 2.13 and gloo, where torch by itself hangs or aborts.

When a backward pass is done, a thread of gloo has yet to let go of a Python object, for which it needs the
interpreter's lock. Whoever frees the process group meanwhile holds that lock and joins that thread: for ever; and an
interpreter that ends meanwhile has the thread abort. A script that returns after its last step, having called
`destroy_process_group`, frees the group with its DDP model, 0.1 ms after that pass. Started by plain python or torchrun
one in two of such scripts aborts on two ranks; where torch._dynamo is imported beforehand it hangs instead.

Our own runtime closes its group in another order, and needs none of this.
"""

from __future__ import annotations

import functools
import sys
import time
from typing import Any

_LET_GO_S = 0.1  # for threads that wait for the lock: they are let in after 5 ms, if there is a core for them


def keep_last_groups() -> None:
    """Have all groups of gloo, which a script destroys at its end, freed later than by its models.

    `torch.distributed.destroy_process_group` is replaced for that, in a process that has imported torch beforehand.
    """
    if "torch.distributed" not in sys.modules:
        return
    import torch.distributed as dist

    destroy, kept = dist.destroy_process_group, list[Any]()
    known = dist.distributed_c10d._world

    @functools.wraps(destroy)
    def destroy_process_group(group: dist.ProcessGroup | None = None) -> None:
        if group is None or group is dist.group.WORLD:
            # Those of another time before have been idle since, and go now.
            kept[:] = [each for each in known.pg_map if "gloo" in known.pg_backend_config[each]]
        destroy(group)

    for module in (dist, dist.distributed_c10d):
        module.destroy_process_group = destroy_process_group  # type: ignore[attr-defined]  # a module's function


def let_go() -> None:
    """At a script's end: let in whoever waits for the interpreter's lock, before it is too late."""
    if "torch.distributed" in sys.modules:
        time.sleep(_LET_GO_S)
