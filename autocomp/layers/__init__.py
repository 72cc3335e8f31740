"""The torch modules and custom ops that a compressed model is made of: they are the specification."""
