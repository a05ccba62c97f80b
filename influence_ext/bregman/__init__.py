"""Responses to removing training examples, and the five-term decomposition of influence."""

from influence_ext.bregman.decompose import Correlation, Decomposition, Distance, decompose
from influence_ext.bregman.pbrf import linearized_pbrf, pbrf
from influence_ext.bregman.recipe import Recipe, Run, train
from influence_ext.bregman.response import Response, ResponseStatus
from influence_ext.bregman.retrain import proximal_response, proximal_response_many, retrain, retrain_many

__all__ = [
    "Correlation",
    "Decomposition",
    "Distance",
    "Recipe",
    "Response",
    "ResponseStatus",
    "Run",
    "decompose",
    "linearized_pbrf",
    "pbrf",
    "proximal_response",
    "proximal_response_many",
    "retrain",
    "retrain_many",
    "train",
]
