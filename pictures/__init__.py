"""Pictures: what a model selects, and learning curves."""
