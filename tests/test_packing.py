from collections import Counter
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from orpo_distill.groups import Row
from orpo_distill.packing import SAME_LENGTH, Batch, collate, micro_batches, packed_tokens, pad
from orpo_distill.records import Message, Pair

PAIR = Pair("p", (Message("user", "q"),), "a", "b", "c1", "r1", "teacher", "student-0")


def row(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int] = (), number: int = 1) -> Row:
    return Row(number, PAIR, tuple(prompt), tuple(chosen), tuple(rejected))


texts = st.lists(st.integers(1, 3), min_size=1, max_size=9)
row_lists = st.lists(st.builds(row, texts, texts, texts, st.integers(1, 99)), min_size=1, max_size=12)


@given(row_lists, st.integers(1, 60), st.integers(1, 3))
def test_micro_batches_hold_every_row_once_within_the_budget(rows: list[Row], budget: int, processes: int) -> None:
    batches = micro_batches(rows, budget, processes)
    assert Counter(one for batch in batches for one in batch) == Counter(rows)
    assert len(batches) % processes == 0
    assert batches[0], "process 0 always has something: its batch stands in for an empty one"
    assert all(packed_tokens(batch) <= budget or len(batch) == 1 for batch in batches if batch)


@given(row_lists, st.integers(1, 60), st.integers(1, 3))
def test_fewer_passes_would_not_do(rows: list[Row], budget: int, processes: int) -> None:
    """No pass is idle on every process."""
    batches = micro_batches(rows, budget, processes)
    for start in range(0, len(batches), processes):
        assert any(batches[start : start + processes])


def test_a_group_that_fits_is_not_cut() -> None:
    rows = [row((prompt,), (prompt, number), (9,)) for number in range(3) for prompt in range(4)]
    for batch in micro_batches(rows, packed_tokens(rows[::4])):
        prompts = Counter(one.prompt for one in batch)
        assert set(prompts.values()) == {3}


