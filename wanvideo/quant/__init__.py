"""Quantised weights: how each format lies in a file, how it is dequantised, and products in fp8.

May import base/ and ops/. Open formats/registry.py first.
"""
