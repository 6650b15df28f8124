"""The kinds of cell that a call may have: bits of the op's `kinds`, known when it is compiled."""

INPUT_CELLS = 1
"""Some cells are computed in the input's dtype."""

FP8_CELLS = 2
"""Some cells are FP8."""

ALL_CELLS = INPUT_CELLS | FP8_CELLS
