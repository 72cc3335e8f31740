"""A model → its canonical form, its layers, and the groups of channels that go together."""
