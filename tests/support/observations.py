"""What an importance is given, made by hand."""

from dataclasses import replace
from functools import cache

import torch

from headprof.compression.methods.importance import assessed
from headprof.compression.methods.observation import AttentionLayer, Observation
from headprof.compression.methods.reduction import Choice, largest
from headprof.compression.rows import Rows
from headprof.models.rotary import rotary_of
from support.tiny_models import tiny_model


@cache
def rotary(head_dim=8):
    """The rotary embedding of a tiny llama."""
    return rotary_of(tiny_model("llama", head_dim=head_dim))


def observed_prompt(queries, keys, valid=None, values=None, **layer):
    """A prompt `[B, K, T, D]`, all of it valid and its values drawn at random unless given; `layer` needs a scaling."""
    batch, _, tokens, head_dim = keys.shape
    if valid is None:
        valid = torch.ones(batch, tokens, dtype=torch.bool)
    if values is None:
        values = torch.randn(keys.shape, generator=torch.Generator().manual_seed(0)).to(keys.dtype)
    ids = torch.randint(512, (batch, tokens), generator=torch.Generator().manual_seed(0))
    how = AttentionLayer(**{"rotary": rotary(head_dim) if head_dim % 2 == 0 else None} | layer)
    return Observation(queries, Rows.of_prompt(keys, values), valid, how, ids=ids)


def as_held_rows(observed):
    """A prompt as rows that all heads hold: everything said that a prompt leaves out."""
    tokens, count = observed.keys.shape[2], observed.queries.shape[2]
    return replace(
        observed,
        is_prompt=False,
        valid=observed.valid_rows(),
        query_positions=torch.arange(tokens - count, tokens),
        query_valid=(observed.valid.cumsum(dim=-1) > 0)[:, tokens - count :],  # those after the first token ask
        seen=tokens,
        shared={},
    )


def with_rows(observed, positions=None, **columns):
    """The same with other positions, and with or (`None`) without columns."""
    rows = observed.rows
    for name, column in columns.items():
        rows = rows.without(name) if column is None else rows.with_columns({name: column})
    return replace(observed, rows=rows if positions is None else replace(rows, positions=positions), shared={})


def compress(method, observed, counts):
    """A layer's rows as the cache compresses them."""
    assessment = assessed(method.importance, observed)
    ranked, counts = method.ranked(assessment.importance, counts, observed.valid if observed.padded else None)
    kept = largest(ranked, counts.counts, method.importance.noise, most=counts.most)
    weights = assessment.importance if assessment.weights is None else assessment.weights
    rows = observed.rows.with_columns(assessment.columns)
    return method.reduction.reduce(rows, Choice(kept, ranked, weights, counts, observed))
