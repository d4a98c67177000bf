"""Migrations of the database, written by hand: one file a step in `versions/`, never changed after a release."""
