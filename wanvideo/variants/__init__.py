"""What the variants of Wan are, and what each adds to the transformer; a module here is found by itself.

May import the packages before it (base/ to model/). Open animate.py first, and docs/adding-a-variant.md to add one.
"""
