"""The interface of alstonlo/torch-influence: change the import, keep the script.

>>> from influence_ext.adapters.torch_influence import BaseObjective, CGInfluenceModule

Names, arguments, signs and scales are those of torch-influence 0.1.0; ``docs/peers/torch-influence.md`` lists what differs.
"""

from influence_ext.adapters.torch_influence.base import BaseInfluenceModule, BaseObjective
from influence_ext.adapters.torch_influence.modules import AutogradInfluenceModule, CGInfluenceModule, LiSSAInfluenceModule

__all__ = ["AutogradInfluenceModule", "BaseInfluenceModule", "BaseObjective", "CGInfluenceModule", "LiSSAInfluenceModule"]
