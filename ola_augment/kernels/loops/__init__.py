"""Compiled kernels for the CPU: one loop over the images of a batch, and what it calls.

``batch.py`` has the loop, ``moves.py`` and ``bilinear.py`` what moves pixels, whatever their type,
``byte_levels.py`` and ``levels.py`` what changes levels: bytes as Pillow does, and all others.
"""
