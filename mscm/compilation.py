"""What XLA is told beyond its defaults, by platform."""

_OPTIONS: dict[str, dict[str, str]] = {
    # A 3 x 3 convolution by the YNN library takes up to twice as long as by XLA's own code, its kernel's gradient three
    # to twelve times, and a training step needs twice the memory (jax 0.10.2, two cores).
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": ""},
}


def options(platform: str) -> dict[str, str]:
    """`compiler_options` of `jax.jit` for programs on devices of a platform."""
    return dict(_OPTIONS.get(platform, {}))
