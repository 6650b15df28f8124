"""How good the clips of a model are, beside those of another: by distance, and by what they show."""
