"""Five doors: the names of five other systems, so that their users change an import and keep their scripts.

Names, argument shapes and errors in a script's own words; what they do is limbeck's. See docs/coming-from.md.
"""
