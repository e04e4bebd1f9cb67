"""Five doors: the names of five other systems, so that their users change an import and keep their scripts.

Each is thin; what it does is limbeck's. See docs/coming-from.md.
"""
