"""Estimates meta-gradients: unrolls of inner training and the evolution strategies over them.

Owns the inner loop. ``actor.py`` alone knows Ray; everything else is a pure function of theta and recorded keys.
"""