def test_a_group_that_does_not_fit_is_cut_between_pairs() -> None:
    """1 token of prompt, 3 of each trace: three traces and the prompt fit into 10."""
    rows = [row((1,), (2, 3, number), (4, 5, number // 2)) for number in range(4)]
    batches = micro_batches(rows, 10)
    assert [len(batch) for batch in batches] == [2, 2]
    assert [packed_tokens(batch) for batch in batches] == [10, 10]


def test_pairs_that_share_traces_are_cut_together() -> None:
    """All 16 pairs of 4 and 4 traces, as far apart as can be; 4 traces fit. In their order it would take 8 passes."""
    rows = [row((1,), (2, 3, n), (4, 5, (n + shift) % 4)) for shift in range(4) for n in range(4)]
    batches = micro_batches(rows, 13)
    assert len(batches) <= 5
    assert sorted(map(len, batches))[-1] == 4


def test_batches_are_about_equally_large() -> None:
    rows = [row((number,), range(10 * number), (1,)) for number in range(1, 9)]
    sizes = [packed_tokens(batch) for batch in micro_batches(rows, 130)]
    assert len(sizes) == 4 and max(sizes) - min(sizes) <= 20


def test_tokens_are_counted_once_a_prompt_and_once_a_trace() -> None:
    shared = [row((1, 2), (3, 4, 5), (6,)), row((1, 2), (6,), (3, 4, 5))]
    assert packed_tokens(shared) == 2 + 3 + 1
    assert packed_tokens([*shared, row((1,), (3, 4, 5), (6,))]) == 6 + 1 + 3 + 1
    assert packed_tokens([row((1, 2), (3,))]) == 3


def test_layout_of_a_small_batch() -> None:
    """Prompt 1 2 3 with traces 5 6 7 and 4, then prompt 8 with 4: the last token of a trace is left out."""
    batch = collate([row((1, 2, 3), (4,), (5, 6, 7)), row((1, 2, 3), (5, 6, 7), (4,)), row((8,), (4,), (4,))], False)
    assert batch.input_ids.tolist() == [[1, 2, 3, 5, 6, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0]]
    assert batch.prompts == [slice(0, 3), slice(5, 6)]
    assert batch.sources.tolist() == [2, 3, 4, 2, 5]
    assert batch.labels.tolist() == [5, 6, 7, 4, 4]
    assert batch.owner.tolist() == [0, 0, 0, 1, 2]
    assert batch.prompt.tolist() == [0, 0, 1]
    assert batch.scored.tolist() == [3, 1, 1, 0, 0]
    assert batch.chosen.tolist() == [1, 0, 2]
    assert batch.rejected.tolist() == [0, 1, 2]


def test_prompts_are_scored_once_but_for_their_first_token() -> None:
    batch = collate([row((1, 2, 3), (4,), (5, 6)), row((9,), (4,), (5,))], True)
    assert batch.labels.tolist() == [5, 6, 4, 4, 5, 2, 3]
    assert batch.sources.tolist() == [2, 3, 2, 4, 4, 0, 1]
    assert batch.owner.tolist() == [0, 0, 1, 2, 3, 4, 4]
    assert batch.scored.tolist() == [2, 1, 1, 1, 2, 0]


def test_without_a_rejected_side() -> None:
    batch = collate([row((1,), (2, 3)), row((1,), (4, 5))], False)
    assert batch.rejected.tolist() == []
    assert batch.chosen.tolist() == [0, 1]


def told(batch: Batch) -> list[tuple[list[int], int, int]]:
    """What every label's source knows: the tokens that it may attend to (itself last), and the label, and its owner."""
    seen: dict[int, list[int]] = {}
    place = 0
    for bucket in batch.buckets:
        for number in range(bucket.count):
            padded = bucket.padded[number * bucket.longest : (number + 1) * bucket.longest].tolist()
            own = [at for at in bucket.tokens.tolist() if number * bucket.longest <= at < (number + 1) * bucket.longest]
            assert own == list(range(number * bucket.longest, number * bucket.longest + len(own)))
            assert padded[: len(own)] == list(range(place, place + len(own)))
            for count in range(1, len(own) + 1):
                places = [*range(bucket.prompt.start, bucket.prompt.stop), *range(place, place + count)]
                assert batch.position_ids[0, places].tolist() == list(range(len(places)))
                seen[places[-1]] = batch.input_ids[0, places].tolist()
            place += len(own)
    assert place == batch.input_ids.shape[1]
    facts = zip(batch.sources.tolist(), batch.labels.tolist(), batch.owner.tolist(), strict=True)
    return [(seen[source], label, owner) for source, label, owner in facts]


@given(row_lists)
def test_every_label_is_predicted_from_its_prompt_and_its_trace(rows: list[Row]) -> None:
    """From the layout alone: each distinct trace of each prompt is scored once, all of it, from what precedes it."""
    batch = collate(rows, True)
    found: dict[int, list[tuple[list[int], int]]] = {}
    for seen, label, owner in told(batch):
        found.setdefault(owner, []).append((seen, label))
    count = len(batch.prompt)
    assert count == len({(one.prompt, trace) for one in rows for trace in (one.chosen, one.rejected)})
    for one, chosen, rejected in zip(rows, batch.chosen.tolist(), batch.rejected.tolist(), strict=True):
        for owner, trace in ((chosen, one.chosen), (rejected, one.rejected)):
            expected = [([*one.prompt, *trace[:at]], token) for at, token in enumerate(trace)]
            assert found[owner] == expected
            assert batch.scored[owner] == len(trace)
        group = count + int(batch.prompt[chosen])
        expected = [(list(one.prompt[:at]), one.prompt[at]) for at in range(1, len(one.prompt))]
        assert found.get(group, []) == expected


@given(row_lists)
def test_padded_rows_hold_the_same(rows: list[Row]) -> None:
    batch = collate(rows, True)
    input_ids, at = pad(batch)
    width = input_ids.shape[1]
    for (seen, label, _), place in zip(told(batch), at.tolist(), strict=True):
        number, column = divmod(place, width)
        assert input_ids[number, : column + 1].tolist() == seen
        assert column + 1 == width or input_ids[number, column + 1] in (label, 0)


def test_traces_of_a_bucket_are_nearly_as_long() -> None:
    rows = [row((1,), range(2, 2 + length), (1,) * length) for length in (40, 38, 31, 29, 8, 7, 1)]
    buckets = collate(rows, False).buckets[1:]
    assert sum(bucket.count for bucket in buckets) == 12, "traces of one token have no place in the row"
    assert len(buckets) < 7
    for bucket in buckets:
        lengths = Counter((bucket.tokens // bucket.longest).tolist()).values()
        assert max(lengths) == bucket.longest and min(lengths) + 1 >= SAME_LENGTH * (bucket.longest + 1)
