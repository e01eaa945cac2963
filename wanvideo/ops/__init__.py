"""Pointwise operations and rotary embeddings, in torch and, on GPUs, as Triton kernels.

May import base/. Open pointwise.py first.
"""
