"""Getting accuracy back after compression: compressed models trained in the form that they are delivered in."""
