"""How each kind of stored layer is trained, and brought back: `whole.trainable` and `whole.converted`; one file a kind."""
