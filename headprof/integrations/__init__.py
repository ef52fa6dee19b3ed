"""Adapters that let other projects' tools use compressed caches; each needs that project to be installed."""
