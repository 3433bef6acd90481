"""Measures theta: trains fixed tasks with each checkpoint's learned optimizer, scores it against tuned Adam, reports.

The core (``results``, ``scores``, ``training``, ``queue``, ``report``) is deterministic and knows no Ray, no clock and
no network; ``actor`` wraps it. The evaluator only reads checkpoints: it never writes one and never slows the learner.
"""
