"""One unit from tokens to rows in a call, as a Harvester does it in two threads."""

from collections.abc import Sequence

from sae_dist.harvest.config import HarvestConfig
from sae_dist.harvest.forward import UnitRows, batch_sequences, forward, to_rows
from sae_dist.model.engine import Engine
from sae_dist.text.stream import Sequences


def harvest(engine: Engine, hooks: Sequence[str], *, sequences: Sequences, config: HarvestConfig) -> UnitRows:
    states = forward(engine, hooks, sequences=sequences, batch=batch_sequences(engine, hooks, config)).states
    return to_rows(engine, states, sequences=sequences, config=config)
