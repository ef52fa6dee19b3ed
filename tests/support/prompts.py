"""Token ids to prompt tiny models with, and how to go on from them."""

import torch

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2}
"""Options of `generate`: the likeliest token each time, and no end before the last."""


def random_ids(batch, length, seed=0):
    """Token ids `[batch, length]`, none of them a special token."""
    return torch.randint(3, 500, (batch, length), generator=torch.Generator().manual_seed(seed))


def distinct_ids(batch, length, seed=0):
    """Token ids, none of which comes twice in a sequence: in the first layer their keys are equally long."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(497, generator=generator)[:length] + 3 for _ in range(batch)])


def padded_ids(batch, length=40):
    """Token ids and their mask; every sequence but the first begins with padding."""
    ids, mask = random_ids(batch, length), torch.ones(batch, length, dtype=torch.int64)
    for entry in range(1, batch):
        mask[entry, : 7 + 8 * entry] = 0
    return ids.masked_fill(mask == 0, 2), mask


def left_padded(ids, lengths):
    """Sequences of these lengths as a batch with padding in front, and their mask."""
    width = max(lengths)
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    padded = torch.full((len(lengths), width), 2)
    for entry, length in enumerate(lengths):
        padded[entry, width - length :] = ids[entry, :length]
    return padded, mask
