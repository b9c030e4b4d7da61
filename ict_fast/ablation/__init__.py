"""The paper's findings as comparisons of short runs: one ingredient added or removed at a time."""
