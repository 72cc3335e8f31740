"""Getting accuracy back after compression: training the finalists against the model they came from."""
