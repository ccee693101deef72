from __future__ import annotations

import torch

from imagerl.rl.data.seeding import derive_seed, generator


def test_seeds_are_the_same_for_ever() -> None:
    """Fixed values: another machine, Python or release must draw what a published run drew."""
    assert derive_seed(0) == 2631537505891389924
    assert derive_seed(0, "tokens", 1, 2, 3) == 6067651273936382
    assert derive_seed("tiny_world split", "CAT") == 5948979890277041843
    drawn = torch.rand(3, generator=generator(0, "tokens", 1, 2, 3), dtype=torch.float64)
    assert drawn.tolist() == [0.1018587305772567, 0.11258011636490395, 0.6465492509035725]


def test_keys_are_told_apart() -> None:
    keys: list[tuple[int | str, ...]] = [
        (0,),
        (1,),
        ("0",),
        (0, 0),
        (0, 1),
        (1, 0),
        (10,),
        ("a", "b"),
        ("ab",),
    ]
    keys += [("a, b",), ("a", 1, 23), ("a", 12, 3), (-1,), ()]
    seeds = [derive_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_neighbouring_keys_give_unrelated_numbers() -> None:
    rows = torch.stack([torch.rand(4000, generator=generator(0, "x", i)) for i in range(4)])
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 0.08  # five standard errors


def test_a_generator_ignores_what_was_drawn_before() -> None:
    first = torch.rand(5, generator=generator("x", 1))
    torch.manual_seed(3)
    torch.rand(7)
    assert torch.equal(torch.rand(5, generator=generator("x", 1)), first)
