"""One worker process: its loop over requests, one forward, the VAE's strips, its report.

May import the packages before it (plan/ to approximate/) and wanvideo/. Open worker.py first.
"""
