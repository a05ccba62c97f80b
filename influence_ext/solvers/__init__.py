"""Solvers of ``(G + λI) x = b`` for many right-hand sides; the outcome is reported column by column."""

from influence_ext.solvers.auto import AutoChoice, auto
from influence_ext.solvers.base import Solution, Solver, Status
from influence_ext.solvers.block_cg import BlockCG
from influence_ext.solvers.cg import CG
from influence_ext.solvers.direct import Direct, DirectFactorisation
from influence_ext.solvers.dual import Dual, DualFactorisation
from influence_ext.solvers.ekfac import EKFAC, EKFACFactorisation
from influence_ext.solvers.factorisation import Factorisation, FactorisingSolver
from influence_ext.solvers.lissa import LiSSA
from influence_ext.solvers.neumann import Neumann
from influence_ext.solvers.power import top_eigenvalue
from influence_ext.solvers.preconditioners import Inverse, Jacobi, Nystrom, Preconditioner

__all__ = [
    "CG",
    "EKFAC",
    "AutoChoice",
    "BlockCG",
    "Direct",
    "DirectFactorisation",
    "Dual",
    "DualFactorisation",
    "EKFACFactorisation",
    "Factorisation",
    "FactorisingSolver",
    "Inverse",
    "Jacobi",
    "LiSSA",
    "Neumann",
    "Nystrom",
    "Preconditioner",
    "Solution",
    "Solver",
    "Status",
    "auto",
    "top_eigenvalue",
]
