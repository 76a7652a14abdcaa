"""The laboratory, `minicnn bench`: how long every kernel takes at real layers' shapes, how wrong it is, and what could be expected.

cases           which kernel at which shape: read off the models' own layers, chosen by name, shape or pattern
kernels         what each kernel reads, how it is called, what it must compute and move at the least
witness         the same in float64, as the definition says, at a sample of its numbers
measure         clocks, warm-up, repetitions, memory; on NumPy by the wall, on a GPU by its own events
roofline        what this machine reaches in a matrix product and in a copy
results         what is kept: a JSON file with all that the numbers depend on
tables          what is printed
laboratory      `bench kernels` itself
whole, worker   `bench models`, each model in a process of its own
rival           PyTorch's column, in a process of its own
compare, plot   `bench compare`, `bench plot`
tune            `bench tune`: the table that "auto" chooses an algorithm by

Nothing of the engine imports this room, and `import minicnn` does not load it.
"""
