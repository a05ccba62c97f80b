"""Influence of training examples on test losses."""

from influence_ext.influence.influence import Influence
from influence_ext.influence.scores import Scores, load_scores

__all__ = ["Influence", "Scores", "load_scores"]
