"""Code shared by the demo, the tools and the tests: the tiny Wan's vocabulary, Euler sampling, random VAE weights.

May import base/ and vae/. Open tiny_text.py first.
"""
