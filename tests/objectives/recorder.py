"""What the tests of the losses watch a student with."""


class Recorder:
    """A function that remembers what it was asked; a student is asked at (z_s, s) first, then at (z_t, t)."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, z, t):
        self.calls.append((z, t))
        return self.function(z, t)
