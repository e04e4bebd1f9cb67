"""Losses between scores of several candidates, or several labels at once."""
