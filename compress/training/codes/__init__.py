"""Scales and roundings that learn, with the codes frozen or not."""
