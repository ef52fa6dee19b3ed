"""The two estimators against plain loops over heads and tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headprof.scoring.estimators import reasoning_score, retrieval_score


def slow_retrieval(rows, in_span, token_ids, answer_ids):
    scores = []
    for head in rows.tolist():
        hits = 0
        for row, wanted in zip(head, answer_ids.tolist(), strict=True):
            best = row.index(max(row))
            hits += bool(in_span[best]) and token_ids[best].item() == wanted
        scores.append(hits / len(answer_ids))
    return torch.tensor(scores)


def slow_reasoning(rows, in_span):
    size = int(in_span.sum())
    scores = []
    for head in rows.tolist():
        total = 0.0
        for row in head:
            best = sorted(range(len(row)), key=lambda i: -row[i])[:size]
            total += sum(row[i] for i in best if in_span[i])
        scores.append(total / size)
    return torch.tensor(scores)


@st.composite
def cases(draw):
    heads, answers, tokens = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(2, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = (torch.randn(heads, answers, tokens, generator=generator) * draw(st.sampled_from([0.1, 1, 8]))).softmax(-1)
    start = draw(st.integers(0, tokens - 1))
    in_span = torch.zeros(tokens, dtype=torch.bool)
    in_span[start : draw(st.integers(start + 1, tokens))] = True
    token_ids = torch.randint(0, 4, (tokens,), generator=generator)
    answer_ids = torch.randint(0, 4, (answers,), generator=generator)
    return rows, in_span, token_ids, answer_ids


@given(cases())
@settings(max_examples=200, deadline=None)
def test_estimators_equal_their_slow_twins(case):
    rows, in_span, token_ids, answer_ids = case
    torch.testing.assert_close(
        retrieval_score(rows, in_span, token_ids, answer_ids), slow_retrieval(rows, in_span, token_ids, answer_ids)
    )
    torch.testing.assert_close(reasoning_score(rows, in_span), slow_reasoning(rows, in_span))


@given(cases())
@settings(max_examples=100, deadline=None)
def test_scores_are_bounded(case):
    rows, in_span, token_ids, answer_ids = case
    retrieval, reasoning = retrieval_score(rows, in_span, token_ids, answer_ids), reasoning_score(rows, in_span)
    assert ((retrieval >= 0) & (retrieval <= 1)).all()
    assert ((reasoning >= 0) & (reasoning <= rows.shape[1] / int(in_span.sum()) + 1e-6)).all()


def test_a_copying_head_scores_one_and_its_neighbors_nothing():
    token_ids, answer_ids = torch.tensor([9, 5, 6, 5, 6]), torch.tensor([5, 6])
    in_span = torch.tensor([False, True, True, False, False])
    rows = torch.zeros(3, 2, 5)
    rows[0, 0, 1] = rows[0, 1, 2] = 1.0  # looks at the needle's tokens as it says them
    rows[1, 0, 3] = rows[1, 1, 4] = 1.0  # the same tokens elsewhere
    rows[2, 0, 2] = rows[2, 1, 1] = 1.0  # in the needle, but the wrong token
    assert retrieval_score(rows, in_span, token_ids, answer_ids).tolist() == [1.0, 0.0, 0.0]
    assert reasoning_score(rows, in_span).tolist() == pytest.approx([1.0, 0.0, 1.0])
