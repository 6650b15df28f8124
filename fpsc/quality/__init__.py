"""How far an accelerated clip is from the dense one: metrics, and both seen side by side."""
