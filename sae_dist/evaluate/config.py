"""How much held-out text to judge a dictionary on."""

from typing import Annotated

from pydantic import Field

from sae_dist.config import frozen


@frozen
class EvaluateConfig:
    """Reconstruction figures use every held-out row of the store; cross-entropies need the model and use fewer."""

    ce_sequences: Annotated[int, Field(ge=1)] = 128  # held-out sequences for loss recovered, four passes each
    batch_sequences: Annotated[int, Field(ge=1)] = 16  # sequences a forward pass
    batch_rows: Annotated[int, Field(ge=1)] = 4_096  # rows an encoder product
