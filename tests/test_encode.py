from itertools import islice

import pytest

from sparsemem.encode import length_batches, token_lists

SEQUENCES = [[1] * length for length in (3, 9, 1, 9, 30, 2, 4, 4)]


@pytest.mark.parametrize("max_tokens", [1, 9, 18, 1000])
def test_every_sequence_is_in_one_batch_with_its_place(max_tokens):
    sequences = [[10 + number] * len(ids) for number, ids in enumerate(SEQUENCES)]
    seen = []
    for places, batch in length_batches(sequences, max_tokens=max_tokens):
        for place, ids, mask in zip(places, batch["input_ids"], batch["attention_mask"], strict=True):
            assert ids[mask.bool()].tolist() == sequences[place]
            seen.append(place)
    assert sorted(seen) == list(range(len(sequences)))


@pytest.mark.parametrize("max_tokens", [9, 18, 1000])
def test_a_batch_keeps_to_its_size_unless_one_sequence_is_longer(max_tokens):
    sizes = [batch["input_ids"].shape for _, batch in length_batches(SEQUENCES, max_tokens=max_tokens)]
    assert all(rows == 1 or rows * length <= max_tokens for rows, length in sizes)
    assert [length for _, length in sizes] == sorted((length for _, length in sizes), reverse=True)


def test_equal_lengths_need_no_padding():
    batches = [batch for _, batch in length_batches([[1] * 4, [1] * 2] * 3, max_tokens=12)]
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(3, 4), (3, 2)]
    assert all(batch["attention_mask"].all() for batch in batches)


def test_no_sequence_is_no_batch():
    assert list(length_batches([])) == []


def test_token_lists_cut_leave_out_the_empty_and_read_no_further_than_needed(tiny_tokenizer):
    pulled = []

    def texts():
        for number in range(100):
            pulled.append(number)
            yield "" if number % 2 else "Ada lives in Zerbst"

    lists = list(islice(token_lists(tiny_tokenizer, texts(), max_length=3), 6))
    assert lists == [tiny_tokenizer("Ada lives in Zerbst")["input_ids"][:3]] * 6
    assert len(pulled) == 16
