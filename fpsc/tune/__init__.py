"""`fpsc tune`: from one calibration pass of a dense model to policies for any budget.

`calibrate` measures what every mode would cost in every head of every layer at some noise levels,
`solve` chooses among them under a budget, `write` makes policies of the choice, and `validate`
compares what was predicted with what comes out on prompts that nothing was measured on.
"""
