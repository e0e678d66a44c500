"""Rollout engines on Ray actors, on GPUs of their own.

Nothing here is imported unless it is asked for, and Ray itself only when engines are created.
"""
