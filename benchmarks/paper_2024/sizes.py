"""How large the paper is repeated."""

from typing import NamedTuple


class Size(NamedTuple):
    rows: int  # activations that are stored, in tokens
    heldout: int
    widths: tuple[int, ...]  # 1 : 4 : 16
    train_tokens: tuple[int, ...]  # each width is trained for each of them
    batch: int
    least_rows: int  # of a concept
    sequences: int  # in which latents are ablated


SIZES = {
    "miniature": Size(20_000, 8_192, (32, 128, 512), (8_192, 16_384, 32_768), 256, 20, 3),
    "laptop": Size(500_000, 131_072, (1_024, 4_096, 16_384), (250_000, 500_000, 1_000_000), 2_048, 20, 12),
    "full": Size(
        40_000_000, 1_048_576, (16_384, 65_536, 262_144), (10_000_000, 40_000_000, 160_000_000), 8_192, 100, 50
    ),
}
