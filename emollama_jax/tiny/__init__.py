"""The stand-in's wing: drawn faces, the pretraining of the small towers, and the demo.

A reader of the real thing need not pass through here.
"""
