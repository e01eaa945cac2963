"""The degrees of parallelism, and where weights lie under them: numbers only, known before any worker starts.

May import wanvideo/. Open degrees.py first.
"""
