"""How good the clips of a model are beside those of another: distance, and what they show."""
