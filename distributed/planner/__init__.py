"""Which degrees are chosen where the user leaves them open: what a step costs under each plan, and which one is best.

May import plan/, protocol/, parallel/ and wanvideo/. Open planner.py first.
"""
