"""Attention: one function, and the programs that can compute it.

    out = softmax(q k^T / sqrt(head_dim)) v,    q of shape `b n heads head_dim`, k and v of `b m heads head_dim`

All tokens of an image attend to each other (m = n), which is what the programs below differ in. Where tokens are left
out by a mask, those of a text, it is always `xla`: they are few.

Products are in the type of the inputs with float32 sums, the softmax is in float32.

- `xla` runs everywhere. It writes the n x n logits of every head to memory, several times over.
- `one_by_one` is the same for one example after the other, and once more in the backward pass: a CPU keeps the logits
  of its heads in its caches, or of many tokens those of one head.
- `splash` is JAX's Pallas kernel for TPUs, `cudnn` NVIDIA's for its GPUs: both keep the logits of a block on the chip.
- `auto` is the kernel of the devices if it can take the shapes, else `xla`; on CPUs `one_by_one` from 128 tokens on.

`jax.jvp`, as an objective in continuous time would need it, knows the derivative of `xla` only.

The compiler cannot cut a kernel or a loop among devices, so each device runs it on its own examples and heads. How
these lie on the mesh, and which devices it has, is what the mesh and the axis rules around the trace say
(`training/partition.py` sets both). Nothing else may decide `auto`: a program for a TPU pod can be traced and compiled
on a machine without one.
Without a mesh nothing is known of the devices, and `auto` is `xla`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mscm.models import placement

Heads = Float[Array, "b n heads d"]
Turns = Float[Array, "turns n together d"]  # of some heads of one example each
# Of one head of one example; what leaves a loop transposed, and one number for each query.
Matrix = Float[Array, "n d"]
Transposed = Float[Array, "d n"]
Row = Float[Array, "1 n"]

IMPLEMENTATIONS = ("auto", "xla", "one_by_one", "splash", "cudnn")

_LANES = 128  # of a TPU's vector unit: the kernel's blocks are multiples
_LARGEST_BLOCK = 512
_TOKENS_OF_HEADS_TOGETHER = 512  # logits of two heads of more are too large for a core's cache (measured on two cores)
_CACHED_TOKENS = 128  # logits of fewer stay in a CPU's cache anyway (measured on one core, 32 examples of 3 heads)


def attend(
    q: Heads,
    k: Float[Array, "b m heads d"],
    v: Float[Array, "b m heads d"],
    *,
    implementation: str = "auto",
    mask: Bool[Array, "b m"] | None = None,
) -> Heads:
    """softmax(q k^T / sqrt(head_dim)) v over the tokens of one example, in the type of the inputs.

    With a `mask`, over those of k and v for which it is true, at least one.

    Raises:
      ValueError: no such implementation, or one that cannot take these shapes or this type.
    """
    if mask is not None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])
    shape: dict[str, Any] = dict(num_tokens=q.shape[1], head_dim=q.shape[3], dtype=q.dtype)
    check(implementation, **shape)
    if implementation == "auto":
        kernel = _kernel_of_the_mesh(num_tokens=q.shape[1])
        implementation = "xla" if kernel is None or _expected(kernel, **shape) else kernel
    if implementation == "xla":
        return jax.nn.dot_product_attention(q, k, v)
    return _on_every_device({"one_by_one": _one_by_one, "splash": _splash, "cudnn": _cudnn}[implementation], q, k, v)


def check(implementation: str, *, num_tokens: int, head_dim: int, dtype: Any) -> None:
    """Raises ValueError where an implementation does not exist or cannot take the shapes or the type."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"got attention {implementation!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    expected = _expected(implementation, num_tokens=num_tokens, head_dim=head_dim, dtype=dtype)
    if expected:
        raise ValueError(
            f"got attention {implementation!r} for {num_tokens} tokens of {jnp.dtype(dtype).name} with "
            f"head_dim={head_dim}, expected {expected}: change the network, or use 'auto', which is 'xla' where its "
            "kernel does not fit"
        )


def check_device(implementation: str, device: jax.Device) -> None:
    """Raises ValueError where an implementation cannot run on devices of this kind."""
    if implementation == "splash" and device.platform != "tpu":
        expected = "a TPU"
    elif implementation == "cudnn" and not _has_cudnn(device.device_kind):
        expected = "an NVIDIA GPU of this machine, of compute capability 8.0 or more"
    else:
        return
    raise ValueError(f"got attention {implementation!r} on {device.device_kind!r}, expected {expected}: use 'auto'")


def _expected(implementation: str, *, num_tokens: int, head_dim: int, dtype: Any) -> str | None:
    """What a kernel needs and does not get; None where it can take the shapes and the type."""
    if implementation == "splash" and (num_tokens % _LANES or head_dim % _LANES):
        return f"tokens and head_dim to be multiples of {_LANES}"
    if implementation == "cudnn" and (jnp.dtype(dtype).itemsize != 2 or head_dim % 8 or head_dim > 128):
        return "numbers of 16 bits and head_dim to be a multiple of 8 up to 128"
    return None


def _kernel_of_the_mesh(*, num_tokens: int) -> str | None:
    kind = placement.device_kind()
    if kind is None:
        return None
    if kind.startswith("TPU"):
        return "splash"
    if kind == "cpu":
        return "one_by_one" if num_tokens >= _CACHED_TOKENS else None
    return "cudnn" if _has_cudnn(kind) else None


@functools.cache
def _has_cudnn(device_kind: str) -> bool:
    """Whether this machine has GPUs of the kind and they can run cuDNN's attention; T4 and V100 cannot.

    The GPU must be here: JAX asks it for its limits when it traces the call.
    """
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return False
    return any(d.device_kind == device_kind and float(d.compute_capability) >= 8.0 for d in devices)


def _on_every_device(kernel: Callable[[Heads, Heads, Heads], Heads], q: Heads, k: Heads, v: Heads) -> Heads:
    """The kernel for the examples and heads of each device of the mesh; what does not divide, each computes whole."""
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(q, k, v)
    spec = placement.spec_of(q.shape, ("batch", None, "heads", None))
    # check_vma: a kernel does not say over which axes of the mesh its output varies.
    return jax.shard_map(kernel, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)(q, k, v)


def _scaled(q: Heads) -> Heads:
    """A query whose logits need no scaling. Rounding it costs what rounding the query itself did."""
    return (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)


def _one_by_one(q: Heads, k: Heads, v: Heads) -> Heads:
    b, n, heads, d = q.shape
    # Heads together are as many cores' work, and theirs are not transposed to lie one after the other.
    together = heads if n <= _TOKENS_OF_HEADS_TOGETHER else 1

    def turns(x: Heads) -> Turns:
        return jnp.moveaxis(x.reshape(b, n, -1, together, d), 2, 1).reshape(-1, n, together, d)

    out = _in_turn(turns(_scaled(q)), turns(k), turns(v))
    return jnp.moveaxis(out.reshape(b, -1, n, together, d), 1, 2).reshape(b, n, heads, d)


# Of plain matrices: JAX's own function has axes of batch and heads even where these are 1, and its products take up to
# twice the time. And of logits with a column for each query: sums over keys are sums of rows then, and no product sums
# over the first axis of a large matrix, which takes a CPU two and a half times as long. `out` and the gradient of q
# leave the loops transposed, because inside of them XLA would turn their products round.
@jax.custom_vjp
def _in_turn(q: Turns, k: Turns, v: Turns) -> Turns:
    return _in_turn_forward(q, k, v)[0]


def _in_turn_forward(q: Turns, k: Turns, v: Turns) -> tuple[Turns, tuple[jax.Array, ...]]:
    def one_head(q: Matrix, k: Matrix, v: Matrix) -> tuple[Transposed, Row]:
        logits = jnp.matmul(k, q.T, preferred_element_type=jnp.float32)
        largest = logits.max(axis=0, keepdims=True)
        weights = jnp.exp(logits - largest)
        total = weights.sum(axis=0, keepdims=True)
        out = jnp.matmul(v.T, weights.astype(v.dtype), preferred_element_type=jnp.float32) / total
        return out.astype(v.dtype), largest + jnp.log(total)

    def one(qkv: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(jnp.stack(of_heads) for of_heads in zip(*map(one_head, *map(_heads_of, qkv)), strict=True))

    out, log_total = jax.lax.map(one, (q, k, v))
    return jnp.moveaxis(out, 3, 1), (q, k, v, out, log_total)  # without the logits


def _in_turn_backward(kept: tuple[jax.Array, ...], g: Turns) -> tuple[Turns, Turns, Turns]:
    def one_head(
        q: Matrix, k: Matrix, v: Matrix, out: Transposed, log_total: Row, g: Matrix
    ) -> tuple[Transposed, Matrix, Matrix]:
        weights = jnp.exp(jnp.matmul(k, q.T, preferred_element_type=jnp.float32) - log_total)
        by_weight = jnp.matmul(v, g.T, preferred_element_type=jnp.float32)
        # The mean of by_weight over the keys, by their weights, is g . out.
        mean = jnp.sum(out.astype(jnp.float32) * g.T.astype(jnp.float32), axis=0, keepdims=True)
        by_logit = (weights * (by_weight - mean)).astype(q.dtype)
        return jnp.matmul(k.T, by_logit), jnp.matmul(by_logit, q), jnp.matmul(weights.astype(g.dtype), g)

    def one(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v, out, log_total, g = arrays
        of_heads = map(one_head, *map(_heads_of, (q, k, v)), out, log_total, _heads_of(g))
        by_q, by_k, by_v = zip(*of_heads, strict=True)
        return jnp.stack(by_q), jnp.stack(by_k, axis=1), jnp.stack(by_v, axis=1)

    by_q, by_k, by_v = jax.lax.map(one, (*kept, g))
    return jnp.moveaxis(by_q, 3, 1), by_k, by_v


def _heads_of(x: Float[Array, "n heads d"]) -> list[Matrix]:
    """`n d` for each head of `n heads d`."""
    return [x[:, i] for i in range(x.shape[1])]


_in_turn.defvjp(_in_turn_forward, _in_turn_backward)


def _splash(q: Heads, k: Heads, v: Heads) -> Heads:
    # Here, because it takes a second and only a TPU's program needs it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    b, n, heads, d = q.shape
    block = math.gcd(n, _LARGEST_BLOCK)
    # One kernel for all three gradients saves a product, but writes as many gradients of q as there are blocks of keys.
    fused = block == n
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )
    # An example's heads have no more to do with each other than with another's: all are the kernel's heads.
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((n, n))] * (b * heads))
    kernel = splash_attention_kernel.make_splash_mha_single_device(mask=mask, block_sizes=sizes)
    q, k, v = (jnp.swapaxes(x, 1, 2).reshape(b * heads, n, d) for x in (_scaled(q), k, v))
    return jnp.swapaxes(kernel(q, k, v).reshape(b, heads, n, d), 1, 2)


def _cudnn(q: Heads, k: Heads, v: Heads) -> Heads:
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
