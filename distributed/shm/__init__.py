"""Memory of this host that several processes share: arenas of tensors, page-locked segments, the cancel barrier,
signs of life.

May import plan/ and protocol/. Open arena.py first.
"""
