"""Arrays in, arrays out: the bodies of the operations that are more than a line, on NumPy and CuPy alike."""
