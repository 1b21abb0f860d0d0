"""How large the paper is repeated, from a test's minutes to the paper's own widths."""

from typing import NamedTuple


class Size(NamedTuple):
    vocab: int
    lm_tokens: int  # that each transformer is trained on
    rows: int  # activations that are stored, in tokens
    heldout: int  # more, of documents that neither the transformer nor a dictionary was trained on
    widths: tuple[int, ...]  # of the dictionaries
    main: int  # the width that is compared between transformers
    train_tokens: int
    batch: int


MLP = 512
SIZES = {
    "miniature": Size(512, 60_000, 20_000, 16_384, (128, 256), 256, 60_000, 512),
    "laptop": Size(4_096, 8_000_000, 1_000_000, 131_072, (512, 4_096, 16_384), 4_096, 1_500_000, 2_048),
    "full": Size(
        4_096, 28_000_000, 12_000_000, 1_048_576, (512, 4_096, 16_384, 32_768, 65_536, 131_072), 4_096, 100_000_000,
        8_192,
    ),
}  # fmt: skip
