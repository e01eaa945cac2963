"""Code that all nodes share: settings read off widgets, model files, refusals, charts.

May import distributed/, wanvideo/. Open settings.py first.
"""
