"""mscm: multistep consistency models in JAX (arXiv:2403.06807v3)."""

__version__ = "0.1.0"
