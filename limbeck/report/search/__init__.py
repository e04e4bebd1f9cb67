"""The report of a search: its data, and the page and the terminal tables that are made from it."""
