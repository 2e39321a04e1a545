"""Towers, usable alone: the vision transformer, text transformers, and the table of sizes that both are named by."""
