"""Probes for tiny models."""

from headprof.probes.build import ProbeBuilder, ProbeSettings


def builder_for(loaded, probes=8, pack=4, seed=0, length=1024) -> ProbeBuilder:
    """Contexts of `length` tokens with `pack` probes each."""
    settings = ProbeSettings(probes=probes, lengths=(length,), needles_per_context=pack, seed=seed)
    return ProbeBuilder(loaded.tokenizer, settings, max_positions=loaded.max_positions)
