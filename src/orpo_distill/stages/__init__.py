"""Stages: each module has one work function `name(options, inputs, out) -> metrics`, and the options it takes.

`inputs` are the folders of finished stages, `out` is the stage's own folder. A work function may be called again in a
folder where an earlier call was killed, or that is to grow: it makes only what is missing.
`mechanism_tables` belongs to `mechanisms`.
"""
