"""Families of questions with reference replies and scorers; see ``base``."""
