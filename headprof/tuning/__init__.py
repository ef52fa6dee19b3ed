"""Finding, for one model, the parameters that lose it least: on probes of the half that profiles are made from."""
