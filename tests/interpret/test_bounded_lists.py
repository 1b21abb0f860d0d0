"""Bounded lists keep exactly the smallest keys, whatever order and batches brought them."""

import torch

from sae_dist.interpret.bounded_lists import EMPTY, BoundedLists, empty_lists, insert_, merge_cells


def entries(n: int, cells: int, seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    doc, pos = torch.randint(0, 6, (n,), generator=g), torch.randint(0, 50, (n,), generator=g)
    columns = {"key": torch.randperm(n, generator=g), "value": torch.rand(n, generator=g), "doc": doc, "pos": pos}
    return torch.randint(0, cells, (n,), generator=g), columns


def offered(
    cell: torch.Tensor, columns: dict[str, torch.Tensor], *, size: int, batch: int, block: int = 1
) -> BoundedLists:
    kept = empty_lists(7, size)
    for start in range(0, len(cell), batch):
        part = slice(start, start + batch)
        insert_(kept, cell[part], **{name: column[part] for name, column in columns.items()}, block=block)
    return kept


def listed(kept: BoundedLists, cell: int) -> list[tuple[float, ...]]:
    return [entry for entry in zip(*(column[cell].tolist() for column in kept), strict=True) if entry[0] != EMPTY]


def test_keeps_the_smallest_keys_of_every_cell_with_their_entries():
    cell, columns = entries(400, 7)
    kept = offered(cell, columns, size=5, batch=400)
    for c in range(7):
        mine = sorted(zip(*(column[cell == c].tolist() for column in columns.values()), strict=True))
        assert listed(kept, c) == mine[:5]


def test_keeps_the_best_of_every_block_of_positions():
    cell, columns = entries(400, 7)
    kept = offered(cell, columns, size=5, batch=400, block=10)
    for c in range(7):
        best: dict[tuple[int, int], tuple[float, ...]] = {}
        for entry in sorted(zip(*(column[cell == c].tolist() for column in columns.values()), strict=True)):
            best.setdefault((entry[2], entry[3] // 10), entry)
        assert listed(kept, c) == list(best.values())[:5]


def test_batches_and_order_do_not_matter():
    cell, columns = entries(400, 7)
    for block in (1, 10):
        whole = offered(cell, columns, size=5, batch=400, block=block)
        shuffled = torch.randperm(400, generator=torch.Generator().manual_seed(9))
        other = offered(cell[shuffled], {k: v[shuffled] for k, v in columns.items()}, size=5, batch=13, block=block)
        assert [listed(whole, c) for c in range(7)] == [listed(other, c) for c in range(7)]


def test_a_cell_with_fewer_entries_than_places_keeps_them_all():
    cell, columns = entries(6, 7)
    kept = offered(cell, columns, size=5, batch=2)
    assert sum(len(listed(kept, c)) for c in range(7)) == 6


def test_merged_cells_keep_the_smallest_keys_of_their_union():
    cell, columns = entries(400, 7)
    kept = offered(cell, columns, size=5, batch=400)
    united = merge_cells(kept, torch.tensor([[0, 3, -1], [-1, 5, 6]]))
    assert listed(united, 0) == sorted(listed(kept, 0) + listed(kept, 3))[:5]
    assert listed(united, 1) == sorted(listed(kept, 5) + listed(kept, 6))[:5]
