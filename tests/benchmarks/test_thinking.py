"""The task that asks whether thinking helps: what is written leads to what is drawn, held-out bits stay held out."""

from __future__ import annotations

from benchmarks.thinking import BITS, HELDOUT, KINDS, PICTURES, prompts_of, right, thought_of


def test_a_thought_goes_bit_by_bit_to_the_answer() -> None:
    assert thought_of("parity", (1, 0, 1, 1)) == "1101" and thought_of("last", (1, 0, 1, 1)) == "1"


def test_every_number_is_asked_for_in_one_split_alone() -> None:
    train, heldout = prompts_of("train"), prompts_of("heldout")
    assert len(heldout) == len(KINDS) * HELDOUT and len(train) + len(heldout) == len(KINDS) * 2**BITS
    assert not {str(row["prompt"])[-BITS:] for row in train} & {str(row["prompt"])[-BITS:] for row in heldout}
    for row in heldout:
        kind, _, bits = str(row["prompt"]).split()
        odd = bits.count("1") % 2 if kind == "parity" else int(bits[-1])
        assert row["wanted"] == PICTURES[odd]


def test_one_wrong_token_makes_a_wrong_picture() -> None:
    assert right([[3, 3], [3, 12], [12, 12]], [3, 3, 3]) == [1.0, 0.0, 0.0]
