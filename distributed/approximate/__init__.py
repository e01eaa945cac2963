"""Strategies that are not exact: displaced patches (DistriFusion) and PipeFusion, with their memory and schedules.

May import the packages before it (plan/ to planner/) and wanvideo/. strategies/ has one module for each.
Open strategies/displaced.py first.
"""
