"""The variants of Wan with the layers that each adds to the transformer; base/variant.py finds every module here.

May import the packages before it (base/ to model/). Open animate.py first, and docs/adding-a-variant.md to add one.
"""
