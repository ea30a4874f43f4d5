"""Other people's methods, each a `dit_probe.methods.Baseline`: what ConceptAttention is compared with in its tables."""
