"""Planners: search over action chunks with a World Action Model."""

from wamrl.planners.best_of_n import make_best_of_n
from wamrl.planners.cem import cem_refit, make_cem
from wamrl.planners.gates import Always, BudgetGate, CriticalPhase, Periodic, Uncertainty, Verifier
from wamrl.planners.gradient import GradientPlanner, make_gradient
from wamrl.planners.mcts import MCTSPlanner, make_mcts
from wamrl.planners.mppi import make_mppi, mppi_refit
from wamrl.planners.proposers import MakeProposer, MakeTreeProposer, NoiseProposer, PolicyProposer, SampleProposer
from wamrl.planners.scorers import ConsistencyScorer, GoalScorer, ProgressScorer, ReturnScorer, SuccessScorer
from wamrl.planners.shooting import NonFinitePlanError, Refit, ShootingPlanner

__all__ = [
    "Always",
    "BudgetGate",
    "ConsistencyScorer",
    "CriticalPhase",
    "GoalScorer",
    "GradientPlanner",
    "MCTSPlanner",
    "MakeProposer",
    "MakeTreeProposer",
    "NoiseProposer",
    "NonFinitePlanError",
    "Periodic",
    "PolicyProposer",
    "ProgressScorer",
    "Refit",
    "ReturnScorer",
    "SampleProposer",
    "ShootingPlanner",
    "SuccessScorer",
    "Uncertainty",
    "Verifier",
    "cem_refit",
    "make_best_of_n",
    "make_cem",
    "make_gradient",
    "make_mcts",
    "make_mppi",
    "mppi_refit",
]
