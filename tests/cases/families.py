"""The rows of all families of operators."""

from __future__ import annotations

from tests.cases.convolution import CONVOLUTION
from tests.cases.embedding import EMBEDDING
from tests.cases.layers import ACTIVATIONS, LAYERS
from tests.cases.movement import MOVEMENT
from tests.cases.normalisation import NORMALISATIONS
from tests.cases.pointwise import POINTWISE
from tests.cases.products import PRODUCTS
from tests.cases.reads import READS
from tests.cases.reduction import REDUCTION_ROWS
from tests.cases.resize import RESIZE

# Beyond LAYERS, whose rows the test of every property visits; these are visited by test_families.py, once each.
FAMILIES = CONVOLUTION + EMBEDDING + MOVEMENT + NORMALISATIONS + POINTWISE + PRODUCTS + READS + REDUCTION_ROWS + RESIZE
ACTIVATION_ROWS = ACTIVATIONS + POINTWISE
RULE_ROWS = LAYERS + FAMILIES
