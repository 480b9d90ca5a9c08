"""The vocabulary that every module shares; imports only jax, numpy and jaxtyping.

Conventions: `t = 0` is data and `t = 1` is noise; images are float32 in [-1, 1], NHWC; times are one number per
example (`"b"`), levels carry singleton axes (`"b 1 1 1"`) so that they multiply images without silent broadcasting.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import jaxtyping
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

Images = Float[Array, "b h w c"]
Times = Float[Array, "b"]
Labels = Int[Array, "b"]
PerExample = Float[Array, "b"]
Params = Any  # a pytree of arrays


class Text(NamedTuple):
    """Captions, one a row: bytes of UTF-8, or what a frozen encoder made of them; no token is the null caption.

    On the host or on a device.
    """

    tokens: Int[Array | np.ndarray, "b n"] | Float[Array | np.ndarray, "b n e"]
    mask: Bool[Array | np.ndarray, "b n"]  # which tokens there are


Condition = Labels | Text  # what an image should show


class Level(NamedTuple):
    """Noise level of `z = alpha x + sigma eps`, one per example."""

    alpha: Float[Array, "b 1 1 1"]
    sigma: Float[Array, "b 1 1 1"]

    @property
    def logsnr(self) -> Float[Array, "b 1 1 1"]:
        """log(alpha^2 / sigma^2)."""
        return 2.0 * (jnp.log(self.alpha) - jnp.log(self.sigma))

    @property
    def snr(self) -> Float[Array, "b 1 1 1"]:
        """alpha^2 / sigma^2."""
        return jnp.square(self.alpha / self.sigma)

    @property
    def angle(self) -> Float[Array, "b 1 1 1"]:
        """phi = atan2(sigma, alpha) in [0, pi/2]: alpha = r cos phi, sigma = r sin phi with r = 1 for VP."""
        return jnp.arctan2(self.sigma, self.alpha)


class Guided(NamedTuple):
    """A denoiser's answer under classifier-free guidance; both share one forward pass."""

    x_hat: Images  # (1 + g) conditional - g unconditional
    x_cond: Images  # the conditional output, from which x_var is computed


Schedule = Callable[[Times], Level]
Denoiser = Callable[[Images, Times], Images]
Teacher = Callable[[Images, Times], Images | Guided]
Distance = Callable[[Images, Level], PerExample]  # (residual in x, level it was measured at) -> one loss per example
Metrics = Mapping[str, Array]
Key = PRNGKeyArray
Keys = jaxtyping.Key[Array, "b"]  # one for each image
__all__ = [
    "Array", "Bool", "Condition", "Denoiser", "Distance", "Float", "Guided", "Images", "Int", "Key", "Keys", "Labels",
    "Level", "Metrics", "Params", "PerExample", "Schedule", "Teacher", "Text", "Times",
]
