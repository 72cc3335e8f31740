"""What to try next: solver seeds, proposals, the stored study, costs."""
