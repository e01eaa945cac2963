"""The terms of all other packages: a model's dimensions, its inputs, the grid of its tokens, patches to weights.

May import torch. Open config.py first.
"""
