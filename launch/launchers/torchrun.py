"""Ranks started by torch's own elastic agent, on this machine and on the others that meet at its endpoint."""

from __future__ import annotations

from .. import group
from ..elastic import ElasticNode
from ..job import Terms
from ..plan import Plan


def run(plan: Plan) -> int:
    """Start this machine's ranks, let the agent restart them as often as the plan allows, and give the exit code."""
    terms = Terms(plan.nproc, plan.fewest_nodes, plan.nnodes, plan.max_restarts)
    return group.run(plan, ElasticNode(terms, plan.env, plan.rdzv_endpoint)).exit_code
