# SPDX-License-Identifier: Apache-2.0
"""labs_attention: a step in 16 bits has the numbers of labs_decode's attention, and keeps bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import labs_attention
import labs_decode as decode
import labs_kernels

GROUPS, DIM, DTYPE = 2, 64, torch.bfloat16
Row = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def row_of(each: int, columns: int) -> Row:
    """Return random queries [heads, 1, DIM], and keys and values [GROUPS, columns, DIM]."""
    shapes = (GROUPS * each, 1), *[(GROUPS, columns)] * 2
    q, k, v = (torch.randn(*shape, DIM).to(DTYPE) for shape in shapes)
    return q, k, v


def call_of(rows: Sequence[Row], columns: int, window: int | None = None) -> list[torch.Tensor]:
    """Return queries, keys, values and a mask of rows in slots with so many columns."""
    q = torch.stack([row[0] for row in rows])
    keys, values = torch.randn(2, len(rows), GROUPS, columns, DIM).to(DTYPE)
    mask = torch.full((len(rows), 1, 1, columns), -torch.inf, dtype=DTYPE)
    for index, (_, k, v) in enumerate(rows):
        own = k.shape[1]
        keys[index, :, :own], values[index, :, :own] = k, v
        mask[index, ..., max(own - window, 0) if window else 0 : own] = 0
    return [q, keys, values, mask]


def attended(q: Any, keys: Any, values: Any, mask: Any, copies: int = 1) -> torch.Tensor:
    """Return attention [rows, 1, heads, DIM] of queries [rows, heads, 1, DIM]."""
    (rows, heads), columns = q.shape[:2], keys.shape[2]
    layer = SimpleNamespace(heads=heads, groups=GROUPS, dim=DIM)
    last = columns - 1 - (mask[:, 0, 0] == 0).int().flip(-1).argmax(-1)
    at = torch.arange(rows), last
    cursor = decode.Cursor(rows, columns, columns, -1, index=at[0], positions=at[1])
    step = labs_attention.step_of(q, layer, {"": mask}, cursor)
    given = q.transpose(1, 2)
    given = given.expand(copies, -1, -1, -1) if copies > 1 else given
    keys, values = (each[:, :, : step.total] for each in (keys, values))
    output = step.read_by(given, keys, values, step.masks[""], DIM**-0.5)
    return output.reshape(len(given), 1, heads, DIM)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("each", [1, 3, 4, 8])
@pytest.mark.parametrize("columns", [64, 128, 256, 512, 1024])
def test_a_step_in_16_bits_has_the_numbers_of_invariant_attention(columns, each, window) -> None:
    torch.manual_seed(0)
    lengths = {3, columns // 2, columns - 1, columns}
    call = call_of([row_of(each, length) for length in lengths], columns, window)
    expected = decode.attention_invariant(torch.nn.Module(), *call, scaling=DIM**-0.5)[0]
    torch.testing.assert_close(attended(*call), expected, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("each", [1, 3, 4, 8])
def test_a_row_has_the_same_bits_alone_and_beside_longer_rows(each, window) -> None:
    torch.manual_seed(1)
    others = [row_of(each, length) for length in range(100, 1024, 60)]
    for length in (1, 20, 32, 33, 60, 64, 65, 90, 96, 97, 100, 128, 129, 200, 256, 300, 512, 700):
        row, own = row_of(each, length), decode.blocks(length)
        alone = attended(*call_of([row], own, window))
        assert torch.equal(attended(*call_of([row], own, window), copies=2)[1], alone[0])
        for place in (0, 7, len(others)):
            rows = [*others[:place], row, *others[place:]]
            together = attended(*call_of(rows, 1024, window))
            assert torch.equal(together[place], alone[0]), (length, place)


def test_queries_come_in_fours_where_other_rows_change_no_bits_and_in_eights_elsewhere(
    monkeypatch: Any,
) -> None:
    flash, find = decode.flash, labs_kernels.queries_multiple.__wrapped__

    def one_by_one(q: Any, k: Any, v: Any, *options: Any) -> Any:
        rows = [flash(*row, *options) for row in zip(*(s.split(1) for s in (q, k, v)), strict=True)]
        return [torch.cat(each) for each in zip(*rows, strict=True)]

    def moody(q: Any, *states: Any) -> Any:
        output, sums = one_by_one(q, *states)
        return output * (1 + (len(q) > 1) * 2**-6), sums

    for kernel, multiple in ((one_by_one, 4), (moody, decode.ALIGNED)):
        monkeypatch.setattr(decode, "flash", kernel)
        assert find(DTYPE, DIM) == multiple


@pytest.mark.parametrize("finely", [True, False])
def test_a_step_reads_few_columns_in_multiples_of_32_where_these_sum_alike(
    monkeypatch: Any, finely: bool
) -> None:
    flash, find = decode.flash, labs_kernels.sums_finely.__wrapped__

    def moody(q: Any, k: Any, v: Any, *options: Any) -> Any:
        output, sums = flash(q, k, v, *options)
        return output * (1 + (k.shape[2] == 96 and not finely) * 2**-6), sums

    monkeypatch.setattr(decode, "flash", moody)
    monkeypatch.setattr(labs_kernels, "sums_finely", find)
    queries = torch.zeros(2, GROUPS, 4, DIM, dtype=DTYPE)
    for read_to, last, fine in (
        (64, 3, 32),
        (64, 31, 32),
        (64, 32, 64),
        (128, 64, 96),
        (256, 9, 256),
    ):
        expected = fine if finely else read_to
        many = decode.Cursor(2, 512, read_to, -1, positions=torch.tensor([2, last]))
        alone = decode.Cursor(2, 512, read_to, last, positions=torch.tensor([last]))
        for cursor in (many, alone):
            assert labs_kernels.columns_read(cursor, queries) == expected
            assert labs_kernels.columns_read(cursor, queries.float()) == read_to


@pytest.fixture
def threads() -> Iterator[Any]:
    """Return what sets torch's threads until the end of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 256])
def test_one_head_of_keys_alone_has_the_bits_of_many_with_any_number_of_threads(
    threads: Any, count: int, dtype: torch.dtype, dim: int
) -> None:
    threads(count)
    numbers = torch.randn(3, 9, 1, 256, dim, generator=torch.Generator().manual_seed(dim))
    q, k, v = numbers.to(dtype)
    for columns in (64, 128, 256):
        parts = q[..., :4, :], k[..., :columns, :], v[..., :columns, :]
        together = decode.flash(*parts, None, 1.0)
        for i in range(len(q)):
            alone = decode.flash(*(each[i : i + 1] for each in parts), None, 1.0)
            assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, together, strict=True))
