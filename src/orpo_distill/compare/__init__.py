"""Compare: many runs from one config (methods, seeds, sweeps), their shared stages made once, and what they prove.

methods    what each method is: settings laid over a config
cells      the runs of a comparison, and how many of their stages are shared
running    carry them out: learning rates on validation first, then equal epochs, then equal tokens
results    `compare.json`: every cell, and every contrast with its interval and test
tables     the same for people
"""
