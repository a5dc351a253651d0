"""Ranks started by torch's own elastic agent, on this machine and on the others that meet at its endpoint."""

from __future__ import annotations

from .. import group
from ..elastic import ElasticNode
from ..plan import Plan


def run(plan: Plan) -> int:
    """Start this machine's ranks, let the agent restart them as often as the plan allows, and give the exit code."""
    return group.run(
        plan, ElasticNode(plan.nproc, plan.env, plan.max_restarts, plan.nnodes, plan.rdzv_endpoint)
    ).exit_code
