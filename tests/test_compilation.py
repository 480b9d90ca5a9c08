"""Options that the compiler takes, and what they change."""

import jax
import jax.numpy as jnp
import pytest

from mscm import compilation


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="options of the CPU's compiler")
def test_convolutions_on_a_cpu_are_xlas_own():
    x, w = jnp.zeros((2, 16, 16, 32)), jnp.zeros((3, 3, 32, 32))  # smaller ones are XLA's own in any case

    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    text = jax.jit(convolve, compiler_options=compilation.options("cpu")).lower(x, w).compile().as_text()
    assert " convolution(" in text and "ynn" not in text


def test_other_platforms_have_the_defaults():
    assert compilation.options("tpu") == compilation.options("gpu") == {}
