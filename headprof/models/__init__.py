"""Models: found, loaded, described, spoken to, and looked into."""
