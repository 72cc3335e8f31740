"""What flows between stages and what a run folder holds; free of torch and TVM."""
