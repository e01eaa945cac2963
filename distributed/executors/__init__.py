"""Where ranks live, how they start, and how messages and tensors reach them.

May import the packages before it (plan/ to worker/). Open executor.py first;
docs/adding-an-executor.md says how to add another.
"""
