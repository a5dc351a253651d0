"""Ranks as processes on this machine."""

from __future__ import annotations

from .. import group
from ..plan import Plan
from ..supervise import Node


def run(plan: Plan) -> int:
    """Start the ranks, restart them as often as the plan allows, and give the exit code."""
    return group.run(plan, Node(plan.nproc, plan.start_method, plan.env)).exit_code
