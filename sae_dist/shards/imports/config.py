"""What an import reads, how it is cut into units, and which rows it leaves out."""

from typing import Annotated, Literal

from pydantic import Field

from sae_dist.config import frozen
from sae_dist.shards import writer
from sae_dist.shards.format import DType, checked_name


@frozen
class ImportConfig:
    """What to read and how to cut it up."""

    path: str  # a file, or a folder whose files are read by name, one after the other
    hook: str = "imported"  # the name under which the rows are stored
    key: str = ""  # the tensor of a file or the column of a table; may be left out where there is one only
    dtype: DType | Literal["auto"] = "auto"  # auto: 16-bit floats as they are, everything else as float32
    unit_rows: Annotated[int, Field(ge=0)] = 0  # 0: 64 units, of at most 65,536 rows
    slice_rows: Annotated[int, Field(ge=0)] = 0  # 0: 8 slices a unit, of at most 8,192 rows
    heldout_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05  # of the rows, over the whole source; at least 64
    max_nonfinite: Annotated[float, Field(ge=0, le=1)] = writer.MAX_NONFINITE
    max_norm_ratio: Annotated[float, Field(gt=1)] | None = 10.0  # longer rows than this times the median go
    max_outlier_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05  # with more of them the import is refused
    model: str = "imported"  # what made the activations, for the record
    seed: int = 0

    def __post_init__(self) -> None:
        checked_name(self.hook, "hook")
