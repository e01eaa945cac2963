"""What the client, the launcher and the workers tell each other: settings, requests, replies, reports.

May import plan/ and wanvideo/. Open requests.py first.
"""
