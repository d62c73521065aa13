"""Planners: search over action chunks with a World Action Model."""

from wamrl.planners.cem import cem_refit, make_cem
from wamrl.planners.gates import Always, Uncertainty
from wamrl.planners.mppi import make_mppi, mppi_refit
from wamrl.planners.proposers import NoiseProposer, PolicyProposer
from wamrl.planners.scorers import ReturnScorer
from wamrl.planners.shooting import NonFinitePlanError, Refit, ShootingPlanner

__all__ = [
    "Always",
    "NoiseProposer",
    "NonFinitePlanError",
    "PolicyProposer",
    "Refit",
    "ReturnScorer",
    "ShootingPlanner",
    "Uncertainty",
    "cem_refit",
    "make_cem",
    "make_mppi",
    "mppi_refit",
]
