"""The prediction log on disk: its files, and how to read them.

``serving/log`` writes it. It is here because rooms below and beside serving read it: features compare
what requests saw with the offline store, the loop's monitor counts what was answered.
"""
