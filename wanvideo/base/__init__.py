"""What everything else speaks of: a model's dimensions, its inputs, the grid of tokens, patches to weights.

May import torch. Open config.py first.
"""
